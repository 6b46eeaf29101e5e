"""The maths of PPO by hand-computed numbers and by the laws it must obey. Peers' numbers: test_functional_golden.py."""

import ast
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_tasks.ppo import functional as F

f64 = torch.float64
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]
GAMMA_LAM = [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.97, 0.0)]


def law(*strategies: st.SearchStrategy) -> Callable[[Callable], Callable]:
    """A property that must hold for whatever the strategies draw; always the same draws."""
    return lambda test: settings(max_examples=40, deadline=None, derandomize=True)(given(*strategies)(test))


def t(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=f64)


def close(actual: Tensor, expected: Tensor | float, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-9, atol=atol)


class Batch(NamedTuple):
    """Everything that the masked functions take; all [B, T] but `scores` [B]."""

    mask: Tensor
    scores: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with `change` applied to every tensor but the mask and the scores."""
        return Batch(self.mask, self.scores, *(change(x) for x in self[2:]))


@st.composite
def batches(draw: st.DrawFn, holes: bool = True) -> Batch:
    b, n = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if holes and draw(st.booleans()):
        mask = torch.rand(b, n, generator=rng) < 0.6
    else:  # right-padded, with empty and full rows
        mask = torch.arange(n) < torch.randint(0, n + 1, (b, 1), generator=rng)
    real = [torch.randn(b, n, generator=rng, dtype=f64) for _ in range(8)]
    return Batch(mask, torch.randn(b, generator=rng, dtype=f64), *real)


def results(x: Batch, mask: Tensor | None = None, grad: bool = False) -> dict[str, Tensor]:
    """What every masked function makes of a batch; with `grad`, also the gradients of both losses."""
    m = x.mask if mask is None else mask
    logprobs, values = x.logprobs.clone().requires_grad_(grad), x.values.clone().requires_grad_(grad)
    kl = F.kl_per_token(x.logprobs, x.ref_logprobs, "k1")
    out = {
        "rewards": F.assemble_rewards(x.scores, kl, m, 0.3),
        "mean": F.masked_mean(x.rewards, m),
        "var": F.masked_var(x.rewards, m),
        "var_biased": F.masked_var(x.rewards, m, unbiased=False),
        "whiten": F.masked_whiten(x.rewards, m),
        "whiten_keep_mean": F.masked_whiten(x.rewards, m, shift_mean=False),
        "explained_variance": F.explained_variance(x.values, x.returns, m),
        "last_index": F.last_index(m),
    }
    out["advantages"], out["returns"] = F.gae(x.values, x.rewards, m, 0.97, 0.9)
    for clip in (0.2, None):
        actor = F.actor_loss(logprobs, x.old_logprobs, x.advantages, m, clip, dual_clip=3.0)
        critic = F.critic_loss(values, x.old_values, x.returns, m, clip)
        out |= {f"actor_{clip}_{k}": v for k, v in actor._asdict().items()}
        out |= {f"critic_{clip}_{k}": v for k, v in critic._asdict().items()}
        if grad:
            (out[f"grad_logprobs_{clip}"],) = torch.autograd.grad(actor.loss, logprobs)
            (out[f"grad_values_{clip}"],) = torch.autograd.grad(critic.loss, values)
    return {k: v.detach() for k, v in out.items()}


# --- By hand --------------------------------------------------------------------------------------------------------


def test_response_mask_ends_with_the_first_stop_token() -> None:
    tokens = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 2, 2, 2], [5, 9, 2, 7]])
    assert F.response_mask(tokens, [2, 9]).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert F.response_mask(tokens, []).all()


def test_last_index() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])
    for dtype in (torch.bool, torch.int64, torch.float32):
        assert F.last_index(mask.to(dtype)).tolist() == [1, 3, -1, 3]


def test_kl_estimators_by_hand() -> None:
    logprobs, ref = t([-1.0, -2.0]), t([-1.5, -1.0])  # d = 0.5, -1
    close(F.kl_per_token(logprobs, ref, "k1"), t([0.5, -1.0]))
    close(F.kl_per_token(logprobs, ref, "k2"), t([0.125, 0.5]))
    close(F.kl_per_token(logprobs, ref, "k3"), t([math.exp(-0.5) - 0.5, math.e - 2]))
    close(F.kl_per_token(logprobs, ref, "abs"), t([0.5, 1.0]))


@pytest.mark.parametrize("name", ["kl", "mse", "full", "K1", ""])
def test_unknown_estimator_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="'k1', 'k2', 'k3', 'abs'"):
        F.kl_per_token(t([0.0]), t([0.0]), name)


def test_kl_full_with_excluded_tokens() -> None:
    p, q = t([0.0, 0.0, -math.inf, -math.inf]), t([0.0, 0.0, 0.0, -math.inf])
    close(F.kl_full(p, q), t([math.log(1.5)])[0])  # ½, ½ against ⅓, ⅓
    assert F.kl_full(q, p).item() == math.inf
    logits = p.requires_grad_()
    F.kl_full(logits, q).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_rewards_by_hand() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    rewards = F.assemble_rewards(torch.tensor([10.0, 20.0, 30.0]), torch.tensor([[1.0, 2.0, 3.0]] * 3), mask, 0.5)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [-0.5, -1.0, 18.5], [0.0, 0.0, 0.0]]


def test_statistics_by_hand() -> None:
    x, mask = t([1.0, 2.0, 6.0, 99.0]), torch.tensor([[1, 1, 1, 0]])
    close(F.masked_mean(x, mask), 3.0)
    close(F.masked_var(x, mask), 7.0)  # (4 + 1 + 9) / 2
    close(F.masked_var(x, mask, unbiased=False), 14 / 3)
    close(F.masked_whiten(x, mask, eps=0.0), t([-2.0, -1.0, 3.0, 0.0]) / math.sqrt(7))
    close(F.masked_whiten(x, mask, eps=2.0), t([-2.0, -1.0, 3.0, 0.0]) / 3)
    close(F.masked_whiten(x, mask, shift_mean=False, eps=2.0), t([7.0, 8.0, 12.0, 0.0]) / 3)


def test_statistics_of_one_and_of_none() -> None:
    x = t([5.0, 7.0])
    one, none = torch.tensor([[1, 0]]), torch.tensor([[0, 0]])
    for unbiased in (True, False):
        close(F.masked_var(x, one, unbiased), 0.0)
        close(F.masked_whiten(x, one, unbiased=unbiased), t([0.0, 0.0]))
        close(F.masked_var(x, none, unbiased), 0.0)
        close(F.masked_whiten(x, none, unbiased=unbiased), t([0.0, 0.0]))
    close(F.masked_mean(x, none), 0.0)
    for loss in (F.actor_loss(x, x, x, none, 0.2), F.critic_loss(x, x, x, none, 0.2)):
        assert all(field.item() == 0 for field in loss)


def test_gae_by_hand() -> None:
    # δ = (1 + .5·4 - 2, 3 + 0 - 4) = (1, -1); A_2 = -1, A_1 = 1 + .5·.5·(-1)
    values, rewards, mask = t([2.0, 4.0, 8.0]), t([1.0, 3.0, 8.0]), torch.tensor([[1, 1, 0]])
    advantages, returns = F.gae(values, rewards, mask, gamma=0.5, lam=0.5)
    close(advantages, t([0.75, -1.0, 0.0]))
    close(returns, t([2.75, 3.0, 0.0]))


def test_explained_variance_by_hand() -> None:
    returns, mask = t([1.0, 2.0, 3.0, 50.0]), torch.tensor([[1, 1, 1, 0]])
    close(F.explained_variance(returns, returns, mask), 1.0)
    close(F.explained_variance(returns + 7, returns, mask), 1.0)  # an offset does not count
    close(F.explained_variance(torch.zeros_like(returns), returns, mask), 0.0)
    close(F.explained_variance(-returns, returns, mask), -3.0)
    close(F.explained_variance(t([1.5, 2.0, 2.5, 0.0]), returns, mask), 0.75)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.3, 1e6 / 3])
def test_explained_variance_of_equal_returns_is_0(constant: float) -> None:
    returns = torch.full((3, 7), constant, dtype=f64)
    close(F.explained_variance(torch.randn(3, 7, dtype=f64), returns, torch.ones(3, 7)), 0.0)
    close(F.explained_variance(returns, returns, torch.zeros(3, 7)), 0.0)


def test_actor_loss_by_hand() -> None:
    ratio = t([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = t([1.0, -1.0, 1.0, -1.0, 2.0])
    logprobs = ratio.log().requires_grad_()
    out = F.actor_loss(logprobs, torch.zeros_like(ratio), advantages, torch.ones_like(ratio), clip=0.2)
    close(out.loss, (-1.2 + 1.5 - 0.5 + 0.8 - 2.2) / 5)  # clipped, not, not, clipped, inside
    close(out.clip_fraction, 2 / 5)
    close(out.ratio_mean, 5.1 / 5)
    close(out.approx_kl, ratio.log().square().mean() / 2)
    close(out.policy_kl, -ratio.log().mean())
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    close(grad, t([0.0, 1.5, -0.5, 0.0, -2.2]) / 5)
    plain = F.actor_loss(logprobs, torch.zeros_like(ratio), advantages, torch.ones_like(ratio), clip=None)
    close(plain.loss, (-1.5 + 1.5 - 0.5 + 0.5 - 2.2) / 5)
    close(plain.clip_fraction, 0.0)


@pytest.mark.parametrize("clip", [0.2, None])
def test_dual_clip_bounds_tokens_with_negative_advantage_only(clip: float | None) -> None:
    logprobs = t([10.0, 2.0, 2.0]).log().requires_grad_()
    advantages, mask = t([-1.0, -1.0, 1.0]), torch.ones(1, 3)
    out = F.actor_loss(logprobs, torch.zeros(1, 3), advantages, mask, clip, dual_clip=3.0)
    last = -2.0 if clip is None else -1.2
    close(out.loss, (3.0 + 2.0 + last) / 3)
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    close(grad, t([0.0, 2.0, -2.0 if clip is None else 0.0]) / 3)


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0, math.nan])
def test_dual_clip_must_be_above_1(dual_clip: float) -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"dual_clip is .* above 1"):
        F.actor_loss(x, x, x, x, 0.2, dual_clip=dual_clip)


def test_critic_loss_by_hand() -> None:
    values = t([2.0, 0.5, 1.0]).requires_grad_()
    old, returns = t([1.0, 0.0, 1.0]), t([3.0, 0.0, 2.0])
    out = F.critic_loss(values, old, returns, torch.ones(1, 3), clip=0.2)
    # (2-3)² against (1.2-3)²; (.5-0)² against (.2-0)²; inside
    close(out.loss, (3.24 + 0.25 + 1.0) / 2 / 3)
    close(out.clip_fraction, 1 / 3)
    close(out.error, (1.0 + 0.25 + 1.0) / 3)
    close(out.value_mean, 3.5 / 3)
    (grad,) = torch.autograd.grad(out.loss, values)
    close(grad, t([0.0, 0.5, -1.0]) / 3)
    close(F.critic_loss(values, old, returns, torch.ones(1, 3), clip=None).loss, (1.0 + 0.25 + 1.0) / 2 / 3)


def test_entropy_by_hand() -> None:
    close(F.entropy(torch.zeros(1, 1, 8, dtype=f64), 0.7), t([math.log(8)]))
    logits = t([0.0, 0.0, -math.inf]).reshape(1, 1, 3).requires_grad_()
    entropy = F.entropy(logits, 1.0)
    close(entropy.detach(), t([math.log(2)]))
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    assert grad.isfinite().all()


def test_logprobs_of_excluded_tokens() -> None:
    logits = t([0.0, 0.0, -math.inf]).reshape(1, 1, 3).requires_grad_()
    close(F.response_logprobs(logits, torch.tensor([[0]]), 1.0).detach(), t([-math.log(2)]))
    assert F.response_logprobs(logits, torch.tensor([[2]]), 1.0).item() == -math.inf
    (grad,) = torch.autograd.grad(F.response_logprobs(logits, torch.tensor([[0]]), 1.0).sum(), logits)
    close(grad, t([0.5, -0.5, 0.0]).reshape(1, 1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened(dtype: torch.dtype) -> None:
    logits = (torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    tokens = torch.randint(0, 50, (2, 3), generator=torch.Generator().manual_seed(1))
    for half, wide in (
        (F.response_logprobs(logits, tokens, 0.7), F.response_logprobs(logits.double(), tokens, 0.7)),
        (F.entropy(logits, 0.7), F.entropy(logits.double(), 0.7)),
        (F.kl_full(logits, logits.flip(-1)), F.kl_full(logits.double(), logits.double().flip(-1))),
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half.double(), wide, rtol=1e-5, atol=1e-5)


# --- Controllers ----------------------------------------------------------------------------------------------------


def test_adaptive_controller_by_hand() -> None:
    controller = F.AdaptiveKL(coef=0.2, target=6.0, horizon=1000)
    controller.update(kl=6.6, episodes=100)  # error 0.1
    assert controller.coef == pytest.approx(0.2 * 1.01)
    controller.update(kl=60.0, episodes=100)  # error clipped to 0.2
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02)
    controller.update(kl=-60.0, episodes=100)  # and to -0.2
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_controllers_ignore_a_kl_that_is_not_finite(kl: float) -> None:
    for controller in (F.FixedKL(0.2), F.AdaptiveKL(0.2, 6.0, 1000)):
        controller.update(kl, 64)
        assert controller.coef == 0.2


def test_fixed_controller_stays() -> None:
    controller = F.FixedKL(0.2)
    controller.update(100.0, 10**6)
    assert controller.coef == 0.2


@law(st.lists(st.tuples(st.floats(), st.integers(0, 10**9)), max_size=20), st.floats(1e-3, 1e6))
def test_coefficient_is_never_negative_nor_nan(updates: list[tuple[float, int]], horizon: float) -> None:
    controller = F.AdaptiveKL(0.2, 6.0, horizon)
    for kl, episodes in updates:
        controller.update(kl, episodes)
        assert 0 <= controller.coef < math.inf


def test_coefficient_does_not_overflow() -> None:
    controller = F.AdaptiveKL(0.2, 6.0, horizon=1)
    for _ in range(100):
        controller.update(kl=100.0, episodes=10**6)  # × 200,001 each time
    assert controller.coef < math.inf


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: F.FixedKL(-0.1), "kl coefficient is -0.1"),
        (lambda: F.FixedKL(math.nan), "kl coefficient is nan"),
        (lambda: F.AdaptiveKL(math.inf, 6.0, 100), "kl coefficient is inf"),
        (lambda: F.AdaptiveKL(-1, 6.0, 100), "kl coefficient is -1"),
        (lambda: F.AdaptiveKL(0.1, 0.0, 100), "kl target is 0.0"),
        (lambda: F.AdaptiveKL(0.1, math.nan, 100), "kl target is nan"),
        (lambda: F.AdaptiveKL(0.1, 6.0, 0), "kl horizon is 0"),
        (lambda: F.AdaptiveKL(0.1, 6.0, math.inf), "kl horizon is inf"),
    ],
)
def test_controllers_refuse_nonsense(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}: expected a finite number"):
        make()


# --- Laws -----------------------------------------------------------------------------------------------------------


@law(batches(), st.sampled_from(GARBAGE))
def test_nothing_outside_the_mask_influences_anything(x: Batch, garbage: float) -> None:
    spoiled = x.changed(lambda v: torch.where(x.mask, v, garbage))
    expected, actual = results(x, grad=True), results(spoiled, grad=True)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
        if actual[name].shape == x.mask.shape:
            assert (actual[name][~x.mask] == 0).all(), name


@law(batches(), st.sampled_from(GARBAGE))
def test_gradients_through_statistics_are_clean(x: Batch, garbage: float) -> None:
    values = torch.where(x.mask, x.values, garbage).requires_grad_()
    for out in (F.masked_mean(values, x.mask), F.masked_var(values, x.mask), F.masked_whiten(values, x.mask)[0].sum()):
        (grad,) = torch.autograd.grad(out, values)
        assert grad.isfinite().all()
        assert (grad[~x.mask] == 0).all()


@law(batches())
def test_the_kind_of_mask_does_not_matter(x: Batch) -> None:
    expected = results(x)
    for mask in (x.mask.long(), x.mask.double(), x.mask.bfloat16(), x.mask.to(torch.uint8)):
        actual = results(x, mask)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    x = Batch(torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.randn(2).to(dtype), *torch.randn(8, 2, 3).to(dtype))
    for name, result in results(x, grad=True).items():
        assert result.dtype == (torch.int64 if name == "last_index" else dtype), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """90,000 ones do not fit float16, nor does a variance of 1e-8."""
    many = torch.ones(300, 300, dtype=dtype)
    assert F.masked_mean(many, many) == 1
    assert F.masked_whiten(many, many).tolist() == torch.zeros(300, 300).tolist()
    loss = F.actor_loss(many * 0, many * 0, many, many, 0.2)
    assert (loss.loss, loss.loss.dtype) == (-1, dtype)
    assert F.critic_loss(many, many, many * 3, many, None).loss == 2
    advantages, returns = F.gae(many, many, many, 1.0, 1.0)
    assert advantages.dtype == returns.dtype == dtype


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.int64])
def test_the_widest_dtype_wins_in_whatever_order(narrow: torch.dtype) -> None:
    one, wide = torch.ones(2, 3), torch.full((2, 3), 1 / 3, dtype=f64)
    for values, rewards in ((one.to(narrow), wide), (wide, one.to(narrow))):
        for result in F.gae(values, rewards, one, 0.9, 0.9):
            assert result.dtype == f64
            assert (result.to(narrow).to(f64) != result).any(), "computed wide, too"
    assert F.assemble_rewards(one[:, 0].to(narrow), wide, one, 0.1).dtype == f64


def test_integers_are_numbers() -> None:
    x = torch.tensor([[1, 2, 9]])
    assert F.masked_mean(x, torch.tensor([[1, 1, 0]])) == 1.5
    assert F.masked_var(x, torch.tensor([[1, 1, 0]])) == 0.5


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_an_empty_minibatch_adds_0(count: float | Tensor) -> None:
    x, mask = torch.randn(4, 2, 3), torch.zeros(2, 3)
    found = (*F.actor_loss(x[0], x[1], x[2], mask, 0.2, count), *F.critic_loss(x[0], x[1], x[2], mask, 0.2, count))
    assert [float(number) for number in found] == [0] * len(found)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_is_above_0(temperature: float) -> None:
    logits = torch.randn(1, 2, 5)
    for wrong in (
        lambda: F.entropy(logits, temperature),
        lambda: F.response_logprobs(logits, torch.zeros(1, 2, dtype=torch.int64), temperature),
    ):
        with pytest.raises(ValueError, match=r"temperature is .*: expected a finite number above 0"):
            wrong()


def test_a_large_ratio_in_float64_is_exact() -> None:
    new = t([100.0]).requires_grad_()
    loss = F.actor_loss(new, t([0.0]), t([-1.0]), t([1.0]), 0.2).loss
    loss.backward()
    assert new.grad is not None
    assert loss.item() == pytest.approx(math.exp(100))
    assert float(new.grad) == pytest.approx(math.exp(100))


def test_a_ratio_beyond_float32_is_no_nan() -> None:
    new = torch.tensor([[100.0, 100.0, 100.0]], requires_grad=True)
    result = F.actor_loss(new, torch.zeros(1, 3), torch.tensor([[0.0, 1.0, -1.0]]), torch.ones(1, 3), 0.2)
    result.loss.backward()
    assert result.loss.isfinite()
    assert new.grad is not None
    assert new.grad.isfinite().all()


@law(batches(), st.randoms(use_true_random=False))
def test_permuting_rows_permutes_results(x: Batch, random: Random) -> None:
    order = torch.tensor(random.sample(range(len(x.mask)), len(x.mask)))
    expected, actual = results(x, grad=True), results(Batch(*(v[order] for v in x)), grad=True)
    for name in expected:
        close(actual[name], expected[name][order] if expected[name].ndim else expected[name])


@law(batches(), st.integers(0, 3), st.integers(0, 3), st.sampled_from(GARBAGE))
def test_padding_columns_change_nothing(x: Batch, left: int, right: int, garbage: float) -> None:
    def pad(v: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(v, (left, right), value=fill)

    padded = Batch(pad(x.mask.long(), 0).bool(), x.scores, *(pad(v, garbage) for v in x[2:]))
    expected, actual = results(x, grad=True), results(padded, grad=True)
    for name in expected.keys() - {"last_index"}:
        close(actual[name], pad(expected[name], 0) if expected[name].ndim else expected[name])
    assert torch.equal(actual["last_index"], torch.where(x.mask.any(1), expected["last_index"] + left, -1))


@law(batches(), st.floats(0, 2), st.sampled_from(["k1", "k2", "k3", "abs"]))
def test_rewards_sum_to_score_minus_beta_kl(x: Batch, beta: float, estimator: str) -> None:
    kl = F.kl_per_token(x.logprobs, x.ref_logprobs, estimator)
    rewards = F.assemble_rewards(x.scores, kl, x.mask, beta)
    expected = torch.where(x.mask.any(1), x.scores, 0) - beta * torch.where(x.mask, kl, 0).sum(1)
    close(rewards.sum(1), expected)


@law(batches(), st.sampled_from([f64, torch.float32]), st.sampled_from([1.0, 1e-3, 1e-7]))
def test_k3_is_never_negative(x: Batch, dtype: torch.dtype, scale: float) -> None:
    k3 = F.kl_per_token((scale * x.logprobs).to(dtype), (scale * x.ref_logprobs).to(dtype), "k3")
    assert (k3 >= 0).all()


@law(batches())
def test_kl_full_is_the_expectation_of_k1_and_k3(x: Batch) -> None:
    logp, logq = x.logprobs.log_softmax(-1), x.ref_logprobs.log_softmax(-1)
    full = F.kl_full(x.logprobs, x.ref_logprobs)
    for estimator in ("k1", "k3"):
        close(full, (logp.exp() * F.kl_per_token(logp, logq, estimator)).sum(-1))
    assert (full >= -1e-12).all()


@law(batches(holes=False))
def test_returns_without_discount_are_the_rewards_to_go(x: Batch) -> None:
    advantages, returns = F.gae(x.values, x.rewards, x.mask, gamma=1.0, lam=1.0)
    to_go = torch.where(x.mask, x.rewards, 0).flip(1).cumsum(1).flip(1)
    close(returns, torch.where(x.mask, to_go, 0))
    close(advantages, torch.where(x.mask, to_go - x.values, 0))


@law(batches(holes=False), st.sampled_from(GAMMA_LAM))
def test_gae_is_the_discounted_sum_of_deltas(x: Batch, gamma_lam: tuple[float, float]) -> None:
    """GAE, eq. 16, as a double loop over the tokens of each row."""
    gamma, lam = gamma_lam
    advantages, returns = F.gae(x.values, x.rewards, x.mask, gamma, lam)
    for b, n in enumerate(x.mask.sum(1).tolist()):
        v, r = [*x.values[b, :n].tolist(), 0.0], x.rewards[b].tolist()
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(n)]
        for i in range(n):
            expected = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, n))
            close(advantages[b, i], expected)
            close(returns[b, i], expected + v[i])


@law(batches())
def test_whitened_has_mean_0_and_variance_1(x: Batch) -> None:
    for unbiased in (True, False):
        whitened = F.masked_whiten(x.rewards, x.mask, unbiased=unbiased)
        close(F.masked_mean(whitened, x.mask), 0.0)
        if x.mask.sum() > 1:
            close(F.masked_var(whitened, x.mask, unbiased), 1.0, atol=1e-4)  # eps, if two values are close
    close(F.masked_var(x.rewards, x.mask), x.rewards[x.mask].var() if x.mask.sum() > 1 else 0.0)
    close(F.masked_var(x.rewards, x.mask, False), x.rewards[x.mask].var(correction=0) if x.mask.any() else 0.0)


@law(batches(), st.sampled_from([0.1, 0.2, None]), st.sampled_from([2.0, None]), st.data())
def test_splitting_a_minibatch_changes_neither_loss_nor_gradient(
    x: Batch, clip: float | None, dual_clip: float | None, data: st.DataObject
) -> None:
    rows = len(x.mask)
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    count = x.mask.sum().clamp(min=1)

    def losses(part: slice, logprobs: Tensor, values: Tensor, n: Tensor | int | None) -> tuple[Tensor, ...]:
        y = Batch(*(v[part] for v in x))
        actor = F.actor_loss(logprobs[part], y.old_logprobs, y.advantages, y.mask, clip, n, dual_clip)
        return *actor, *F.critic_loss(values[part], y.old_values, y.returns, y.mask, clip, n)

    whole = [v.clone().requires_grad_() for v in (x.logprobs, x.values)]
    expected = losses(slice(None), *whole, None)
    (expected[0] + expected[5]).backward()
    for n in (count, int(count)):
        split = [v.clone().requires_grad_() for v in (x.logprobs, x.values)]
        total = [torch.zeros((), dtype=f64) for _ in expected]
        for start, stop in itertools.pairwise(cuts):
            part = losses(slice(start, stop), *split, n)
            (part[0] + part[5]).backward()  # gradients add up, as over micro-batches
            total = [a + b.detach() for a, b in zip(total, part, strict=True)]
        for a, b in zip(total, expected, strict=True):
            close(a, b.detach())
        for a, b in zip(split, whole, strict=True):
            close(a.grad, b.grad)


@law(batches(), st.sampled_from([0.2, None]))
def test_first_step_is_on_policy(x: Batch, clip: float | None) -> None:
    """Ratio 1, nothing clipped, no KL, loss 0 with whitened advantages; its gradient is the policy gradient's, -A/n."""
    advantages = F.masked_whiten(x.advantages, x.mask)
    logprobs = x.logprobs.clone().requires_grad_()
    out = F.actor_loss(logprobs, x.logprobs, advantages, x.mask, clip)
    close(out.loss.detach(), 0.0)
    assert out.ratio_mean == float(x.mask.any())
    assert out.clip_fraction == out.approx_kl == out.policy_kl == 0
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    close(grad, -advantages / x.mask.sum().clamp(min=1))
    assert F.critic_loss(x.values, x.values, x.returns, x.mask, clip).clip_fraction == 0


@law(batches())
def test_only_the_loss_carries_a_gradient(x: Batch) -> None:
    logprobs, values = x.logprobs.clone().requires_grad_(), x.values.clone().requires_grad_()
    actor = F.actor_loss(logprobs, x.old_logprobs, x.advantages, x.mask, 0.2)
    critic = F.critic_loss(values, x.old_values, x.returns, x.mask, 0.2)
    for out in (actor, critic):
        assert [field.requires_grad for field in out] == [name == "loss" for name in out._fields]


@law(st.integers(0, 2**31), st.floats(0.1, 3.0))
def test_logprobs_and_entropy_are_those_of_a_categorical(seed: int, temperature: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, 9, generator=rng, dtype=f64)
    tokens = torch.randint(0, 9, (2, 4), generator=rng)
    categorical = torch.distributions.Categorical(logits=logits / temperature)
    close(F.response_logprobs(logits, tokens, temperature), categorical.log_prob(tokens))
    close(F.entropy(logits, temperature), categorical.entropy())


@law(st.integers(0, 2**31), st.sets(st.integers(0, 5)))
def test_response_mask_against_a_loop(seed: int, stop_ids: set[int]) -> None:
    tokens = torch.randint(0, 6, (4, 6), generator=torch.Generator().manual_seed(seed))
    for row, mask in zip(tokens.tolist(), F.response_mask(tokens, sorted(stop_ids)).tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in stop_ids), len(row) - 1)
        assert mask == [i <= end for i in range(len(row))]


# --- Misuse ---------------------------------------------------------------------------------------------------------


def test_shapes_that_would_broadcast_are_refused() -> None:
    x, scores = torch.zeros(3, 3), torch.zeros(3)
    for call in (
        lambda: F.masked_mean(x, x[:, :1]),
        lambda: F.masked_var(x, x[0]),
        lambda: F.masked_whiten(x[:1], x),
        lambda: F.assemble_rewards(scores.unsqueeze(1), x, x, 0.1),
        lambda: F.assemble_rewards(scores, x[:1], x, 0.1),
        lambda: F.gae(x, x[:, :1], x, 1.0, 1.0),
        lambda: F.gae(x[:1], x, x, 1.0, 1.0),
        lambda: F.kl_per_token(x, x[:, :1], "k1"),
        lambda: F.kl_full(x, x[:1]),
        lambda: F.actor_loss(x, x, x[:, :1], x, 0.2),
        lambda: F.critic_loss(x, x, x[:1], x, 0.2),
        lambda: F.response_logprobs(torch.zeros(3, 4, 5), torch.zeros(3, 3, dtype=torch.int64), 1.0),
    ):
        with pytest.raises(ValueError, match="has shape"):
            call()


def test_imports_only_torch_and_the_standard_library() -> None:
    imports = [
        n for n in ast.walk(ast.parse(Path(F.__file__).read_text())) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert names == {"math", "collections.abc", "dataclasses", "functools", "typing", "torch"}

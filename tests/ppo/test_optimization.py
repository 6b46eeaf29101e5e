"""The update: its gradient is the formula's however the batch is cut, and nothing else is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_tasks import config, head
from rlhf_tasks.errors import UserError
from rlhf_tasks.gradients import GradientMemory
from rlhf_tasks.ppo.experience import Episodes, Experience, evaluate_episodes, make_experience
from rlhf_tasks.ppo.optimization import Learner, optimize
from rlhf_tasks.training import adamw, optimizer_tensors

HUGE = 1e9
"""A gradient norm that clips nothing."""


def ppo(**settings: Any) -> config.PPO:
    plain = {"epochs": 1, "minibatches": 1, "batch": 12, "micro_batch_tokens": 24, "max_grad_norm": HUGE}
    return config.PPO(**(plain | settings))


def experience(four: Any, rollout: Episodes) -> Experience:
    evaluation = evaluate_episodes(
        rollout, actor=four.actor, ref=four.ref, reward=four.reward, critic=four.critic, ppo=ppo(), temperature=0.8
    )
    return make_experience(rollout, evaluation, ppo(), kl_coef=0.1, score_statistics=(0.0, 1.0))


class Descent(torch.optim.SGD):
    """Plain gradient descent that cuts gradients as AdamW's fused step does, also in float64, which that refuses."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight -= group["lr"] * weight.grad / self.grad_scale  # type: ignore[attr-defined]


def update(
    four: Any,
    rollout: Episodes,
    x: Experience,
    settings: config.PPO,
    *,
    rate: float = 1.0,
    update_actor: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """Optimize by plain gradient descent, so that with rate 1 a step is its gradient."""
    actor, critic = (Learner(m, Descent(m.parameters(), rate)) for m in (four.actor, four.critic))
    return optimize(
        rollout, x, actor=actor, critic=critic, ppo=settings, temperature=0.8,
        update_actor=update_actor, seed_names=(seed, "ppo", 1), memory=GradientMemory(),
    )  # fmt: skip


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


@pytest.fixture
def gone_on(four: Any, rollout: Episodes) -> tuple[Any, Experience]:
    """Experience, and the models in float64: Actor and Critic some way from where the experience was made."""
    x, random = experience(four, rollout), torch.Generator().manual_seed(7)
    for model in (four.actor, four.critic):
        model.double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=random))
    return four, x


FULL = {"clip": 0.1, "value_clip": 0.07, "dual_clip": 1.5, "entropy_coef": 0.05}


def test_before_the_first_step_the_ratio_is_one(four: Any, rollout: Episodes) -> None:
    x = experience(four, rollout)
    measured = update(four, rollout, x, ppo(micro_batch_tokens=40))
    assert abs(measured["policy/loss"]) < 1e-6
    assert measured["policy/clip_fraction"] == 0
    assert measured["policy/approx_kl"] < 1e-8
    assert measured["policy/ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert measured["value/clip_fraction"] == 0
    assert measured["value/loss"] == pytest.approx(measured["value/error"] / 2)


@pytest.mark.parametrize("settings", [{}, FULL])
@pytest.mark.parametrize("cut", [{"minibatches": 1}, {"minibatches": 5, "epochs": 2}])
def test_micro_batches_change_nothing(
    gone_on: tuple[Any, Experience], rollout: Episodes, monkeypatch: pytest.MonkeyPatch, settings: Any, cut: Any
) -> None:
    """A minibatch taken row by row, in threes and fours, and whole: gradients alike to 1e-9, and statistics too.

    And whole again, with the logits of few tokens at a time.
    """
    results = []
    for tokens, piece in ((1, 10_000), (40, 10_000), (10_000, 10_000), (10_000, 3)):
        four, x = copy.deepcopy(gone_on)
        monkeypatch.setattr(head, "PIECE_ELEMENTS", piece * four.actor.config.vocab_size)
        measured = update(four, rollout, x, ppo(micro_batch_tokens=tokens, **settings, **cut), rate=0.1)
        results.append((weights(four.actor), weights(four.critic), measured))
    for actor, critic, measured in results[1:]:
        assert (actor - results[0][0]).abs().max() < 1e-9
        assert (critic - results[0][1]).abs().max() < 1e-9
        assert measured == pytest.approx(results[0][2], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("piece", [1, 5, 10_000])
def test_the_gradient_is_that_of_the_formula(
    gone_on: tuple[Any, Experience], rollout: Episodes, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """The losses written out token by token, each divided by the number of tokens of the minibatch.

    However few tokens' logits there are at a time.
    """
    four, x = gone_on
    monkeypatch.setattr(head, "PIECE_ELEMENTS", piece * four.actor.config.vocab_size)
    actor_loss, critic_loss, clipped = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    count = sum(len(response) for response in rollout.responses)
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids, start = torch.tensor([[*prompt, *response]]), len(prompt) - 1
        logp = (four.actor(input_ids=ids).logits[0, start:-1] / 0.8).log_softmax(-1)
        values = four.critic.score(four.critic.model(input_ids=ids).last_hidden_state)[0, start:-1, 0]
        for t, token in enumerate(response):
            a, ratio = x.advantages[row, t], (logp[t, token] - x.old_logprobs[row, t]).exp()
            plain, cut = -a * ratio, -a * ratio.clamp(0.9, 1.1)
            clipped += int(cut > plain)
            loss = torch.maximum(plain, cut)
            if a < 0:
                loss = torch.minimum(loss, -a * 1.5)
            actor_loss = actor_loss + (loss + 0.05 * (logp[t].exp() * logp[t]).sum()) / count
            old, target = x.old_values[row, t], x.returns[row, t]
            errors = (values[t] - target) ** 2, (values[t].clamp(old - 0.07, old + 0.07) - target) ** 2
            critic_loss = critic_loss + torch.maximum(*errors) / 2 / count
    expected = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        for loss, model in ((actor_loss, four.actor), (critic_loss, four.critic))
    ]
    before = weights(four.actor), weights(four.critic)
    measured = update(four, rollout, x, ppo(**FULL))
    after = weights(four.actor), weights(four.critic)
    for old, new, gradient in zip(before, after, expected, strict=True):
        assert gradient.norm() > 0.01
        assert (old - new - gradient).abs().max() < 1e-9
    assert clipped > 5
    assert measured["policy/clip_fraction"] == pytest.approx(clipped / count)
    assert measured["value/loss"] == pytest.approx(critic_loss.item())
    assert measured["policy/grad_norm"] == pytest.approx(expected[0].norm().item())
    assert measured["value/grad_norm"] == pytest.approx(expected[1].norm().item())


def test_gradients_are_clipped_and_the_norm_before_is_shown(four: Any, rollout: Episodes) -> None:
    x = experience(four, rollout)
    before = weights(four.actor), weights(four.critic)
    measured = update(four, rollout, x, ppo(max_grad_norm=0.01))
    assert measured["policy/grad_norm"] > 0.1
    assert measured["value/grad_norm"] > 0.1
    for old, model in zip(before, (four.actor, four.critic), strict=True):
        assert (weights(model) - old).norm().item() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_a_gradient_that_is_not_finite_is_no_step(four: Any, rollout: Episodes, name: str) -> None:
    x, model = experience(four, rollout), getattr(four, name)
    (x.advantages if name == "actor" else x.returns)[2, 0] = torch.inf
    before = weights(model)
    with pytest.raises(UserError, match=r"PPO diverged.*lower ppo\.actor_learning_rate"):
        update(four, rollout, x, ppo())
    assert torch.equal(weights(model), before)


def test_only_actor_and_critic_are_trained_and_no_gradient_is_left(four: Any, rollout: Episodes) -> None:
    before = {name: weights(getattr(four, name)) for name in ("actor", "ref", "reward", "critic")}
    update(four, rollout, experience(four, rollout), ppo(), rate=0.1)
    changed = {name for name, old in before.items() if not torch.equal(weights(getattr(four, name)), old)}
    assert changed == {"actor", "critic"}
    assert all(p.grad is None for name in before for p in getattr(four, name).parameters())


def test_a_critic_warm_up_leaves_the_actor(four: Any, rollout: Episodes) -> None:
    before = weights(four.actor), weights(four.critic)
    measured = update(four, rollout, experience(four, rollout), ppo(), update_actor=False)
    assert torch.equal(weights(four.actor), before[0])
    assert not torch.equal(weights(four.critic), before[1])
    assert "policy/loss" not in measured
    assert measured["value/loss"] > 0


def test_every_minibatch_of_every_epoch_is_a_step_of_both(four: Any, rollout: Episodes) -> None:
    x = experience(four, rollout)
    actor, critic = (Learner(model, adamw(model.parameters(), 1e-4)) for model in (four.actor, four.critic))
    settings = ppo(epochs=3, minibatches=5)
    measured = optimize(
        rollout, x, actor=actor, critic=critic, ppo=settings, temperature=0.8,
        update_actor=True, seed_names=(0,), memory=GradientMemory(),
    )  # fmt: skip
    assert measured["policy/epochs"] == 3
    for learner in (actor, critic):
        steps = [t.item() for name, t in optimizer_tensors(learner.optimizer).items() if name.endswith(".step")]
        assert set(steps) == {15.0}


class Watched(Episodes):
    """Episodes that remember which rows were asked for together."""

    def batch(self, rows: Any, *others: Any) -> Any:
        self.asked.append(frozenset(rows))
        return super().batch(rows, *others)


def test_each_epoch_deals_every_episode_once_and_anew(four: Any, rollout: Episodes) -> None:
    x, watched = experience(four, rollout), Watched(rollout.prompts, rollout.responses, rollout.ended)
    object.__setattr__(watched, "asked", [])
    update(four, watched, x, ppo(epochs=3, minibatches=5, micro_batch_tokens=10_000), rate=0.0)
    by_actor, by_critic = (watched.asked[i::2] for i in (0, 1))  # type: ignore[attr-defined]
    assert by_actor == by_critic
    assert len(by_actor) == 15
    epochs = [by_actor[i : i + 5] for i in range(0, 15, 5)]
    for minibatches in epochs:
        assert sorted(row for rows in minibatches for row in rows) == list(range(12))
        assert {len(rows) for rows in minibatches} == {2, 3}
    assert len({frozenset(minibatches) for minibatches in epochs}) == 3


def test_the_order_belongs_to_the_seed(four: Any, rollout: Episodes) -> None:
    x, results = experience(four, rollout), []
    for seed in (0, 0, 1):
        models = copy.deepcopy(four)
        update(models, rollout, x, ppo(minibatches=3), rate=0.1, seed=seed)
        results.append(weights(models.actor))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(("target", "epochs"), [(None, 4), (1e-6, 2), (1e6, 4)])
def test_a_target_kl_stops_the_epochs(four: Any, rollout: Episodes, target: float | None, epochs: int) -> None:
    """In the first epoch of one minibatch the Actor has not moved yet; after the second the target is passed."""
    measured = update(four, rollout, experience(four, rollout), ppo(epochs=4, target_kl=target), rate=0.5)
    assert measured["policy/epochs"] == epochs


@torch.no_grad()
def mean_entropy(actor: Any, rollout: Episodes) -> float:
    rows = [torch.tensor([[*p, *r]]) for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
    logps = torch.cat([actor(input_ids=row).logits[0] for row in rows]).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1).mean().item()


def test_statistics_and_the_target_kl_weigh_every_token_alike(
    gone_on: tuple[Any, Experience], rollout: Episodes
) -> None:
    """Five minibatches of unequal length without a step in between are the whole batch."""
    four, x = gone_on
    whole = update(four, rollout, x, ppo(), rate=0.0)
    cut = update(four, rollout, x, ppo(minibatches=5), rate=0.0)
    for name in ("policy/approx_kl", "policy/ratio_mean", "value/error", "value/clip_fraction"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-9), name
    for factor, epochs in ((0.999, 1), (1.001, 3)):
        settings = ppo(minibatches=5, epochs=3, target_kl=factor * whole["policy/approx_kl"])
        assert update(four, rollout, x, settings, rate=0.0)["policy/epochs"] == epochs


def test_an_entropy_bonus_raises_the_entropy(four: Any, rollout: Episodes) -> None:
    x = experience(four, rollout)
    x.advantages.zero_()
    before = mean_entropy(four.actor, rollout)
    update(four, rollout, x, ppo(), rate=0.1)
    assert mean_entropy(four.actor, rollout) == before
    update(four, rollout, x, ppo(entropy_coef=1.0), rate=0.1)
    assert mean_entropy(four.actor, rollout) > before + 0.01

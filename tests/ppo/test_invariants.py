"""Invariants of PPO on real models in float64: hypothesis draws the episodes, and how they are cut."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_tasks import config
from rlhf_tasks.data.batching import Line
from rlhf_tasks.forward import Cache, hidden_states
from rlhf_tasks.head import Head
from rlhf_tasks.ppo.experience import (
    Episodes,
    Experience,
    evaluate_episodes,
    make_experience,
    per_token,
    policy_measures,
    response_masks,
    response_values,
)
from rlhf_tasks.ppo.functional import actor_loss
from rlhf_tasks.ppo.optimization import actor_gradient, critic_gradient, gradients

EOS, VOCABULARY = 1, 300
CPU = torch.device("cpu")
TINY = 1e-9
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

tokens = st.integers(2, VOCABULARY - 1)
answers = st.tuples(st.lists(tokens, min_size=1, max_size=7), st.booleans())
pairs = st.tuples(st.lists(tokens, min_size=1, max_size=6), answers)


@st.composite
def episodes(draw: st.DrawFn) -> Episodes:
    """1 to 6 episodes of prompts of 1 to 6 tokens and answers of 1 to 8, with and without EOS."""
    rows = draw(st.lists(pairs, min_size=1, max_size=6))
    responses = [[*body, EOS] if ends else body for _, (body, ends) in rows]
    return Episodes([prompt for prompt, _ in rows], responses, [ends for _, (_, ends) in rows])


micro_batches = st.integers(1, 60)


@pytest.fixture(scope="module")
def models(_four: Any) -> Any:
    """The four models in float64, where what should be equal is so to 1e-9."""
    four = copy.deepcopy(_four)
    for name in ("actor", "ref", "reward", "critic"):
        getattr(four, name).double()
    return four


def experience(models: Any, of: Episodes, **options: Any) -> Experience:
    ppo = config.PPO(**({"minibatches": 1, "score": config.Score(kind="raw")} | options))
    evaluation = evaluate_episodes(
        of, actor=models.actor, ref=models.ref, reward=models.reward, critic=models.critic, ppo=ppo, temperature=0.8
    )
    return make_experience(of, evaluation, ppo, kl_coef=0.3, score_statistics=(0.0, 1.0))


def logprobs(models: Any, of: Episodes, micro_batch_tokens: int) -> Tensor:
    return per_token(lambda batch: policy_measures(models.actor, batch, 0.8), of, micro_batch_tokens, CPU)[0]


def gradient(models: Any, of: Episodes, made: Experience, micro_batch_tokens: int) -> Tensor:
    """Of Actor and Critic together, in one vector."""
    ppo, found = config.PPO(minibatches=1, entropy_coef=0.01), []
    for model, learn in (
        (models.actor, partial(actor_gradient, models.actor, ppo=ppo, temperature=0.8)),
        (models.critic, partial(critic_gradient, models.critic, ppo=ppo)),
    ):
        gradients(list(range(len(of.responses))), of, made, micro_batch_tokens, learn)
        found += [weight.grad.flatten() for weight in model.parameters()]
        model.zero_grad(set_to_none=True)
    return torch.cat(found)


def rows_of(made: Experience, order: Sequence[int]) -> list[Tensor]:
    return [getattr(made, name)[list(order)] for name in made.__dataclass_fields__]


@few
@given(episodes(), micro_batches)
def test_before_the_first_step_nothing_has_moved(models: Any, of: Episodes, micro_batch_tokens: int) -> None:
    made = experience(models, of)
    new = logprobs(models, of, micro_batch_tokens)
    assert (new - made.old_logprobs).abs().max() < TINY
    result = actor_loss(new, made.old_logprobs, made.advantages, made.mask, 0.2)
    assert result.clip_fraction == 0
    assert abs(result.loss) < 1e-6


@few
@given(episodes(), micro_batches)
def test_a_minibatch_may_be_cut_anyhow(models: Any, of: Episodes, micro_batch_tokens: int) -> None:
    made = experience(models, of)
    whole, cut = (gradient(models, of, made, size) for size in (10**6, micro_batch_tokens))
    assert (whole - cut).abs().max() <= TINY * max(1.0, whole.abs().max().item())


@few
@given(episodes(), st.integers(1, 5), micro_batches)
def test_neighbours_change_nothing(models: Any, of: Episodes, more: int, size: int) -> None:
    """A longer prompt with a longer answer, and a short one, stand in the line before and behind the others."""
    longest = [2] * (max(map(len, of.prompts)) + more)
    among = Episodes([[7], *of.prompts, longest], [[1], *of.responses, [3] * 9], [True, *of.ended, False])
    width = max(map(len, of.responses))
    assert (logprobs(models, among, 10**6)[1:-1, :width] - logprobs(models, of, size)).abs().max() < TINY


@few
@given(episodes(), st.randoms(use_true_random=False))
def test_the_order_of_episodes_changes_nothing(models: Any, of: Episodes, random: Any) -> None:
    order = list(range(len(of.responses)))
    random.shuffle(order)
    turned = Episodes(*([side[i] for i in order] for side in (of.prompts, of.responses, of.ended)))
    made, again = experience(models, of), experience(models, turned)
    for one, other in zip(rows_of(made, order), rows_of(again, range(len(order))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@few
@given(episodes(), tokens)
def test_a_value_does_not_know_its_token(models: Any, of: Episodes, token: int) -> None:
    """Whatever stands at the last place, and after it, the values up to that place are the same."""
    other = Episodes(of.prompts, [[*response[:-1], token, token] for response in of.responses], of.ended)
    values = []
    for each in (of, other):
        (found,) = per_token(lambda batch: (response_values(models.critic, batch),), each, 40, CPU)
        values.append(found[:, : max(map(len, of.responses))] * response_masks(of))
    assert (values[0] - values[1]).abs().max() < TINY


@few
@given(episodes(), st.sampled_from(["k1", "k2", "k3", "abs"]))
def test_rewards_sum_to_the_score_less_the_kl(models: Any, of: Episodes, estimator: Any) -> None:
    made = experience(models, of, kl=config.KL(estimator=estimator))
    d = (made.old_logprobs - made.ref_logprobs) * made.mask
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}[estimator].sum(1)
    assert (made.rewards.sum(1) - (made.scores - 0.3 * kl)).abs().max() < 1e-7


@few
@given(episodes())
def test_without_discount_returns_are_the_rewards_to_come(models: Any, of: Episodes) -> None:
    made = experience(models, of, gamma=1.0, lam=1.0)
    to_come = made.rewards.flip(1).cumsum(1).flip(1) * made.mask
    assert (made.returns - to_come).abs().max() < 1e-7


@few
@given(episodes())
@torch.no_grad()
def test_decoding_with_a_cache_says_what_a_forward_pass_says(models: Any, of: Episodes) -> None:
    """Episodes that are at their end leave the cache, whatever order they end in."""
    width = max(map(len, of.responses))
    rows, line, cache = list(range(len(of.prompts))), Line.of(of.prompts, CPU), Cache(max(of.lengths))
    found = torch.zeros(len(rows), width, dtype=torch.float64)
    for place in range(width):
        logits = Head.of(models.actor).logits(hidden_states(models.actor, line, cache)[line.ends])
        tokens = torch.tensor([of.responses[row][place] for row in rows])
        found[rows, place] = (logits / 0.8).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        going_on = [i for i, row in enumerate(rows) if len(of.responses[row]) > place + 1]
        cache.keep(going_on, torch.tensor(going_on, dtype=torch.long))
        rows, tokens = [rows[i] for i in going_on], tokens[going_on]
        line = Line(tokens, (1,) * len(rows), tuple(cache.lengths))
    assert (found - logprobs(models, of, 10**6)).abs().max() < TINY

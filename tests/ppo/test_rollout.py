"""Sampling: what is drawn belongs to the episode alone, and follows the model's own distribution."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_tasks.models import load_actor
from rlhf_tasks.ppo.rollout import Sampling, ended, sample, sample_responses, truncate, uniforms

SEED = (0, "ppo", 1, "sampling")
PROMPTS = [[9, 30], [17, 40, 60, 21, 33, 45, 50], [25], [80, 81, 82, 83], [25], [9, 30]]
PLAIN = Sampling(length=12, temperature=1.0, top_k=None, top_p=None, stop_ids=(1,), pad_id=0)
LAST_DRAW = 1 - 2.0**-53
"""The largest number that a draw can be."""


def sampling(**changes: Any) -> Sampling:
    return dataclasses.replace(PLAIN, **changes)


STOPS = tuple(range(1, 300, 8))
"""An eighth of all tokens, so that responses end at all lengths."""


def plainly(actor: Any, prompt: list[int], draws: Tensor, how: Sampling) -> list[int]:
    """One response as the definition says: no batch, no padding, no cache."""
    response: list[int] = []
    for draw in draws:
        with torch.no_grad():
            logits = actor(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[:, -1]
        response.append(int(sample(logits, draw[None], how)))
        if response[-1] in how.stop_ids:
            break
    return response


@pytest.mark.parametrize(
    "how", [sampling(stop_ids=STOPS), sampling(stop_ids=STOPS, temperature=0.5, top_k=20, top_p=0.9)]
)
@pytest.mark.parametrize("architecture", ["tiny_actor", "absolute_actor"])
def test_the_batched_cached_loop_draws_what_the_plain_one_does(
    request: pytest.FixtureRequest, architecture: str, how: Sampling
) -> None:
    """Finished rows leave the batch, rows of different prompts are padded: neither changes a token."""
    actor = load_actor(request.getfixturevalue(architecture), torch.device("cpu"))
    responses = sample_responses(actor, PROMPTS, how, SEED)
    draws = uniforms(len(PROMPTS), how.length, SEED)
    assert responses == [plainly(actor, p, d, how) for p, d in zip(PROMPTS, draws, strict=True)]
    assert len({len(response) for response in responses}) > 2


def test_an_episode_does_not_depend_on_those_after_it(four: Any) -> None:
    how = sampling(stop_ids=STOPS)
    together = sample_responses(four.actor, PROMPTS, how, SEED)
    for count in range(1, len(PROMPTS)):
        assert sample_responses(four.actor, PROMPTS[:count], how, SEED) == together[:count]


def test_a_response_ends_with_its_first_stop_or_its_length(four: Any) -> None:
    how = sampling(stop_ids=STOPS)
    responses = sample_responses(four.actor, PROMPTS * 5, how, SEED)
    for response, has_ended in zip(responses, ended(responses, how.stop_ids), strict=True):
        assert not set(response[:-1]) & set(STOPS)
        assert has_ended is (response[-1] in STOPS)
        assert has_ended or len(response) == how.length
    assert {True, False} == set(ended(responses, how.stop_ids))


def test_a_shorter_length_cuts_and_changes_nothing_else(four: Any) -> None:
    long, short = (sample_responses(four.actor, PROMPTS, sampling(length=n), SEED) for n in (9, 4))
    assert [response[:4] for response in long] == short


def test_equal_prompts_have_draws_of_their_own(four: Any) -> None:
    responses = sample_responses(four.actor, [[25]] * 4, PLAIN, SEED)
    assert len({tuple(response) for response in responses}) > 1
    assert responses == sample_responses(four.actor, [[25]] * 4, PLAIN, SEED)
    assert responses != sample_responses(four.actor, [[25]] * 4, PLAIN, (0, "ppo", 2, "sampling"))


def test_the_last_token_may_be_the_stop(four: Any) -> None:
    everything = sampling(length=1, stop_ids=tuple(range(300)))
    assert ended(sample_responses(four.actor, PROMPTS, everything, SEED), everything.stop_ids) == [True] * len(PROMPTS)
    assert ended([[5, 1], [5, 6], [1]], [1, 2]) == [True, False, True]


# Draws ---------------------------------------------------------------------------------------------------------------


def test_draws_belong_to_episode_and_position() -> None:
    draws = uniforms(6, 20, SEED)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    assert torch.equal(uniforms(3, 20, SEED), draws[:3])
    assert torch.equal(uniforms(6, 7, SEED), draws[:, :7])
    assert not torch.equal(uniforms(6, 20, (1, "ppo", 1, "sampling")), draws)
    assert draws.unique().numel() == draws.numel()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature: float) -> None:
    """Chi-square of 20,000 draws over 12 tokens: a right sampler's is under 31.3 in 99.9 % (11 degrees of freedom)."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = sample(logits.expand(len(draws), -1), draws, sampling(temperature=temperature))
    expected = torch.softmax(logits.double() / temperature, -1) * len(draws)
    assert ((tokens.bincount(minlength=12) - expected).square() / expected).sum() < 31.3


def test_a_draw_is_looked_up_in_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(6, -1)
    draws = torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751, LAST_DRAW], dtype=torch.float64)
    assert sample(logits, draws, PLAIN).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("logits", "how", "allowed"),
    [
        ([-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf], PLAIN, {1, 3}),
        ([0.0, 3.0, 1.0, 2.0, -1.0], sampling(top_k=2), {1, 3}),
        ([0.0, 3.0, 1.0, 2.0, -1.0], sampling(top_k=1), {1}),
        ([0.0, 3.0, 1.0, 2.0, -1.0], sampling(top_k=9), {0, 1, 2, 3, 4}),
        ([0.0, 10.0, 0.0, 9.5, -1.0], sampling(top_p=0.9), {1, 3}),
        ([0.0, 10.0, 0.0, 9.5, -1.0], sampling(top_p=0.5), {1}),
    ],
)
def test_what_has_no_probability_is_never_drawn(logits: list[float], how: Sampling, allowed: set[int]) -> None:
    draws = torch.linspace(0, LAST_DRAW, 2000, dtype=torch.float64)
    assert draws[-1] == LAST_DRAW
    rows = torch.tensor(logits).expand(len(draws), -1)
    assert set(sample(rows, draws, how).tolist()) == allowed


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (sampling(), [0.1, 0.4, 0.2, 0.3]),
        (sampling(top_k=3), [0.0, 0.4, 0.2, 0.3]),
        (sampling(top_k=4), [0.1, 0.4, 0.2, 0.3]),
        (sampling(top_p=0.35), [0.0, 0.4, 0.0, 0.0]),
        (sampling(top_p=0.5), [0.0, 0.4, 0.0, 0.3]),
        (sampling(top_p=0.75), [0.0, 0.4, 0.2, 0.3]),
        (sampling(top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
        (sampling(top_k=2, top_p=0.5), [0.0, 0.4, 0.0, 0.0]),  # 0.4 is more than half of what top-k left
    ],
)
def test_truncation_keeps_the_likeliest(how: Sampling, kept: list[float]) -> None:
    """Top-p: the fewest tokens that together have at least p, the one that reaches it included."""
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    assert truncate(probabilities, how)[0].tolist() == kept


def test_top_p_stops_where_it_is_reached_exactly() -> None:
    probabilities = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64)
    assert truncate(probabilities, sampling(top_p=0.5))[0].tolist() == [0, 0.5, 0, 0]


def test_a_low_temperature_takes_the_likeliest(four: Any) -> None:
    [response] = sample_responses(four.actor, [[25, 30]], sampling(temperature=1e-4, length=5), SEED)
    greedy: list[int] = []
    for _ in response:
        with torch.no_grad():
            greedy.append(int(four.actor(input_ids=torch.tensor([[25, 30, *greedy]])).logits[0, -1].argmax()))
    assert response == greedy

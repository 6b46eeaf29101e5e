"""Sampling: what is drawn belongs to the episode alone, and follows the model's own distribution."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_tasks.models import load_actor
from rlhf_tasks.ppo import rollout
from rlhf_tasks.ppo.experience import Episodes, per_token, policy_measures
from rlhf_tasks.ppo.functional import entropy
from rlhf_tasks.ppo.rollout import Sampling, ended, sample, sample_responses, truncate, uniforms

CPU = torch.device("cpu")
SEED = (0, "ppo", 1, "sampling")
PROMPTS = [[9, 30], [17, 40, 60, 21, 33, 45, 50], [25], [80, 81, 82, 83], [25], [9, 30]]
PLAIN = Sampling(length=12, temperature=1.0, top_k=None, top_p=None, stop_ids=(1,))
LAST_DRAW = 1 - 2.0**-53
"""The largest number that a draw can be."""


def sampling(**changes: Any) -> Sampling:
    return dataclasses.replace(PLAIN, **changes)


STOPS = tuple(range(1, 300, 8))
"""An eighth of all tokens, so that responses end at all lengths."""


def plainly(actor: Any, prompt: list[int], draws: Tensor, how: Sampling) -> list[int]:
    """One response as the definition says: no batch, no cache."""
    response: list[int] = []
    for draw in draws:
        with torch.no_grad():
            logits = actor(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[:, -1]
        response.append(int(sample(logits, draw[None], how).tokens))
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
    """Finished rows leave the batch, prompts of different lengths share a line: neither changes a token."""
    actor = load_actor(request.getfixturevalue(architecture), CPU)
    responses = sample_responses(actor, PROMPTS, how, SEED).responses
    draws = uniforms(len(PROMPTS), how.length, SEED)
    assert responses == [plainly(actor, p, d, how) for p, d in zip(PROMPTS, draws, strict=True)]
    assert len({len(response) for response in responses}) > 2


def test_an_episode_does_not_depend_on_those_after_it(four: Any) -> None:
    how = sampling(stop_ids=STOPS)
    together = sample_responses(four.actor, PROMPTS, how, SEED).responses
    for count in range(1, len(PROMPTS)):
        assert sample_responses(four.actor, PROMPTS[:count], how, SEED).responses == together[:count]


def test_a_response_ends_with_its_first_stop_or_its_length(four: Any) -> None:
    how = sampling(stop_ids=STOPS)
    responses = sample_responses(four.actor, PROMPTS * 5, how, SEED).responses
    for response, has_ended in zip(responses, ended(responses, how.stop_ids), strict=True):
        assert not set(response[:-1]) & set(STOPS)
        assert has_ended is (response[-1] in STOPS)
        assert has_ended or len(response) == how.length
    assert {True, False} == set(ended(responses, how.stop_ids))


def test_a_shorter_length_cuts_and_changes_nothing_else(four: Any) -> None:
    long, short = (sample_responses(four.actor, PROMPTS, sampling(length=n), SEED).responses for n in (9, 4))
    assert [response[:4] for response in long] == short


def test_equal_prompts_have_draws_of_their_own(four: Any) -> None:
    found = sample_responses(four.actor, [[25]] * 4, PLAIN, SEED)
    assert len({tuple(response) for response in found.responses}) > 1
    assert found == sample_responses(four.actor, [[25]] * 4, PLAIN, SEED)
    assert found.responses != sample_responses(four.actor, [[25]] * 4, PLAIN, (0, "ppo", 2, "sampling")).responses


def test_the_last_token_may_be_the_stop(four: Any) -> None:
    everything = sampling(length=1, stop_ids=tuple(range(300)))
    responses = sample_responses(four.actor, PROMPTS, everything, SEED).responses
    assert ended(responses, everything.stop_ids) == [True] * len(PROMPTS)
    assert ended([[5, 1], [5, 6], [1]], [1, 2]) == [True, False, True]


# What is known of what was drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [sampling(temperature=0.7), sampling(temperature=1.3, top_k=20, top_p=0.9)])
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_drawn_tokens_have_the_numbers_of_a_forward_pass(
    four: Any, how: Sampling, dtype: torch.dtype, gap: float
) -> None:
    """Of the whole distribution at the temperature, whatever top-k and top-p left of it to draw from."""
    how, actor = dataclasses.replace(how, stop_ids=STOPS), four.actor.to(dtype)
    found = sample_responses(actor, PROMPTS, how, SEED)
    episodes = Episodes(PROMPTS, found.responses, ended(found.responses, STOPS))
    passed = per_token(lambda batch: policy_measures(actor, batch, how.temperature), episodes, 30, CPU)
    for numbers, expected in zip((found.logprobs, found.entropies), passed, strict=True):
        assert [len(row) for row in numbers] == [len(response) for response in found.responses]
        for row, wanted in zip(numbers, expected, strict=True):
            assert row == pytest.approx(wanted[: len(row)].tolist(), rel=gap, abs=gap)
    for row, (prompt, response) in enumerate(zip(PROMPTS, found.responses, strict=True)):
        with torch.no_grad():
            logits = actor(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / how.temperature).log_softmax(-1)
        alone = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert found.logprobs[row] == pytest.approx(alone.tolist(), rel=gap, abs=gap)
        assert found.entropies[row] == pytest.approx((-(logp.exp() * logp).sum(-1)).tolist(), rel=gap, abs=gap)


def test_what_is_known_of_a_draw_does_not_depend_on_what_was_cut_off() -> None:
    """Unlike the distribution that is left, in which the likeliest token's log-probability would be 0."""
    logits, draws = torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.tensor([0.3], dtype=torch.float64)
    cut, whole = (sample(logits, draws, how) for how in (sampling(top_k=1), PLAIN))
    assert (cut.tokens.item(), cut.logprobs.item()) == (1, pytest.approx(logits.log_softmax(-1)[0, 1].item()))
    assert cut.entropies.item() == whole.entropies.item() == pytest.approx(entropy(logits, 1.0).item())


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


@pytest.mark.parametrize("block", [5, 512])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_samples_follow_the_softmax(monkeypatch: pytest.MonkeyPatch, temperature: float, block: int) -> None:
    """Chi-square of 20,000 draws over 12 tokens: a right sampler's is under 31.3 in 99.9 % (11 degrees of freedom)."""
    monkeypatch.setattr(rollout, "BLOCK", block)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = sample(logits.expand(len(draws), -1), draws, sampling(temperature=temperature)).tokens
    expected = torch.softmax(logits.double() / temperature, -1) * len(draws)
    assert ((tokens.bincount(minlength=12) - expected).square() / expected).sum() < 31.3


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30) | st.just(-torch.inf), min_size=1, max_size=23).filter(lambda x: max(x) > -31),
    draws=st.lists(st.floats(0, LAST_DRAW), min_size=1, max_size=4),
    block=st.sampled_from([1, 3, 4, 512]),
    how=st.builds(
        sampling,
        temperature=st.floats(0.3, 2),
        top_k=st.none() | st.integers(1, 25),
        top_p=st.none() | st.floats(0.05, 1),
    ),
)
def test_looking_up_by_blocks_is_looking_up(logits: list[float], draws: list[float], block: int, how: Sampling) -> None:
    """The token, its log-probability and the entropy by the definition; a draw at a token's very edge may go astray."""
    z = torch.tensor([logits], dtype=torch.float64) / how.temperature
    weights = truncate((z - z.amax()).exp(), how)[0]
    upto = weights.cumsum(0) / weights.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "BLOCK", block)
        rows = torch.tensor([logits] * len(draws), dtype=torch.float64)
        drawn = sample(rows, torch.tensor(draws, dtype=torch.float64), how)
    for draw, token, logprob, found in zip(draws, *(x.tolist() for x in drawn), strict=True):
        if (upto - draw).abs().min() > 1e-12:
            assert token == torch.searchsorted(upto, torch.tensor(draw, dtype=torch.float64), right=True).item()
        assert logprob == pytest.approx(z.log_softmax(-1)[0, token].item(), rel=1e-9, abs=1e-9)
        assert found == pytest.approx(entropy(z, 1.0).item(), rel=1e-9, abs=1e-9)


def test_a_draw_is_looked_up_in_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(6, -1)
    draws = torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751, LAST_DRAW], dtype=torch.float64)
    assert sample(logits, draws, PLAIN).tokens.tolist() == [0, 0, 1, 1, 2, 2]


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
@pytest.mark.parametrize("block", [2, 512])
def test_what_has_no_probability_is_never_drawn(
    monkeypatch: pytest.MonkeyPatch, logits: list[float], how: Sampling, allowed: set[int], block: int
) -> None:
    monkeypatch.setattr(rollout, "BLOCK", block)
    draws = torch.linspace(0, LAST_DRAW, 2000, dtype=torch.float64)
    assert draws[-1] == LAST_DRAW
    rows = torch.tensor(logits).expand(len(draws), -1)
    assert set(sample(rows, draws, how).tokens.tolist()) == allowed


def test_what_has_no_probability_is_not_drawn_at_the_edge_of_a_block_either() -> None:
    """The first token of every block is excluded; draws are at the edges between blocks, and one step beside them."""
    random, draws_of = torch.Generator().manual_seed(0), []
    logits = 3 * torch.randn(40, 10 * rollout.BLOCK, generator=random)
    logits[:, :: rollout.BLOCK] = -torch.inf
    for row in logits:
        upto = (row - row.amax()).exp().view(10, -1).sum(-1, dtype=torch.float64).cumsum(0)
        edges = upto[:-1] / upto[-1]
        draws_of.append(torch.cat([edges.nextafter(edges + way) for way in (-1, 0, 1)]))
    for row, draws in zip(logits, draws_of, strict=True):
        tokens = sample(row.expand(len(draws), -1), draws, PLAIN).tokens
        assert row[tokens].isfinite().all()


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
    [response] = sample_responses(four.actor, [[25, 30]], sampling(temperature=1e-4, length=5), SEED).responses
    greedy: list[int] = []
    for _ in response:
        with torch.no_grad():
            greedy.append(int(four.actor(input_ids=torch.tensor([[25, 30, *greedy]])).logits[0, -1].argmax()))
    assert response == greedy

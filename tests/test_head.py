"""Log-probabilities and entropies in pieces, and gradients that are worked out in place, against plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_tasks import head
from rlhf_tasks.head import Head, learn, measures
from rlhf_tasks.ppo import functional

TINY = 1e-9
law = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Case:
    """States that become logits, the tokens that were chosen, and what each token's numbers weigh in a loss."""

    head: Head
    states: Tensor
    tokens: Tensor
    temperature: float
    weights: Tensor  # of log-probabilities and of entropies, [2, n]
    tokens_a_piece: int

    def leaves(self) -> list[Tensor]:
        """What a loss has a gradient for; they have none yet."""
        found = [tensor for tensor in (self.states, self.head.weight, self.head.bias) if tensor is not None]
        for leaf in found:
            leaf.requires_grad_().grad = None
        return found

    def gradients(self) -> list[Tensor]:
        return [leaf.grad for leaf in (self.states, self.head.weight, self.head.bias) if leaf is not None]

    def logits(self) -> Tensor:
        """All at once, over the temperature."""
        logits = self.states @ self.head.weight.T + (0 if self.head.bias is None else self.head.bias)
        if self.head.softcap is not None:
            logits = self.head.softcap * (logits / self.head.softcap).tanh()
        return logits / self.temperature

    def plain(self) -> tuple[Tensor, Tensor]:
        """By a log_softmax over all logits."""
        logp = self.logits().log_softmax(-1)
        return logp.gather(1, self.tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    @contextmanager
    def in_pieces(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "PIECE_ELEMENTS", self.tokens_a_piece * self.head.weight.shape[0])
            yield


@st.composite
def cases(draw: st.DrawFn) -> Case:
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n, width, vocabulary = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 12))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    size = draw(st.sampled_from([0.1, 1.0, 10.0]))
    bias = normal(vocabulary) if draw(st.booleans()) else None
    return Case(
        Head(size * normal(vocabulary, width), bias, draw(st.none() | st.sampled_from([0.7, 5.0, 30.0]))),
        normal(n, width),
        torch.randint(vocabulary, (n,), generator=random),
        draw(st.just(1.0) | st.floats(0.2, 3)),
        normal(2, n),
        draw(st.integers(1, n + 1)),
    )


def example(**changes: Any) -> Case:
    """Seven tokens of a vocabulary of 11, in pieces of three."""
    random = torch.Generator().manual_seed(5)
    weight, states = (torch.randn(rows, 4, generator=random, dtype=torch.float64) for rows in (11, 7))
    bias, weights = torch.randn(11, generator=random, dtype=torch.float64), torch.ones(2, 7, dtype=torch.float64)
    tokens = torch.randint(1, 11, (7,), generator=random)
    return replace(Case(Head(weight, bias, None), states, tokens, 0.7, weights, 3), **changes)


def close(actual: Tensor, expected: Tensor, gap: float = TINY) -> None:
    torch.testing.assert_close(actual, expected, rtol=gap, atol=gap)


# Numbers -------------------------------------------------------------------------------------------------------------


@law
@given(cases())
def test_measures_are_those_of_the_whole_softmax(case: Case) -> None:
    with case.in_pieces():
        found = measures(case.head, case.states, case.tokens, case.temperature, with_entropy=True)
    named = functional.response_logprobs, functional.entropy
    logits = case.logits()[None]
    by_name = named[0](logits, case.tokens[None], 1.0)[0], named[1](logits, 1.0)[0]
    for actual, expected, again in zip(found, case.plain(), by_name, strict=True):
        assert not actual.requires_grad
        close(actual, expected)
        close(actual, again)


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 100))
def test_pieces_are_all_tokens_in_runs_that_fit(count: int, vocabulary: int, elements: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "PIECE_ELEMENTS", elements)
        pieces = list(Head(torch.zeros(vocabulary, 2), None, None).pieces(count))
    runs = [range(count)[piece] for piece in pieces]
    assert [place for run in runs for place in run] == list(range(count))
    assert all(len(run) * vocabulary <= elements or len(run) == 1 for run in runs)
    assert all((len(run) + 1) * vocabulary > elements for run in runs[:-1]), "no two could be one"


def far_from_zero(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Measures of logits about -100, as GPT-2's are, and what they are of the same logits in float64."""
    case = example(temperature=1.0)
    low, states = Head(case.head.weight.to(dtype), (case.head.bias - 100).to(dtype), None), case.states.to(dtype)
    logits = low.logits(states)[None].double()
    exact = functional.response_logprobs(logits, case.tokens[None], 1.0), functional.entropy(logits, 1.0)
    return measures(low, states, case.tokens, 1.0, with_entropy=True), (exact[0][0].float(), exact[1][0].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_logits_far_from_zero(dtype: torch.dtype) -> None:
    """Half precision is widened before anything is summed."""
    (found, _), (expected, _) = far_from_zero(dtype)
    close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies_of_logits_far_from_zero(dtype: torch.dtype) -> None:
    (_, found), (_, expected) = far_from_zero(dtype)
    close(found, expected, 1e-5)


# Gradients -----------------------------------------------------------------------------------------------------------


@law
@given(cases(), st.booleans())
def test_the_gradient_is_autograds(case: Case, with_entropy: bool) -> None:
    """Of the head and, through the states, of what made them."""
    seen: list[tuple[slice, int]] = []

    def loss_of(piece: slice, logprobs: Tensor, entropies: Tensor) -> Tensor:
        seen.append((piece, len(logprobs)))
        assert with_entropy or not entropies.any()
        of_logprobs, of_entropies = case.weights[:, piece]
        return (of_logprobs * logprobs).sum() + (of_entropies * entropies).sum()

    case.leaves()
    logprobs, entropies = case.plain()
    loss_of(slice(None), logprobs, entropies if with_entropy else torch.zeros_like(entropies)).backward()
    expected = case.gradients()
    case.leaves()
    seen.clear()
    with case.in_pieces():
        learn(case.head, 1 * case.states, case.tokens, case.temperature, loss_of, with_entropy=with_entropy)
    for actual, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=TINY, atol=TINY * max(1.0, wanted.abs().max().item()))
    places = range(len(case.tokens))
    assert [place for piece, count in seen for place in places[piece]] == list(places)
    assert [count for _, count in seen] == [len(places[piece]) for piece, _ in seen]


def test_gradients_are_added_to_what_is_there() -> None:
    """So that micro-batches make one minibatch."""
    case, once = example(), []
    case.leaves()
    for _ in range(2):
        with case.in_pieces():
            learn(case.head, 1 * case.states, case.tokens, 0.7, lambda piece, logprobs, entropies: logprobs.sum())
        once = once or [gradient.clone() for gradient in case.gradients()]
    for twice, first in zip(case.gradients(), once, strict=True):
        close(twice, 2 * first)
        assert first.any()


class Afresh(torch.autograd.Function):
    """`_Measures` for a check that goes backward more than once: it works in place, so each time it is run anew."""

    @staticmethod
    def forward(ctx: Any, case: Case, with_entropy: bool, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        ctx.case, ctx.with_entropy = case, with_entropy
        ctx.save_for_backward(*leaves)
        return Afresh.run(case, with_entropy, *leaves)

    @staticmethod
    def run(
        case: Case, with_entropy: bool, states: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        softcap = case.head.softcap
        return head._Measures.apply(weight, states, bias, case.tokens, case.temperature, softcap, with_entropy)

    @staticmethod
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in ctx.saved_tensors]
        with torch.enable_grad():
            found = Afresh.run(ctx.case, ctx.with_entropy, *leaves)
        return None, None, *torch.autograd.grad(found, leaves, of)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_derivative_is_that_of_small_differences(
    has_bias: bool, softcap: float | None, temperature: float, with_entropy: bool
) -> None:
    case = example(temperature=temperature)
    case = replace(case, head=Head(case.head.weight, case.head.bias if has_bias else None, softcap))
    leaves = case.leaves()
    assert torch.autograd.gradcheck(lambda *of: Afresh.apply(case, with_entropy, *of), leaves)


# Tokens that cannot be ------------------------------------------------------------------------------------------------


def excluding() -> Case:
    """Token 0 has a bias of -inf."""
    case = example()
    case.head.bias[0] = -torch.inf
    return case


def test_a_token_that_cannot_be_adds_nothing_to_the_entropy() -> None:
    case = excluding()
    with case.in_pieces():
        logprobs, entropies = measures(case.head, case.states, case.tokens, case.temperature, with_entropy=True)
    close(entropies, functional.entropy(case.logits()[None], 1.0)[0])
    close(logprobs, functional.response_logprobs(case.logits()[None], case.tokens[None], 1.0)[0])
    assert entropies.isfinite().all()
    assert measures(case.head, case.states, torch.zeros(7, dtype=torch.long), 1.0)[0].tolist() == [-torch.inf] * 7


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_token_that_cannot_be_has_no_gradient(with_entropy: bool) -> None:
    case = excluding()

    def loss_of(piece: slice, logprobs: Tensor, entropies: Tensor) -> Tensor:
        return logprobs.sum() + (entropies.sum() if with_entropy else 0)

    case.leaves()
    logits = case.logits()[None]
    logprobs = functional.response_logprobs(logits, case.tokens[None], 1.0)
    loss_of(slice(None), logprobs, functional.entropy(logits, 1.0)).backward()
    expected = case.gradients()
    assert all(gradient.isfinite().all() for gradient in expected)
    case.leaves()
    with case.in_pieces():
        learn(case.head, 1 * case.states, case.tokens, case.temperature, loss_of, with_entropy=with_entropy)
    for actual, wanted in zip(case.gradients(), expected, strict=True):
        close(actual, wanted)

"""Phase 1, rollout: the Actor writes responses to prompts.

Our own sampling loop, because `generate` cuts to the 50 likeliest tokens even when nobody asked for it, which breaks
ratios and KL in silence. What is sampled does not depend on the batch: every draw is an inverse-CDF look-up of one
uniform number that belongs to (purpose, episode, position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_tasks.data.batching import Line, TokenRow
from rlhf_tasks.forward import Cache, hidden_and_trunk_states
from rlhf_tasks.head import LEAST, Head
from rlhf_tasks.seeds import derive_seed

if TYPE_CHECKING:
    from rlhf_tasks import config


BLOCK = 512


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: at most `length` tokens each, ending with the first of `stop_ids`."""

    length: int
    temperature: float
    top_k: int | None
    top_p: float | None
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, generation: config.Generation, stop_ids: Sequence[int]) -> Sampling:
        g = generation
        return cls(g.max_new_tokens, g.temperature, g.top_k, g.top_p, tuple(stop_ids))

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)


@dataclass(frozen=True)
class Rollout:
    """B responses, up to and including their first EOS or stop token.

    Attributes:
        responses: B token lists.
        logprobs, entropies: of each token and of the distribution that it was drawn from, before top-k and top-p,
            at `temperature`; B lists.
        trunk: what the Actor's frozen trunk, if it has one, made of prompt and response, B times `[L, d]`.
    """

    responses: list[list[int]]
    logprobs: list[list[float]]
    entropies: list[list[float]]
    trunk: list[Tensor] | None = None


@torch.no_grad()
def sample_responses(
    actor: Any, prompts: Sequence[TokenRow], sampling: Sampling, seed_names: tuple[str | int, ...]
) -> Rollout:
    """One response to each of B prompts.

    Args:
        seed_names: what the draws' seeds are derived from; row i of the prompts is episode i.
    """
    device, head = next(actor.parameters()).device, Head.of(actor)
    draws = uniforms(len(prompts), sampling.length, seed_names).to(device)
    found = Rollout([[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts])
    parts: list[list[Tensor]] = [[] for _ in prompts]
    rows, cache = list(range(len(prompts))), Cache(max(map(len, prompts)) + sampling.length)
    line, place = Line.of(prompts, device), 0

    def unfinished() -> list[int]:
        """Which of the rows that are read go on."""
        answers = (found.responses[row] for row in rows)
        return [i for i, r in enumerate(answers) if not r or (len(r) < sampling.length and r[-1] not in stops)]

    stops, trunk = set(sampling.stop_ids), None
    while rows:
        states, trunk = hidden_and_trunk_states(actor, line, cache)
        states = states[line.ends]
        if trunk is not None:  # finished rows leave when their last token is read too: the Reward needs it
            for row, part in zip(rows, trunk.split(line.lengths), strict=True):
                parts[row].append(part)
            rows, states = _keep(unfinished(), rows, states, cache)
            if not rows:
                break
        drawn = sample(head.logits(states), draws[rows, place], sampling)
        for row, token, logprob, entropy in zip(rows, *(x.tolist() for x in drawn), strict=True):
            found.responses[row].append(token)
            found.logprobs[row].append(logprob)
            found.entropies[row].append(entropy)
        tokens, place = drawn.tokens, place + 1
        if trunk is None:
            rows, tokens = _keep(unfinished(), rows, tokens, cache)
        line = Line(tokens, (1,) * len(rows), tuple(cache.lengths))
    return found if trunk is None else replace(found, trunk=[torch.cat(parts.pop(0)) for _ in prompts])


def _keep(going_on: list[int], rows: list[int], of_rows: Tensor, cache: Cache) -> tuple[list[int], Tensor]:
    """Finished rows leave the batch. Returns those that go on, and what there is of them."""
    if len(going_on) == len(rows):
        return rows, of_rows
    picked = torch.tensor(going_on, dtype=torch.long, device=of_rows.device)
    cache.keep(going_on, picked)
    return [rows[i] for i in going_on], of_rows[picked]


class Drawn(NamedTuple):
    """All `[B]`: tokens, their log-probabilities, the entropies of their distributions."""

    tokens: Tensor
    logprobs: Tensor
    entropies: Tensor


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Drawn:
    """Where the cumulative distribution passes the draw: logits `[B, V]`, draws `[B]` in [0, 1).

    The look-up is in two steps, the block of tokens and then the token, so that sums in double precision are of blocks.
    """
    rows, count = logits.shape
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.temperature != 1:
        scaled = scaled / sampling.temperature
    shifted = (scaled - scaled.amax(-1, keepdim=True)).clamp_(min=LEAST)
    blocks = -(-count // BLOCK)
    weights = shifted.new_zeros(rows, blocks * BLOCK)
    torch.exp(shifted, out=weights[:, :count])
    sums = weights.view(rows, blocks, BLOCK).sum(-1).double()
    total = sums.sum(-1)
    mean = torch.linalg.vecdot(weights[:, :count], shifted) / total
    if sampling.truncates:
        weights[:, :count] = truncate(weights[:, :count].double(), sampling)
        sums = weights.view(rows, blocks, BLOCK).sum(-1).double()
    upto = sums.cumsum(-1)
    target = draws[:, None] * upto[:, -1:]
    block = _find(upto, target)
    inside = weights.view(rows, blocks, BLOCK)[torch.arange(rows, device=block.device), block[:, 0]].double().cumsum(-1)
    rest = (target - (upto - sums).gather(1, block)).clamp(min=0)
    tokens = (block * BLOCK + _find(inside, rest))[:, 0]
    logprobs = shifted.gather(1, tokens[:, None])[:, 0] - total.log()
    return Drawn(tokens, logprobs, total.log() - mean)


def _find(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first place whose cumulative value `[B, n]` is above the target `[B, 1]`; rounding may let none be: the last
    place that adds to it."""
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return torch.searchsorted(cumulative, target, right=True).minimum(last)


def truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Zero what top-k and top-p (Holtzman et al. 2020) leave out: `[B, V] -> [B, V]`, of any sum, which shrinks."""
    if sampling.top_k is not None and sampling.top_k < probabilities.shape[-1]:
        least = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.where(before < sampling.top_p * ordered.sum(-1, keepdim=True), ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(1, places, kept)
    return probabilities


def uniforms(episodes: int, length: int, seed_names: tuple[str | int, ...]) -> Tensor:
    """Draws in [0, 1), `[B, T]` float64: row b depends on (purpose, b) alone, and its first places not on T."""
    rows = [np.random.Generator(np.random.Philox(derive_seed(*seed_names, b))).random(length) for b in range(episodes)]
    return torch.from_numpy(np.stack(rows))


def ended(responses: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> list[bool]:
    """Whether each response came to an EOS or stop token within its length."""
    return [bool(response) and response[-1] in stop_ids for response in responses]


def distinct_bigrams(responses: Sequence[Sequence[int]]) -> float:
    """Different token bigrams as a share of all, over the responses together (Li et al. 2016); 0 when there is none."""
    bigrams = [pair for response in responses for pair in pairwise(response)]
    return len(set(bigrams)) / max(1, len(bigrams))

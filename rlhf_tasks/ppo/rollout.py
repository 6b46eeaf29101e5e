"""Phase 1, rollout: the Actor writes responses to prompts.

Our own sampling loop, because `generate` cuts to the 50 likeliest tokens even when nobody asked for it, which breaks
ratios and KL in silence. What is sampled does not depend on the batch: every draw is an inverse-CDF look-up of one
uniform number that belongs to (purpose, episode, position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_tasks.data.batching import TokenRow, pad_rows
from rlhf_tasks.models import position_ids
from rlhf_tasks.seeds import derive_seed

if TYPE_CHECKING:
    from rlhf_tasks import config


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: at most `length` tokens each, ending with the first of `stop_ids`."""

    length: int
    temperature: float
    top_k: int | None
    top_p: float | None
    stop_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, generation: config.Generation, stop_ids: Sequence[int], pad_id: int) -> Sampling:
        g = generation
        return cls(g.max_new_tokens, g.temperature, g.top_k, g.top_p, tuple(stop_ids), pad_id)


@torch.no_grad()
def sample_responses(
    actor: Any, prompts: Sequence[TokenRow], sampling: Sampling, seed_names: tuple[str | int, ...]
) -> list[list[int]]:
    """One response to each prompt, up to and including its first EOS or stop token. B prompts -> B token lists.

    Args:
        seed_names: what the draws' seeds are derived from; row i of the prompts is episode i.
    """
    device = next(actor.parameters()).device
    draws = uniforms(len(prompts), sampling.length, seed_names)
    stops = torch.tensor(sampling.stop_ids, device=device)
    input_ids, mask = (tensor.to(device) for tensor in pad_rows(prompts, sampling.pad_id, left=True))
    positions = position_ids(mask)
    responses: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts))
    cache = DynamicCache(config=actor.config)
    for place in range(sampling.length):
        logits = actor(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = sample(logits, draws[rows, place].to(device), sampling)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            responses[row].append(token)
        going_on = ~torch.isin(tokens, stops)
        if not going_on.any():
            break
        if not going_on.all():  # finished rows leave the batch
            keep = going_on.nonzero().squeeze(1)
            tokens, mask, positions, rows = tokens[keep], mask[keep], positions[keep], rows[keep.cpu()]
            cache.batch_select_indices(keep)
        input_ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return responses


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Where the cumulative distribution passes the draw: logits `[B, V]`, draws `[B]` in [0, 1) -> tokens `[B]`."""
    probabilities = truncate(torch.softmax(logits.double() / sampling.temperature, dim=-1), sampling)
    cumulative = probabilities.cumsum(-1)
    target = draws.unsqueeze(1) * cumulative[:, -1:]
    # right=True: a token of probability 0 shares its neighbour's cumulative value and is passed over
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Zero what top-k and top-p (Holtzman et al. 2020) leave out: `[B, V] -> [B, V]`, not normalised again."""
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

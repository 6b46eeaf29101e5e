"""Phase 2, evaluation, and the experience made from it: scores, KL, rewards, values, advantages, returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_tasks.data.batching import Batch, collate
from rlhf_tasks.models import response_logits, token_scores
from rlhf_tasks.ppo.functional import (
    assemble_rewards,
    entropy,
    gae,
    kl_full,
    kl_per_token,
    masked_whiten,
    response_logprobs,
)
from rlhf_tasks.training import length_batches

if TYPE_CHECKING:
    from rlhf_tasks import config


@dataclass(frozen=True)
class Episodes:
    """What a rollout leaves: B prompts, B responses, and whether each response ended by itself."""

    prompts: list[list[int]]
    responses: list[list[int]]
    ended: list[bool]

    @cached_property  # asked for once a row
    def lengths(self) -> list[int]:
        """Tokens of prompt and response together, B of them."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]

    def batch(self, rows: Sequence[int], pad_id: int, device: torch.device) -> Batch:
        """Some episodes as padded tensors."""
        return collate([self.prompts[i] for i in rows], [self.responses[i] for i in rows], pad_id, device)


@dataclass(frozen=True)
class Experience:
    """All that optimization reads, fixed for the iteration. Every tensor is `[B, T]` but `scores`, `[B]`.

    `advantages` are as the Actor's loss uses them; `raw_advantages` are before whitening.
    """

    mask: Tensor
    scores: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    old_values: Tensor
    rewards: Tensor
    raw_advantages: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, rows: Sequence[int], width: int) -> Experience:
        """Some episodes of it, cut to their own width: tensors `[b, t]`."""
        cut = {f.name: getattr(self, f.name)[rows] for f in fields(self)}
        return Experience(**{name: x if x.dim() == 1 else x[:, :width] for name, x in cut.items()})


@dataclass(frozen=True)
class ScoreFunction:
    """A score from outside the four models, added to the Reward's or `instead` of it.

    Attributes:
        score: B prompts and B responses, as tokens -> `[B]`.
    """

    score: Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor] | None = None
    weight: float = 1.0
    instead: bool = False

    def combine(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """The Reward's scores and this one together, `[B]`."""
        if self.score is None:
            return scores
        own = self.weight * self.score(episodes.prompts, episodes.responses).to(scores.device)
        return own if self.instead else scores + own


def make_experience(
    episodes: Episodes,
    *,
    actor: Any,
    ref: Any,
    reward: Any,
    critic: Any,
    kl_coef: float,
    ppo: config.PPO,
    temperature: float,
    score_statistics: tuple[float, float],
    pad_id: int,
    cut_price: float | None = None,
    score_function: ScoreFunction = ScoreFunction(),
) -> tuple[Experience, Tensor]:
    """Turn episodes into experience. Returns it and the Reward's raw scores `[B]`."""

    def over(measure: Callable[[Batch], tuple[Tensor, ...]]) -> list[Tensor]:
        return per_token(measure, episodes, ppo.micro_batch_tokens, pad_id, next(actor.parameters()).device)

    old_logprobs, ref_logprobs, entropies, kl = over(
        lambda batch: policy_measures(actor, ref, batch, temperature, ppo.kl.estimator)
    )
    (old_values,) = over(lambda batch: (response_values(critic, batch),))
    (token_score,) = over(lambda batch: (response_scores(reward, batch),))
    mask = response_masks(episodes).to(old_logprobs.device)
    raw_scores = token_score.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    combine = partial(score_function.combine, episodes=episodes)
    scores = shape_scores(raw_scores, episodes.ended, ppo, score_statistics, combine, cut_price)
    rewards = assemble_rewards(scores, kl, mask, kl_coef)
    if ppo.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    raw_advantages, returns = gae(old_values, rewards, mask, ppo.gamma, ppo.lam)
    advantages = masked_whiten(raw_advantages, mask) if ppo.whiten_advantages else raw_advantages
    experience = Experience(
        mask, scores, old_logprobs, ref_logprobs, entropies, old_values, rewards, raw_advantages, advantages, returns
    )
    return experience, raw_scores


def shape_scores(
    raw: Tensor,
    ended: list[bool],
    ppo: config.PPO,
    statistics: tuple[float, float],
    combine: Callable[[Tensor], Tensor] = lambda scores: scores,
    cut_price: float | None = None,
) -> Tensor:
    """The score that PPO maximises, from the Reward's raw one: kind, what `combine` adds, missing-EOS rule, clip.

    `[B] -> [B]`. `cut_price` is what `steer` subtracts at present; by default its first value.
    """
    mean, std = statistics
    kinds = {"raw": raw, "normalised": (raw - mean) / std, "sigmoid": torch.sigmoid(raw)}
    scores, rule = combine(kinds[ppo.score.kind]), ppo.missing_eos
    cut = ~torch.tensor(ended, device=scores.device)
    if rule.mode == "replace":
        scores = torch.where(cut, rule.value, scores)
    elif rule.mode in ("subtract", "steer"):
        scores = torch.where(cut, scores - (rule.value if cut_price is None else cut_price), scores)
    return scores if ppo.score.clip is None else scores.clamp(-ppo.score.clip, ppo.score.clip)


@torch.no_grad()
def per_token(
    measure: Callable[[Batch], tuple[Tensor, ...]],
    episodes: Episodes,
    micro_batch_tokens: int,
    pad_id: int,
    device: torch.device,
) -> list[Tensor]:
    """Run `measure` over micro-batches of similar length; its results `[b, t]` are put together as `[B, T]`."""
    shape = (len(episodes.responses), max(len(response) for response in episodes.responses))
    whole: list[Tensor] = []
    for rows in length_batches(episodes.lengths, micro_batch_tokens):
        batch = episodes.batch(rows, pad_id, device)
        parts = measure(batch)
        whole = whole or [part.new_zeros(shape) for part in parts]
        for target, part in zip(whole, parts, strict=True):
            target[rows, : part.shape[1]] = part * batch.mask
    return whole


def policy_measures(
    actor: Any, ref: Any, batch: Batch, temperature: float, estimator: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of the response's tokens by Actor and Ref, the Actor's entropy, their KL: four times `[b, t]`."""
    logits, ref_logits = _logits(actor, batch), _logits(ref, batch)
    old = response_logprobs(logits, batch.tokens, temperature)
    anchor = response_logprobs(ref_logits, batch.tokens, temperature)
    if estimator == "full":
        kl = kl_full(logits / temperature, ref_logits / temperature)
    else:
        kl = kl_per_token(old, anchor, estimator)
    return old, anchor, entropy(logits, temperature), kl


def response_masks(episodes: Episodes) -> Tensor:
    """1 on every response's tokens up to and including its EOS or stop token, `[B, T]`."""
    lengths = torch.tensor([len(response) for response in episodes.responses])
    return (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).long()


def response_values(critic: Any, batch: Batch) -> Tensor:
    """V_t for every response token: the Critic at the place that predicts it, the state before the action. `[b, t]`."""
    start = batch.prompt_width - 1
    return token_scores(critic, batch.input_ids, batch.attention_mask)[:, start : start + batch.tokens.shape[1]]


def response_scores(reward: Any, batch: Batch) -> Tensor:
    """The Reward's output at every response token itself, `[b, t]`; the score is the one at the last."""
    return token_scores(reward, batch.input_ids, batch.attention_mask)[:, batch.prompt_width :]


def _logits(model: Any, batch: Batch) -> Tensor:
    return response_logits(model, batch.input_ids, batch.attention_mask, batch.tokens.shape[1])

"""Phase 2, evaluation, and the experience made from it: scores, KL, rewards, values, advantages, returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_tasks.data.batching import Batch
from rlhf_tasks.forward import hidden_states, states_before
from rlhf_tasks.head import Head, measures
from rlhf_tasks.ppo.functional import assemble_rewards, gae, kl_full, kl_per_token, masked_whiten
from rlhf_tasks.ppo.rollout import Rollout
from rlhf_tasks.training import length_batches

if TYPE_CHECKING:
    from rlhf_tasks import config


@dataclass(frozen=True)
class Episodes:
    """What a rollout leaves: B prompts, B responses, and whether each response ended by itself.

    `drawn` are the log-probabilities and entropies of its tokens, if they are still known.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    ended: list[bool]
    drawn: Rollout | None = None

    @cached_property  # asked for once a row
    def lengths(self) -> list[int]:
        """Tokens of prompt and response together, B of them."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]

    def batch(self, rows: Sequence[int], device: torch.device) -> Batch:
        """Some episodes as tensors."""
        known = self.drawn.trunk if self.drawn else None
        trunk = [known[i] for i in rows] if known else None
        return Batch.of([self.prompts[i] for i in rows], [self.responses[i] for i in rows], device, trunk)


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

    def tokens(self, rows: Sequence[int]) -> Experience:
        """Some episodes' response tokens, in the order of a `Batch` of them: tensors `[n]`; `scores` stay `[b]`."""
        counted = self.mask[rows].bool()
        cut = {f.name: getattr(self, f.name)[rows] for f in fields(self)}
        return Experience(**{name: x if x.dim() == 1 else x[counted] for name, x in cut.items()})


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


@dataclass(frozen=True)
class Evaluation:
    """What the four models say of B episodes: tensors `[B, T]`, but `raw_scores`, the Reward's own, `[B]`.

    `kl` is per token, by the estimator that the reward uses.
    """

    old_logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    old_values: Tensor
    raw_scores: Tensor


def evaluate_episodes(
    episodes: Episodes, *, actor: Any, ref: Any, reward: Any, critic: Any, ppo: config.PPO, temperature: float
) -> Evaluation:
    """Phase 2: have the four models read the episodes."""

    def over(measure: Callable[[Batch], tuple[Tensor, ...]]) -> list[Tensor]:
        return per_token(measure, episodes, ppo.micro_batch_tokens, next(actor.parameters()).device)

    old_logprobs, entropy = drawn_measures(episodes, actor) or over(
        lambda batch: policy_measures(actor, batch, temperature)
    )
    (ref_logprobs,) = over(lambda batch: (policy_logprobs(ref, batch, temperature),))
    if ppo.kl.estimator == "full":
        (kl,) = over(lambda batch: (whole_kl(actor, ref, batch, temperature),))
    else:
        kl = kl_per_token(old_logprobs, ref_logprobs, ppo.kl.estimator)
    (old_values,) = over(lambda batch: (response_values(critic, batch),))
    (token_scores,) = over(lambda batch: (response_scores(reward, batch),))
    last = response_masks(episodes).sum(1, keepdim=True).to(token_scores.device) - 1
    return Evaluation(old_logprobs, entropy, ref_logprobs, kl, old_values, token_scores.gather(1, last).squeeze(1))


def make_experience(
    episodes: Episodes,
    evaluation: Evaluation,
    ppo: config.PPO,
    *,
    kl_coef: float,
    score_statistics: tuple[float, float],
    cut_price: float | None = None,
    score_function: ScoreFunction = ScoreFunction(),
) -> Experience:
    """Turn evaluated episodes into experience: scores, rewards, advantages, returns."""
    found, mask = evaluation, response_masks(episodes).to(evaluation.kl.device)
    combine = partial(score_function.combine, episodes=episodes)
    scores = shape_scores(found.raw_scores, episodes.ended, ppo, score_statistics, combine, cut_price)
    rewards = assemble_rewards(scores, found.kl, mask, kl_coef)
    if ppo.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    raw_advantages, returns = gae(found.old_values, rewards, mask, ppo.gamma, ppo.lam)
    advantages = masked_whiten(raw_advantages, mask) if ppo.whiten_advantages else raw_advantages
    return Experience(
        mask,
        scores,
        found.old_logprobs,
        found.ref_logprobs,
        found.entropy,
        found.old_values,
        rewards,
        raw_advantages,
        advantages,
        returns,
    )


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
    measure: Callable[[Batch], tuple[Tensor, ...]], episodes: Episodes, micro_batch_tokens: int, device: torch.device
) -> list[Tensor]:
    """Run `measure` over micro-batches of similar length; its results `[n]` are put together as `[B, T]`."""
    mask = response_masks(episodes).to(device)
    whole: list[Tensor] = []
    for rows in length_batches(episodes.lengths, micro_batch_tokens):
        parts = measure(episodes.batch(rows, device))
        whole = whole or [part.new_zeros(mask.shape) for part in parts]
        for target, part in zip(whole, parts, strict=True):
            target[rows] = target[rows].masked_scatter(mask[rows], part)
    return whole


def drawn_measures(episodes: Episodes, actor: Any) -> tuple[Tensor, Tensor] | None:
    """The Actor's log-probabilities and entropies from when it drew the tokens, `[B, T]` both, if they are known."""
    if episodes.drawn is None:
        return None
    weight, mask = next(actor.parameters()), response_masks(episodes)
    like = torch.zeros(mask.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    logprobs, entropies = (
        like.masked_scatter(mask, torch.tensor(list(chain.from_iterable(rows)), dtype=like.dtype)).to(weight.device)
        for rows in (episodes.drawn.logprobs, episodes.drawn.entropies)
    )
    return logprobs, entropies


def policy_measures(policy: Any, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens by an Actor or Ref, and its entropies there: two times `[n]`."""
    return measures(Head.of(policy), states_before(policy, batch), batch.tokens, temperature, with_entropy=True)


def policy_logprobs(policy: Any, batch: Batch, temperature: float) -> Tensor:
    """The log-probabilities alone, `[n]`."""
    return measures(Head.of(policy), states_before(policy, batch), batch.tokens, temperature)[0]


def whole_kl(actor: Any, ref: Any, batch: Batch, temperature: float) -> Tensor:
    """KL(Actor ‖ Ref) of the whole distributions that the response tokens are drawn from, `[n]`."""
    sides = [(Head.of(policy), states_before(policy, batch)) for policy in (actor, ref)]
    pieces = sides[0][0].pieces(len(batch.tokens))
    return torch.cat(
        [kl_full(*(head.logits(states[piece]) / temperature for head, states in sides)) for piece in pieces]
    )


def response_masks(episodes: Episodes) -> Tensor:
    """True on every response's tokens up to and including its EOS or stop token, `[B, T]`."""
    lengths = torch.tensor([len(response) for response in episodes.responses])
    return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]


def response_values(critic: Any, batch: Batch) -> Tensor:
    """V_t for every response token: the Critic's output before it, `[n]`."""
    return critic.score(states_before(critic, batch)).squeeze(-1)


def response_scores(reward: Any, batch: Batch) -> Tensor:
    """The Reward's output at every response token itself, `[n]`; the score is the one at the last."""
    return reward.score(hidden_states(reward, batch.line)[batch.places]).squeeze(-1)

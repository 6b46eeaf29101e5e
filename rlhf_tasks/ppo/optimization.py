"""Phase 3, optimization: `ppo.epochs` passes over the experience, Actor and Critic each with its own optimizer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_tasks.data.batching import Batch
from rlhf_tasks.errors import UserError
from rlhf_tasks.models import response_logits
from rlhf_tasks.ppo.experience import Episodes, Experience, response_values
from rlhf_tasks.ppo.functional import actor_loss, critic_loss, entropy, response_logprobs
from rlhf_tasks.seeds import permutation
from rlhf_tasks.training import length_batches

if TYPE_CHECKING:
    from rlhf_tasks import config


@dataclass
class Learner:
    """A model in training and its optimizer."""

    model: Any
    optimizer: torch.optim.Optimizer

    def step(self, max_grad_norm: float) -> float:
        """Clip the gradient, take an optimizer step, return the norm before clipping.

        Raises:
            UserError: the gradient is not finite; no step is taken, so the state before the iteration stays whole.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"PPO diverged: the gradient of {type(self.model).__name__} is {norm.item()}; "
                "lower ppo.actor_learning_rate and ppo.critic_learning_rate, or raise ppo.kl.coef"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()


def optimize(
    episodes: Episodes,
    experience: Experience,
    *,
    actor: Learner,
    critic: Learner,
    ppo: config.PPO,
    temperature: float,
    update_actor: bool,
    pad_id: int,
    seed_names: tuple[str | int, ...],
) -> dict[str, float]:
    """Update Critic and (unless it is the Critic's warm-up) Actor in place.

    Returns:
        `policy/` and `value/` statistics: means over all optimizer steps, weighted by tokens.
    """
    totals: dict[str, float] = defaultdict(float)
    tokens, epochs = 0.0, 0
    for epoch in range(ppo.epochs):
        order = permutation(len(episodes.responses), *seed_names, "minibatches", epoch)
        approx_kl, epoch_tokens = 0.0, 0.0
        for rows in (order[i :: ppo.minibatches] for i in range(ppo.minibatches)):
            measured = gradients(rows, episodes, experience, actor, critic, ppo, temperature, update_actor, pad_id)
            if update_actor:
                measured["policy/grad_norm"] = actor.step(ppo.max_grad_norm)
            measured["value/grad_norm"] = critic.step(ppo.max_grad_norm)
            weight = experience.mask[rows].sum().item()
            add_to(totals, {name: value * weight for name, value in measured.items()})
            approx_kl += measured.get("policy/approx_kl", 0.0) * weight
            epoch_tokens += weight
        tokens, epochs = tokens + epoch_tokens, epoch + 1
        if ppo.target_kl is not None and approx_kl / epoch_tokens > ppo.target_kl:
            break
    return {name: total / tokens for name, total in totals.items()} | {"policy/epochs": float(epochs)}


def gradients(
    rows: list[int],
    episodes: Episodes,
    experience: Experience,
    actor: Learner,
    critic: Learner,
    ppo: config.PPO,
    temperature: float,
    update_actor: bool,
    pad_id: int,
) -> dict[str, float]:
    """Add a minibatch's gradients to both models', micro-batch by micro-batch. Returns its statistics.

    Losses are divided by the *minibatch's* tokens, so how it is cut changes no gradient.
    """
    measured: dict[str, float] = defaultdict(float)
    count = experience.mask[rows].sum()
    for micro in length_batches([episodes.lengths[row] for row in rows], ppo.micro_batch_tokens):
        picked = [rows[i] for i in micro]
        batch = episodes.batch(picked, pad_id, experience.mask.device)
        part = experience.rows(picked, batch.tokens.shape[1])
        if update_actor:
            add_to(measured, actor_gradient(actor.model, batch, part, ppo, temperature, count))
        add_to(measured, critic_gradient(critic.model, batch, part, ppo, count))
    return dict(measured)


def actor_gradient(
    actor: Any, batch: Batch, part: Experience, ppo: config.PPO, temperature: float, count: Tensor
) -> dict[str, float]:
    """Add a micro-batch's gradient to the Actor's; `count` is the minibatch's tokens. Returns statistics."""
    logits = response_logits(actor, batch.input_ids, batch.attention_mask, batch.tokens.shape[1])
    logprobs = response_logprobs(logits, batch.tokens, temperature)
    result = actor_loss(
        logprobs, part.old_logprobs, part.advantages, part.mask, ppo.clip, count=count, dual_clip=ppo.dual_clip
    )
    loss = result.loss
    if ppo.entropy_coef:
        bonus = torch.where(part.mask.bool(), entropy(logits, temperature), 0.0).sum() / count
        loss = loss - ppo.entropy_coef * bonus
    loss.backward()
    return {
        "policy/loss": result.loss.item(),
        "policy/clip_fraction": result.clip_fraction.item(),
        "policy/approx_kl": result.approx_kl.item(),
        "policy/ratio_mean": result.ratio_mean.item(),
    }


def critic_gradient(critic: Any, batch: Batch, part: Experience, ppo: config.PPO, count: Tensor) -> dict[str, float]:
    """The same for the Critic."""
    values = response_values(critic, batch)
    result = critic_loss(values, part.old_values, part.returns, part.mask, ppo.value_clip, count=count)
    result.loss.backward()
    return {
        "value/loss": result.loss.item(),
        "value/clip_fraction": result.clip_fraction.item(),
        "value/error": result.error.item(),
    }


def add_to(sums: dict[str, float], values: dict[str, float]) -> None:
    """Add numbers by name."""
    for name, value in values.items():
        sums[name] += value

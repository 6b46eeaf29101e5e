"""Phase 3, optimization: `ppo.epochs` passes over the experience, Actor and Critic each with its own optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_tasks.data.batching import Batch
from rlhf_tasks.errors import UserError
from rlhf_tasks.forward import states_before
from rlhf_tasks.gradients import GradientMemory
from rlhf_tasks.head import Head
from rlhf_tasks.head import learn as learn_tokens
from rlhf_tasks.ppo.experience import Episodes, Experience, response_values
from rlhf_tasks.ppo.functional import actor_loss, critic_loss
from rlhf_tasks.seeds import permutation
from rlhf_tasks.training import clipped_step, length_batches

if TYPE_CHECKING:
    from rlhf_tasks import config


@dataclass
class Learner:
    """A model in training and its optimizer."""

    model: Any
    optimizer: torch.optim.Optimizer

    def step(self, norm: Tensor, max_grad_norm: float) -> float:
        """Clip the gradient, whose norm is told, and take an optimizer step. Returns the norm.

        Raises:
            UserError: the gradient is not finite; no step is taken, so the state before the iteration stays whole.
        """
        if not torch.isfinite(norm):
            raise UserError(
                f"PPO diverged: the gradient of {type(self.model).__name__} is {norm.item()}; "
                "lower ppo.actor_learning_rate and ppo.critic_learning_rate, or raise ppo.kl.coef"
            )
        clipped_step(self.optimizer, norm, max_grad_norm)
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
    seed_names: tuple[str | int, ...],
    memory: GradientMemory,
) -> dict[str, float]:
    """Update Critic and (unless it is the Critic's warm-up) Actor in place, with the gradients of one at a time.

    Returns:
        `policy/` and `value/` statistics: means over all optimizer steps, weighted by tokens.
    """
    totals: dict[str, float] = defaultdict(float)
    tokens, epochs = 0.0, 0
    for epoch in range(ppo.epochs):
        order = permutation(len(episodes.responses), *seed_names, "minibatches", epoch)
        approx_kl, epoch_tokens = 0.0, 0.0
        for rows in (order[i :: ppo.minibatches] for i in range(ppo.minibatches)):
            measured: dict[str, float] = {}
            if update_actor:
                learn = partial(actor_gradient, actor.model, ppo=ppo, temperature=temperature)
                with memory.lent_to(actor.model):
                    measured |= gradients(rows, episodes, experience, ppo.micro_batch_tokens, learn)
                    measured["policy/grad_norm"] = actor.step(memory.norm(), ppo.max_grad_norm)
            learn = partial(critic_gradient, critic.model, ppo=ppo)
            with memory.lent_to(critic.model):
                measured |= gradients(rows, episodes, experience, ppo.micro_batch_tokens, learn)
                measured["value/grad_norm"] = critic.step(memory.norm(), ppo.max_grad_norm)
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
    micro_batch_tokens: int,
    learn: Callable[[Batch, Experience, Tensor], dict[str, float]],
) -> dict[str, float]:
    """Add a minibatch's gradient to a model's, micro-batch by micro-batch. Returns its statistics.

    Losses are divided by the *minibatch's* tokens, so how it is cut changes no gradient.

    Args:
        learn: `actor_gradient` or `critic_gradient`, of a model.
    """
    measured: dict[str, float] = defaultdict(float)
    count = experience.mask[rows].sum()
    for micro in length_batches([episodes.lengths[row] for row in rows], micro_batch_tokens):
        picked = [rows[i] for i in micro]
        batch = episodes.batch(picked, experience.mask.device)
        add_to(measured, learn(batch, experience.tokens(picked), count))
    return dict(measured)


def actor_gradient(
    actor: Any, batch: Batch, part: Experience, count: Tensor, *, ppo: config.PPO, temperature: float
) -> dict[str, float]:
    """Add a micro-batch's gradient to the Actor's; `count` is the minibatch's tokens. Returns statistics."""
    measured = defaultdict[str, float](float)

    def loss_of(piece: slice, logprobs: Tensor, entropies: Tensor) -> Tensor:
        old, advantages, mask = (x[piece] for x in (part.old_logprobs, part.advantages, part.mask))
        result = actor_loss(logprobs, old, advantages, mask, ppo.clip, count=count, dual_clip=ppo.dual_clip)
        found = {
            "policy/loss": result.loss.item(),
            "policy/clip_fraction": result.clip_fraction.item(),
            "policy/approx_kl": result.approx_kl.item(),
            "policy/ratio_mean": result.ratio_mean.item(),
        }
        add_to(measured, found)
        return result.loss - ppo.entropy_coef * entropies.sum() / count if ppo.entropy_coef else result.loss

    states = states_before(actor, batch)
    learn_tokens(Head.of(actor), states, batch.tokens, temperature, loss_of, with_entropy=bool(ppo.entropy_coef))
    return dict(measured)


def critic_gradient(critic: Any, batch: Batch, part: Experience, count: Tensor, *, ppo: config.PPO) -> dict[str, float]:
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

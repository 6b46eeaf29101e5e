"""One PPO iteration, top to bottom: rollout, evaluation, experience, optimization.

An iteration is a pure function of the state before it: Actor, Critic, both optimizers, β. Every draw comes from a seed
derived from (run seed, iteration, purpose).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_tasks.data.batching import TokenRow
from rlhf_tasks.gradients import GradientMemory
from rlhf_tasks.ppo.experience import (
    Episodes,
    Evaluation,
    Experience,
    ScoreFunction,
    evaluate_episodes,
    make_experience,
)
from rlhf_tasks.ppo.functional import (
    AdaptiveKL,
    FixedKL,
    LengthControl,
    explained_variance,
    masked_mean,
    masked_var,
)
from rlhf_tasks.ppo.optimization import Learner, optimize
from rlhf_tasks.ppo.rollout import Sampling, distinct_bigrams, ended, sample_responses
from rlhf_tasks.seeds import permutation

if TYPE_CHECKING:
    from rlhf_tasks import config


@dataclass
class PPOState:
    """What an iteration changes."""

    actor: Learner
    critic: Learner
    kl_control: FixedKL | AdaptiveKL
    iteration: int = 0
    length_control: LengthControl | None = None  # with `ppo.missing_eos.mode: steer`
    gradient_memory: GradientMemory = field(default_factory=GradientMemory)


@dataclass(frozen=True)
class Fixed:
    """What stays as it is: the frozen models, the prompts, how responses are drawn and scored."""

    ref: Any
    reward: Any
    prompts: Sequence[TokenRow]
    sampling: Sampling
    score_statistics: tuple[float, float]
    score_function: ScoreFunction = field(default_factory=ScoreFunction)


def iterate(state: PPOState, fixed: Fixed, ppo: config.PPO, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Run the next iteration, changing `state` in place.

    Returns:
        Its metrics (docs/metrics.md), a function of the state alone, and its timings in seconds.
    """
    iteration, clock = state.iteration + 1, Clock()

    episodes = roll_out(state, fixed, ppo.batch, seed)
    clock.lap("rollout")

    evaluation = evaluate(state, fixed, ppo, episodes)
    clock.lap("evaluation")

    experience = experience_of(state, fixed, ppo, episodes, evaluation)
    clock.lap("experience")

    set_learning_rates(state, ppo)
    updates = optimize(
        episodes,
        experience,
        actor=state.actor,
        critic=state.critic,
        ppo=ppo,
        temperature=fixed.sampling.temperature,
        update_actor=iteration > ppo.critic_warmup,
        seed_names=(seed, "ppo", iteration),
        memory=state.gradient_memory,
    )
    clock.lap("optimization")

    metrics = rollout_metrics(episodes, experience, evaluation.raw_scores, state.kl_control.coef) | updates
    metrics["policy/learning_rate"] = state.actor.optimizer.param_groups[0]["lr"]
    if state.length_control:
        metrics["objective/cut_price"] = state.length_control.price
    if iteration > ppo.critic_warmup:  # while the Actor waits, its KL and length are SFT's: they say nothing of a price
        state.kl_control.update(metrics["objective/kl"], ppo.batch)
        if state.length_control:
            state.length_control.update(metrics["response/length"])
    state.iteration = iteration
    tokens = sum(len(response) for response in episodes.responses)
    return metrics, clock.seconds | {"response_tokens": float(tokens)}


def roll_out(state: PPOState, fixed: Fixed, batch: int, seed: int) -> Episodes:
    """Phase 1, rollout: the next iteration's first `batch` prompts, and the Actor's answer to each."""
    iteration = state.iteration + 1
    prompts = pick_prompts(fixed.prompts, batch, seed, iteration)
    drawn = sample_responses(state.actor.model, prompts, fixed.sampling, (seed, "ppo", iteration, "sampling"))
    return Episodes(prompts, drawn.responses, ended(drawn.responses, fixed.sampling.stop_ids), drawn)


def evaluate(state: PPOState, fixed: Fixed, ppo: config.PPO, episodes: Episodes) -> Evaluation:
    """Phase 2, evaluation: what the four models say of the episodes."""
    return evaluate_episodes(
        episodes,
        actor=state.actor.model,
        ref=fixed.ref,
        reward=fixed.reward,
        critic=state.critic.model,
        ppo=ppo,
        temperature=fixed.sampling.temperature,
    )


def experience_of(
    state: PPOState, fixed: Fixed, ppo: config.PPO, episodes: Episodes, evaluation: Evaluation
) -> Experience:
    """What phase 3 learns from."""
    return make_experience(
        episodes,
        evaluation,
        ppo,
        kl_coef=state.kl_control.coef,
        score_statistics=fixed.score_statistics,
        score_function=fixed.score_function,
        cut_price=state.length_control.price if state.length_control else None,
    )


def pick_prompts(prompts: Sequence[TokenRow], batch: int, seed: int, iteration: int) -> list[list[int]]:
    """The iteration's B prompts: every pass over the prompts has its own order, and no prompt twice."""
    first = (iteration - 1) * batch
    orders: dict[int, list[int]] = {}
    picked = []
    for place in range(first, first + batch):
        epoch, i = divmod(place, len(prompts))
        if epoch not in orders:
            orders[epoch] = permutation(len(prompts), seed, "ppo", "prompts", epoch)
        picked.append(list(prompts[orders[epoch][i]]))
    return picked


def set_learning_rates(state: PPOState, ppo: config.PPO) -> None:
    """The schedule's rates for the next iteration. Its length is its own: extending a run changes no past iteration."""
    factor = schedule_factor(ppo.schedule.kind, state.iteration, ppo.schedule.total)
    for learner, rate in ((state.actor, ppo.actor_learning_rate), (state.critic, ppo.critic_learning_rate)):
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * factor


def schedule_factor(kind: str, done: int, total: int | None) -> float:
    """1 at the start; `linear` and `cosine` fall to 0 after `total` iterations."""
    if kind == "constant" or total is None:
        return 1.0
    left = max(0.0, 1 - done / total)
    return left if kind == "linear" else (1 - math.cos(math.pi * left)) / 2


def rollout_metrics(episodes: Episodes, experience: Experience, raw_scores: Tensor, kl_coef: float) -> dict[str, float]:
    """Statistics of the rollout and its experience, before any update (docs/metrics.md)."""
    x, mask = experience, experience.mask
    kl = torch.where(mask.bool(), x.old_logprobs - x.ref_logprobs, 0.0)
    counted = mask.bool()
    lengths = mask.sum(1).float()
    stopped = torch.tensor(episodes.ended).float().mean()
    raw = x.raw_advantages[counted]
    total_reward = torch.where(counted, x.rewards, 0.0).sum(1)
    numbers = {
        "objective/score": raw_scores.mean(),
        "objective/score_std": raw_scores.std(unbiased=False),
        "objective/score_min": raw_scores.min(),
        "objective/score_max": raw_scores.max(),
        "objective/shaped_score": x.scores.mean(),
        "objective/kl": kl.sum(1).mean(),
        "objective/kl_per_token": masked_mean(kl, mask),
        "objective/non_score_reward": (total_reward - x.scores).mean(),
        "objective/rlhf_reward": total_reward.mean(),
        "objective/entropy": masked_mean(x.entropy, mask),
        "advantage/mean": raw.mean(),
        "advantage/std": raw.std(unbiased=False),
        "advantage/min": raw.min(),
        "advantage/max": raw.max(),
        "advantage/used_mean": masked_mean(x.advantages, mask),
        "advantage/used_std": masked_var(x.advantages, mask, unbiased=False).sqrt(),
        "advantage/explained_variance": explained_variance(x.old_values, x.returns, mask),
        "value/mean": masked_mean(x.old_values, mask),
        "value/return_mean": masked_mean(x.returns, mask),
        "value/return_std": masked_var(x.returns, mask, unbiased=False).sqrt(),
        "response/length": lengths.mean(),
        "response/length_std": lengths.std(unbiased=False),
        "response/length_min": lengths.min(),
        "response/length_max": lengths.max(),
        "response/eos_rate": stopped,
        "response/truncation_rate": 1 - stopped,
        "response/distinct_bigrams": torch.tensor(distinct_bigrams(episodes.responses)),
    }
    return {name: float(number) for name, number in numbers.items()} | {"objective/kl_coef": kl_coef}


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{phase}_seconds"] = now - self._last
        self._last = now

"""The very prompts and draws of the first PPO iteration, which the checks of models look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_tasks.config import Params
from rlhf_tasks.data.batching import Batch
from rlhf_tasks.models import load_tokenizer
from rlhf_tasks.ppo.experience import Episodes, Experience, per_token, policy_measures
from rlhf_tasks.ppo.iteration import evaluate, experience_of, roll_out
from rlhf_tasks.ppo_stage import Trainer

EPISODES = 32


@dataclass(frozen=True)
class FirstBatch:
    """The four models before the first update, and what they make of the first prompts."""

    params: Params
    trainer: Trainer
    tokenizer: Any
    episodes: Episodes
    experience: Experience
    raw_scores: Tensor  # [B], the Reward's own

    @classmethod
    def load(cls, root: Path, params: Params) -> FirstBatch:
        """From the SFT and Reward checkpoints of the workspace, whatever the Actor has learned since."""
        trainer = Trainer.load(
            seed=params.seed,
            runtime=params.runtime,
            generation=params.generation,
            reward_function=params.reward_function,
            ppo=params.ppo,
            prompts=root / "data/prepared/prompts",
            sft=root / "checkpoints/sft",
            reward=root / "checkpoints/reward",
            parent=None,
        )
        state, fixed = trainer.state, trainer.fixed
        count = min(EPISODES, params.ppo.batch, len(fixed.prompts))
        episodes = roll_out(state, fixed, count, params.seed)
        evaluation = evaluate(state, fixed, params.ppo, episodes)
        experience = experience_of(state, fixed, params.ppo, episodes, evaluation)
        tokenizer = load_tokenizer(root / "checkpoints/sft")
        return cls(params, trainer, tokenizer, episodes, experience, evaluation.raw_scores)

    def logprobs(self, micro_batch_tokens: int) -> Tensor:
        """The Actor's own, `[B, T]`, by whole passes over micro-batches of this size: nothing is taken as known."""

        def measure(batch: Batch) -> tuple[Tensor, ...]:
            return policy_measures(self.actor, batch, self.params.generation.temperature)

        return self.over(measure, replace(self.episodes, drawn=None), micro_batch_tokens)

    def over(self, measure: Callable[[Batch], tuple[Tensor, ...]], episodes: Episodes, tokens: int) -> Tensor:
        """The first of what `measure` gives for every response token, `[B, T]`."""
        return per_token(measure, episodes, tokens, self.experience.mask.device)[0]

    @property
    def actor(self) -> Any:
        return self.trainer.state.actor.model

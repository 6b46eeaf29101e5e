"""The ppo stage: folders in, folders out, around the iterations of `rlhf_tasks/ppo`.

An iteration is a task of its own: it starts from the state that its parent left and leaves the next. Between tasks of
one process the live state stays in memory, known by its digest, so nothing is read back that is still there.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.errors import UserError
from rlhf_tasks.models import (
    freeze,
    load_actor,
    load_score_statistics,
    load_scorer,
    load_sft_length,
    load_tokenizer,
    new_scorer,
    save_model,
    set_up_torch,
    stop_ids,
)
from rlhf_tasks.ppo.experience import ScoreFunction
from rlhf_tasks.ppo.functional import AdaptiveKL, FixedKL, LengthControl
from rlhf_tasks.ppo.iteration import Fixed, PPOState, iterate
from rlhf_tasks.ppo.optimization import Learner
from rlhf_tasks.ppo.rollout import Sampling
from rlhf_tasks.reward_function import load_reward_function
from rlhf_tasks.training import (
    DAMAGE,
    adamw,
    learned_tensors,
    load_learned_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
)
from rlhf_tasks.trunk import freeze_trunk, learning, same_trunk, share_trunk

if TYPE_CHECKING:
    from rlhf_tasks import config


log = logging.getLogger(__name__)


class BadState(RuntimeError):
    """What lies in a parent's folder is no state of these models: somebody else's, since its digests are right."""


@dataclass
class Trainer:
    """The four models in memory, and everything an iteration needs."""

    state: PPOState
    fixed: Fixed
    ppo: config.PPO
    seed: int

    @classmethod
    def load(
        cls,
        *,
        seed: int,
        runtime: config.Runtime,
        generation: config.Generation,
        reward_function: config.RewardFunction,
        ppo: config.PPO,
        prompts: Path,
        sft: Path,
        reward: Path,
        parent: Path | None,
    ) -> Trainer:
        """From an iteration's saved state (`parent`), or, before the first, from the SFT and Reward checkpoints.

        Raises:
            BadState: the parent's files are not a state of these models.
        """
        warn_of_bias(generation, ppo)
        device, tokenizer = set_up_torch(runtime), load_tokenizer(sft)
        actor = _cut(load_actor(sft, device), ppo)
        ref = _on_trunk_of(actor, load_actor(sft, device), ppo)
        scorer = _on_trunk_of(actor, load_scorer(reward, device), ppo)
        if ppo.critic_start == "reward":
            critic = load_scorer(reward, device)
        else:
            critic = new_scorer(sft, tokenizer, seed, "critic", device)
        critic = _on_trunk_of(actor, critic, ppo)
        state = PPOState(
            actor=Learner(actor, adamw(learning(actor).values(), ppo.actor_learning_rate)),
            critic=Learner(critic, adamw(learning(critic).values(), ppo.critic_learning_rate)),
            kl_control=FixedKL(ppo.kl.coef)
            if ppo.kl.controller == "fixed"
            else AdaptiveKL(ppo.kl.coef, ppo.kl.target, ppo.kl.horizon),
            length_control=LengthControl(ppo.missing_eos.value, ppo.missing_eos.rate, load_sft_length(reward))
            if ppo.missing_eos.mode == "steer"
            else None,
        )
        fixed = Fixed(
            ref=freeze(ref),
            reward=freeze(scorer),
            prompts=TokenColumn(read_table(prompts / "train.arrow", ["input_ids"]), "input_ids"),
            sampling=Sampling.of(generation, stop_ids(actor, tokenizer, generation.stop)),
            score_statistics=load_score_statistics(reward),
            score_function=ScoreFunction(
                load_reward_function(reward_function, tokenizer), reward_function.weight, reward_function.instead
            ),
        )
        if parent:
            try:
                load_state(parent, state)
            except DAMAGE as error:
                raise BadState(str(error)) from error
        return cls(state, fixed, ppo, seed)

    def step(self) -> tuple[dict[str, float], dict[str, float]]:
        """Run the next iteration. Returns its metrics and its timings in seconds."""
        return iterate(self.state, self.fixed, self.ppo, self.seed)

    def save(self, out: Path) -> None:
        """Write the state that the iteration left."""
        save_state(out, self.state)


def _cut(model: Any, ppo: config.PPO) -> Any:
    """The model, with all below its top layers frozen if the settings say so."""
    return freeze_trunk(model, ppo.trainable_layers, "ppo.trainable_layers") if ppo.trainable_layers else model


def _on_trunk_of(actor: Any, model: Any, ppo: config.PPO) -> Any:
    """The model, cut, and with the Actor's trunk in place of its own.

    Raises:
        UserError: its own is another.
    """
    _cut(model, ppo)
    if not same_trunk(model, actor):
        raise UserError(
            f"ppo.trainable_layers: found {ppo.trainable_layers}, but the Reward has learned below its top "
            f"{ppo.trainable_layers} layers; train it with a `reward.trainable_layers` of at most as many"
        )
    share_trunk(model, actor)
    return model


def warn_of_bias(generation: config.Generation, ppo: config.PPO) -> None:
    """Say of settings that exist for parity with peers what they do to PPO."""
    if generation.top_k is not None or generation.top_p is not None:
        log.warning("generation.top_k or top_p is on: what is sampled is not what PPO's ratios and KL are of")
    if ppo.kl.estimator != "k1":
        log.warning(
            "ppo.kl.estimator: the policy gradient of %s in the reward is not the KL's; k1's is", ppo.kl.estimator
        )


def save_state(out: Path, state: PPOState) -> None:
    """Write Actor and Critic, but for a trunk that is SFT's, both optimizers, β, the price of a cut and the counter:
    safetensors and JSON only.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, learner in (("actor", state.actor), ("critic", state.critic)):
        save_file(learned_tensors(learner.model), out / f"{name}.safetensors")
        save_file(optimizer_tensors(learner.optimizer), out / f"{name}_optimizer.safetensors")
    facts: dict[str, Any] = {"iteration": state.iteration, "kl_coef": state.kl_control.coef}
    if control := state.length_control:
        facts |= {"length_control": {"price": control.price, "slow": control.slow}}
    (out / "state.json").write_text(json.dumps(facts))


def load_state(folder: Path, state: PPOState) -> None:
    """Put back what `save_state` wrote."""
    for name, learner in (("actor", state.actor), ("critic", state.critic)):
        load_learned_tensors(learner.model, load_file(folder / f"{name}.safetensors"))
        load_optimizer_tensors(learner.optimizer, load_file(folder / f"{name}_optimizer.safetensors"))
    facts = json.loads((folder / "state.json").read_text())
    state.iteration, state.kl_control.coef = facts["iteration"], facts["kl_coef"]
    if state.length_control:
        state.length_control = replace(state.length_control, **facts["length_control"])


def run(*, seed: int, ppo: config.PPO, state: Path, sft: Path, last: dict[str, float], out: Path) -> dict[str, float]:
    """Make the stage's result from the last iteration's state: `actor/`, `critic/` and `metrics.json` in `out`.

    Raises:
        BadState: the files are not a state of these models.
    """
    tokenizer, cpu = load_tokenizer(sft), torch.device("cpu")
    models = {"actor": load_actor(sft, cpu), "critic": new_scorer(sft, tokenizer, seed, "critic", cpu)}
    for name, model in models.items():
        try:
            load_learned_tensors(_cut(model, ppo), load_file(state / f"{name}.safetensors"))
        except DAMAGE as error:
            raise BadState(str(error)) from error
        save_model(model, out / name, tokenizer)
    (out / "metrics.json").write_text(json.dumps(last, indent=1))
    return last

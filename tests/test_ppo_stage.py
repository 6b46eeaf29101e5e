"""The state between two PPO iterations: what is written is all there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf_tasks import config
from rlhf_tasks.ppo_stage import Trainer


def load(finished: Any, ppo: config.PPO, parent: Path | None) -> Trainer:
    root, params = finished.workspace.root, finished.workspace.params
    return Trainer.load(
        seed=0,
        runtime=params.runtime,
        generation=params.generation,
        reward_function=params.reward_function,
        ppo=ppo,
        prompts=root / "data/prepared/prompts",
        sft=root / "checkpoints/sft",
        reward=root / "checkpoints/reward",
        parent=parent,
    )


def test_an_iteration_from_disk_is_the_one_from_memory(finished: Any, tmp_path: Path) -> None:
    """Every option that has a state of its own is on."""
    ppo = finished.workspace.params.ppo.model_copy(
        update={
            "kl": config.KL(controller="adaptive", target=0.1, horizon=100),
            "missing_eos": config.MissingEOS(mode="steer", value=0.1, rate=3.0),
        }
    )
    trainer = load(finished, ppo, None)
    for _ in (1, 2):
        trainer.step()
    trainer.save(tmp_path / "2")
    again = load(finished, ppo, tmp_path / "2")
    assert again.state.iteration == 2
    assert again.state.kl_control == trainer.state.kl_control
    assert again.state.length_control == trainer.state.length_control
    assert again.state.length_control is not None
    assert again.state.length_control.slow != 0.1
    expected, found = trainer.step()[0], again.step()[0]
    assert found == expected
    for name in ("actor", "critic"):
        one, other = (getattr(t.state, name).model.state_dict() for t in (trainer, again))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_critic_starts_from_what_it_is_told(finished: Any) -> None:
    reward, sft = (
        load(finished, config.PPO(critic_start=start), None).state.critic.model for start in ("reward", "sft")
    )
    trained = load(finished, config.PPO(), None).fixed.reward
    assert torch.equal(reward.score.weight, trained.score.weight)
    assert not torch.equal(sft.score.weight, trained.score.weight)

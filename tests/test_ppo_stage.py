"""The state between two PPO iterations: what is written is all there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_tasks import config
from rlhf_tasks.ppo.functional import AdaptiveKL, FixedKL
from rlhf_tasks.ppo_stage import Trainer


def load(finished: Any, ppo: config.PPO, parent: Path | None, function: config.RewardFunction | None = None) -> Trainer:
    root, params = finished.workspace.root, finished.workspace.params
    return Trainer.load(
        seed=0,
        runtime=params.runtime,
        generation=params.generation,
        reward_function=function or params.reward_function,
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


def test_beta_is_steered_as_configured(finished: Any) -> None:
    fixed = config.KL(coef=0.3, target=4.0, horizon=500)
    adaptive = fixed.model_copy(update={"controller": "adaptive"})
    made = [load(finished, config.PPO(kl=kl), None).state.kl_control for kl in (fixed, adaptive)]
    assert made == [FixedKL(0.3), AdaptiveKL(0.3, target=4.0, horizon=500)]


@pytest.mark.parametrize("instead", [True, False])
def test_a_reward_function_is_what_is_trained_on(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instead: bool
) -> None:
    (tmp_path / "always_two.py").write_text("def score(prompts, responses):\n    return [2.0] * len(responses)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ppo = finished.workspace.params.ppo.model_copy(update={"missing_eos": config.MissingEOS(mode="keep")})
    without, _ = load(finished, ppo, None).step()
    function = config.RewardFunction(name="always_two:score", weight=0.5, instead=instead)
    found, _ = load(finished, ppo, None, function).step()
    expected = 1.0 if instead else without["objective/shaped_score"] + 1.0
    assert found["objective/shaped_score"] == pytest.approx(expected, abs=1e-5)
    rewarded = found["objective/rlhf_reward"] - found["objective/non_score_reward"]
    assert rewarded == pytest.approx(expected, abs=1e-5)

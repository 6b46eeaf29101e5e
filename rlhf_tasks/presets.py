"""Known conventions of PPO-RLHF by name: what `rlhf preset NAME` writes into params.yaml.

A preset sets what changes the algorithm, not what depends on the model or the machine: learning rates, their schedule,
batch, lengths, temperature, gradient clipping, what the Critic starts from. docs/presets.md has the table, its sources,
and what differs from them whatever is set.
"""

from __future__ import annotations

from typing import Any

from rlhf_tasks.errors import UserError

_SHARED: dict[str, Any] = {
    "ppo.epochs": 4,
    "ppo.minibatches": 1,
    "ppo.gamma": 1.0,
    "ppo.lam": 0.95,
    "ppo.clip": 0.2,
    "ppo.value_clip": 0.2,
    "ppo.dual_clip": None,
    "ppo.entropy_coef": 0.0,
    "ppo.whiten_advantages": True,
    "ppo.target_kl": None,
    "ppo.critic_warmup": 0,
    "ppo.kl.estimator": "k1",
    "ppo.score.clip": None,
}

PRESETS: dict[str, dict[str, Any]] = {
    # openai/lm-human-preferences 1ab856d, launch.py `sentiment` and the defaults of train_policy.py
    "ziegler2019": _SHARED
    | {
        "ppo.whiten_rewards": True,
        "ppo.kl.controller": "adaptive",
        "ppo.kl.coef": 0.15,
        "ppo.kl.target": 6.0,
        "ppo.kl.horizon": 10000,
        "ppo.score.kind": "normalised",
        "ppo.missing_eos.mode": "replace",
        "ppo.missing_eos.value": -1.0,
    },
    # vwxyzjn/summarize_from_feedback_details 05dfca1, defaults of ppo_left_padding.py (Huang et al. 2024)
    "tldr": _SHARED
    | {
        "ppo.whiten_rewards": True,
        "ppo.kl.controller": "fixed",
        "ppo.kl.coef": 0.05,
        "ppo.score.kind": "normalised",
        "ppo.missing_eos.mode": "replace",
        "ppo.missing_eos.value": -1.0,
    },
    # huggingface/trl, defaults of PPOv2Config (0.11.4), which became PPOConfig (to 1.12)
    "trl": _SHARED
    | {
        "ppo.whiten_rewards": False,
        "ppo.kl.controller": "fixed",
        "ppo.kl.coef": 0.05,
        "ppo.score.kind": "raw",
        "ppo.missing_eos.mode": "keep",
        "ppo.missing_eos.value": 0.0,
    },
}


def preset_values(name: str) -> dict[str, Any]:
    """The values of a preset, by dotted key.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"preset: found {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]

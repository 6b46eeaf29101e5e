"""`rlhf doctor`: what can be known of a run before hours are spent on it, from params.yaml and the checkpoints.

Each check is a function that returns a finding: ok, or what to change. Those that need a model load the checkpoints of
the workspace and look at the very prompts and draws of the first PPO iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_tasks.config import Params
from rlhf_tasks.doctor import configuration, models, reward, tokenizers
from rlhf_tasks.doctor.finding import Finding
from rlhf_tasks.doctor.first_batch import FirstBatch
from rlhf_tasks.errors import UserError

_BEFORE_MODELS: dict[str, Callable[[Path, Params], Finding]] = {
    "sampling": configuration.sampling,
    "KL estimator": configuration.estimator,
    "KL coefficient": configuration.coefficient,
    "schedule": configuration.schedule,
    "device": configuration.device,
    "learning rates": configuration.rates,
    "evaluation": configuration.evaluation_prompts,
    "reward function": configuration.reward_function,
    "checkpoints": configuration.checkpoints,
    "lengths": configuration.lengths,
    "pad and EOS": tokenizers.pad_and_eos,
    "template": tokenizers.template,
    "one tokenizer": tokenizers.one_tokenizer,
}
_OF_MODELS: dict[str, Callable[[Path, FirstBatch], Finding]] = {
    "prompts": models.prompts,
    "disk": models.disk,
    "stop tokens": models.stop_tokens,
    "dropout": models.dropout,
    "rollout": models.decoding,
    "neighbours": models.neighbours,
    "order": models.order,
    "reference": models.reference,
    "first step": models.first_step,
    "rewards": models.reward_sum,
    "returns": models.returns,
    "advantages": models.advantages,
    "micro-batches": models.micro_batches,
    "values": models.value_and_action,
    "reward sign": reward.sign,
    "reward place": reward.place,
    "reward scale": reward.scale,
    "reward spread": reward.spread,
}


def examine(root: Path, params: Params) -> Iterator[Finding]:
    """Every finding, as soon as it is there: of the configuration, the tokenizers, the models, the Reward."""
    fit = True
    for name, check in _BEFORE_MODELS.items():
        finding = _found(name, check, root, params)
        fit = fit and not (name in ("checkpoints", "lengths") and finding.ok is False)
        yield finding
    if not all((root / f"checkpoints/{stage}/config.json").exists() for stage in ("sft", "reward")):
        yield Finding("models", None, "no checkpoints yet: `rlhf run --until reward`, then ask again")
        return
    if not fit:
        yield Finding("models", None, "not looked at: mend the above first")
        return
    try:
        batch = FirstBatch.load(root, params)
    except Exception as error:  # whatever damaged files make their readers raise
        yield Finding("models", False, _told(error))
        return
    for name, look in _OF_MODELS.items():
        yield _found(name, look, root, batch)


def _found(name: str, check: Callable[[Path, Any], Finding], root: Path, subject: Any) -> Finding:
    """What a check finds; that it cannot look is a finding too."""
    try:
        return check(root, subject)
    except Exception as error:
        return Finding(name, False, _told(error))


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:200]}; `rlhf run` makes it again"

"""The pipeline as a table: six stages, what each reads and what each leaves.

Keys, `dvc.yaml`, the flows and `rlhf status` are all made from this one table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rlhf_tasks.errors import UserError

LINEAGE = "lineage.json"


@dataclass(frozen=True, eq=False)
class Stage:
    """One step from human feedback to a registered Actor.

    Attributes:
        module: where the stage's `run` is; its import closure is in the stage's key.
        sections: dotted keys of params.yaml that it reads, and nothing else of params.yaml.
        inputs: argument of `run` -> workspace path of an earlier stage's out.
        outs: name in the stage's result -> workspace path; all have `metrics.json`, and `lineage.json` with everything
            that the result depends on.
        libraries: installed distributions whose version changes the result.
    """

    name: str
    module: str
    sections: tuple[str, ...]
    inputs: Mapping[str, str]
    outs: Mapping[str, str]
    libraries: tuple[str, ...]

    @property
    def metrics(self) -> str:
        return self.outs["metrics.json"]

    @property
    def lineage(self) -> str:
        return self.outs[LINEAGE]


_TRAINING = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_SFT_DATA, _PAIRS, _PROMPTS = "data/prepared/sft", "data/prepared/pairs", "data/prepared/prompts"
_TOKENIZER = "data/prepared/tokenizer"
_SFT, _REWARD, _ACTOR, _CRITIC = "checkpoints/sft", "checkpoints/reward", "checkpoints/actor", "checkpoints/critic"


def _stage(
    name: str, module: str, sections: str, inputs: dict[str, str], outs: dict[str, str], libraries: tuple[str, ...]
) -> Stage:
    outs = outs | {"metrics.json": f"metrics/{name}.json", LINEAGE: f"lineage/{name}.json"}
    return Stage(name, module, tuple(sections.split()), MappingProxyType(inputs), MappingProxyType(outs), libraries)


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        stage.name: stage
        for stage in (
            _stage(
                "prepare",
                "rlhf_tasks.data.prepare",
                "seed data model",
                {},
                {"sft": _SFT_DATA, "pairs": _PAIRS, "prompts": _PROMPTS, "tokenizer": _TOKENIZER},
                ("tokenizers", "transformers", "pyarrow", "numpy"),
            ),
            _stage(
                "sft",
                "rlhf_tasks.sft",
                "seed runtime model sft",
                {"sft_data": _SFT_DATA, "tokenizer": _TOKENIZER},
                {"checkpoint": _SFT, "curve.csv": "plots/sft.csv"},
                _TRAINING,
            ),
            _stage(
                "reward",
                "rlhf_tasks.reward",
                "seed runtime generation reward",
                {"pairs": _PAIRS, "prompts": _PROMPTS, "sft": _SFT},
                {"checkpoint": _REWARD, "curve.csv": "plots/reward.csv"},
                _TRAINING,
            ),
            _stage(
                "ppo",
                "rlhf_tasks.ppo_stage",
                "seed runtime generation reward_function ppo",
                {"prompts": _PROMPTS, "sft": _SFT, "reward": _REWARD},
                {"actor": _ACTOR, "critic": _CRITIC, "curve.csv": "plots/ppo.csv"},
                _TRAINING,
            ),
            _stage(
                "evaluate",
                "rlhf_tasks.evaluate",
                "seed runtime generation reward_function evaluate",
                {"prompts": _PROMPTS, "sft": _SFT, "reward": _REWARD, "actor": _ACTOR},
                {"samples.jsonl": "samples/evaluate.jsonl"},
                (*_TRAINING, "vaderSentiment"),
            ),
            _stage(
                "register",
                "rlhf_tasks.registry",
                "register",
                {"actor": _ACTOR, "evaluation": "metrics/evaluate.json"},
                {},
                ("mlflow",),
            ),
        )
    }
)


def producer(path: str) -> Stage:
    """The stage that leaves the workspace path."""
    return next(stage for stage in STAGES.values() if path in stage.outs.values())


def stages_between(start: str, until: str) -> list[Stage]:
    """The stages from one to another, both included.

    Raises:
        UserError: a name is no stage's, or `until` comes before `start`.
    """
    names = list(STAGES)
    for name in (start, until):
        if name not in names:
            raise UserError(f"stage: found {name!r}, expected one of {', '.join(names)}")
    chosen = names[names.index(start) : names.index(until) + 1]
    if not chosen:
        raise UserError(f"stages: {until} comes before {start}; swap them")
    return [STAGES[name] for name in chosen]

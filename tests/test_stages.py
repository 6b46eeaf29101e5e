"""The table of stages agrees with itself, with the code of the stages, with params.yaml and with dvc.yaml."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rlhf_tasks.closure import import_closure
from rlhf_tasks.config import Section, load_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.stages import STAGES, Stage, producer, stages_between
from rlhf_tasks.versioning import pipeline_yaml, update_pipeline

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ["prepare", "sft", "reward", "ppo", "evaluate", "register"]
PARAMS = load_params(REPOSITORY / "params.yaml")


@pytest.fixture(params=NAMES)
def stage(request: pytest.FixtureRequest) -> Stage:
    return STAGES[request.param]


def test_the_stages_stand_in_order() -> None:
    assert list(STAGES) == NAMES


def arguments(stage: Stage) -> set[str]:
    return {"register_" if name == "register" else name for name in stage.sections} | set(stage.inputs)


def test_a_stage_takes_what_the_table_says(stage: Stage) -> None:
    """What `run` cannot take it cannot read; what it takes is in its key."""
    module = importlib.import_module(stage.module)
    if stage.name == "ppo":
        load = set(inspect.signature(module.Trainer.load).parameters)
        assert load == arguments(stage) | {"parent"}
        taken = set(inspect.signature(module.run).parameters)
        assert taken - {"state", "last", "out"} <= arguments(stage)
        return
    taken = set(inspect.signature(module.run).parameters)
    assert taken - {"partial", "progress"} == arguments(stage) | {"out"}


def test_every_section_is_one_of_params_yaml(stage: Stage) -> None:
    for name in stage.sections:
        assert isinstance(PARAMS.section(name), Section | int)


def test_every_input_is_an_out_of_an_earlier_stage(stage: Stage) -> None:
    for path in stage.inputs.values():
        assert NAMES.index(producer(path).name) < NAMES.index(stage.name)


def test_no_two_outs_overlap() -> None:
    paths = [Path(path) for stage in STAGES.values() for path in stage.outs.values()]
    assert len(set(paths)) == len(paths)
    assert not any(a in b.parents for a in paths for b in paths)
    assert all(stage.outs["metrics.json"] == stage.metrics == f"metrics/{stage.name}.json" for stage in STAGES.values())


def test_dvc_yaml_is_what_the_table_generates() -> None:
    assert (REPOSITORY / "dvc.yaml").read_text() == pipeline_yaml(REPOSITORY, PARAMS), "run `make dvc.yaml`"


def test_the_pipeline_names_everything_that_a_stage_reads(stage: Stage) -> None:
    entry = YAML(typ="safe").load(pipeline_yaml(REPOSITORY, PARAMS))["stages"][stage.name]
    assert set(import_closure(stage.module)) | set(stage.inputs.values()) <= set(entry["deps"])
    assert entry["params"] == list(stage.sections)
    assert entry["outs"] == list(stage.outs.values())
    assert all((REPOSITORY / path).exists() for path in entry["deps"] if path not in stage.inputs.values())
    assert ("data/raw/movie_reviews.jsonl.gz" in entry["deps"]) is (stage.name == "prepare")


def test_the_pipeline_is_written_when_it_changed(tmp_path: Path) -> None:
    assert update_pipeline(tmp_path, PARAMS)
    assert not update_pipeline(tmp_path, PARAMS)
    moved = PARAMS.model_copy(update={"model": PARAMS.model.model_copy(update={"base": "models/mine"})})
    assert update_pipeline(tmp_path, moved)
    entries = YAML(typ="safe").load((tmp_path / "dvc.yaml").read_text())["stages"]
    assert [name for name in NAMES if "models/mine" in entries[name]["deps"]] == ["prepare", "sft"]


def test_a_part_of_the_pipeline_is_named_by_its_ends() -> None:
    assert [stage.name for stage in stages_between("sft", "ppo")] == ["sft", "reward", "ppo"]
    assert [stage.name for stage in stages_between("register", "register")] == ["register"]
    assert [stage.name for stage in stages_between("prepare", "register")] == NAMES


@pytest.mark.parametrize(
    ("start", "until", "said"),
    [
        ("ppo", "sft", "sft comes before ppo"),
        ("pp0", "register", "'pp0'"),
        ("prepare", "end", "'end', expected one of"),
    ],
)
def test_ends_that_make_no_pipeline_are_refused(start: str, until: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        stages_between(start, until)

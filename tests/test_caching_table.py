"""docs/caching.md's table of what reruns when, row by row, against the keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from changes import stage_keys, with_params

from rlhf_tasks import closure, keying
from rlhf_tasks.closure import import_closure
from rlhf_tasks.config import Params
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parent.parent
CHANGES = {
    "seed": "seed=1",
    "runtime": "runtime.threads=2",
    "data": "data.ratings.min_gap=2",
    "model": "model.scratch.layers=1",
    "generation": "generation.temperature=0.5",
    "sft": "sft.epochs=2",
    "reward": "reward.center=0.1",
    "reward_function": "reward_function.weight=0.5",
    "ppo": "ppo.kl.coef=0.1",
    "evaluate": "evaluate.bootstrap=300",
    "register": "register.gate.max_kl=3",
    "saving": "saving.iterations_per_task=auto",
    "tracking": "tracking.when_down=continue",
}


FUNCTION = "the file of `reward_function.name`, one that it imports, the version of a library that they import"


def rows() -> Iterator[tuple[str, set[str]]]:
    section = (REPOSITORY / "docs/caching.md").read_text().split("\n## ")[1]
    for change, stages in re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE):
        if change not in ("you change", "---"):
            yield change, set() if stages == "nothing" else set(stages.split(", "))


TABLE = dict(rows())
PARAMETERS = {change.strip("`"): stages for change, stages in TABLE.items() if change.strip("`") in CHANGES}
FILES = {file: stages for change, stages in TABLE.items() for file in re.findall(r"`(rlhf_tasks/\S+\.py)`", change)}
LIBRARIES = {
    name: stages for change, stages in TABLE.items() if re.fullmatch(r"[\w, ]+", change) for name in change.split(", ")
}


def test_the_table_has_every_group_of_parameters() -> None:
    groups = {("register" if name == "register_" else name) for name in Params.model_fields}
    assert set(PARAMETERS) == groups == set(CHANGES)


@pytest.mark.parametrize("group", CHANGES)
def test_a_group_of_parameters(sketch: Workspace, group: str) -> None:
    before = stage_keys(sketch)
    assert keying.differing(before, stage_keys(with_params(sketch, CHANGES[group]))) == PARAMETERS[group]


def test_every_module() -> None:
    found = {
        file: {name for name, stage in STAGES.items() if file in import_closure(stage.module)}
        for path in (REPOSITORY / "rlhf_tasks").rglob("*.py")
        if (file := path.relative_to(REPOSITORY).as_posix())
    }
    others = {
        file: TABLE[f"any other file of `rlhf_tasks/{'data/' if '/data/' in file else ''}`"]
        for file in found
        if file not in FILES
    }
    assert found == FILES | others


def test_what_orchestrates_is_in_no_key(sketch: Workspace) -> None:
    jobs = [keying.plan(sketch, stage) for stage in STAGES.values()]
    runs_again = {job.stage for job in jobs if any(file.startswith("flows/") for file in job.identity["code"])}
    assert runs_again == TABLE["any file of `flows/`"]


def test_python_itself(sketch: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage_keys(sketch)
    monkeypatch.setattr(keying.platform, "python_version_tuple", lambda: ("3", "99", "0"))
    keying._environment.cache_clear()
    assert keying.differing(before, stage_keys(sketch)) == TABLE["Python (3.11, 3.12, ...)"]
    keying._environment.cache_clear()


def test_every_library(sketch: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = stage_keys(sketch), keying.version
    assert set().union(*(stage.libraries for stage in STAGES.values())) <= set(LIBRARIES)
    for library, stages in LIBRARIES.items():
        with monkeypatch.context() as installed:
            installed.setattr(keying, "version", lambda name, new=library: "0" if name == new else version(name))
            keying._environment.cache_clear()
            assert keying.differing(before, stage_keys(sketch)) == stages, library
    keying._environment.cache_clear()


def test_files_from_outside(sketch: Workspace, write_model: Callable[[Path], None]) -> None:
    root = sketch.root
    (root / "helper.py").write_text("WORDS = 1\n")
    (root / "mine.py").write_text("import helper\n\ndef score(prompts, responses):\n    return [0.0] * len(prompts)\n")
    write_model(root / "base")
    project = with_params(sketch, "reward_function.name=mine:score", "model.base=base")
    for change, file in {
        "a file of `data.sources`, or a new one in its folder or pattern": "data/raw/ratings.jsonl",
        "a file of `model.base`": "base/config.json",
        FUNCTION: "helper.py",
    }.items():
        before = stage_keys(project)
        with (root / file).open("a") as text:
            text.write("\n")
        assert keying.differing(before, stage_keys(project)) == TABLE[change], change


def test_a_library_of_a_reward_function(sketch: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no stage imports itself: it is looked for in the function's file and in what that imports."""
    (sketch.root / "helper.py").write_text("from pytest import approx\n")
    (sketch.root / "mine.py").write_text("import helper, json\n\ndef score(prompts, responses):\n    return []\n")
    project = with_params(sketch, "reward_function.name=mine:score")
    job = keying.plan(project, STAGES["ppo"])
    assert job.identity["environment"]["pytest"] == pytest.__version__
    before = stage_keys(project)
    monkeypatch.setattr(closure, "version", lambda name: "0")
    assert keying.differing(before, stage_keys(project)) == TABLE[FUNCTION]

"""What `rlhf gc` offers, in a project whose entries are stand-ins."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from rlhf_tasks import chain, gc, keying
from rlhf_tasks.keying import Job
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace

pytestmark = pytest.mark.usefixtures("own_mlflow")


def store(workspace: Workspace, *jobs: Job) -> None:
    for job in jobs:
        with workspace.store.writing(job.key) as out:
            (out / "metrics.json").write_text("{}")
            workspace.store.commit(job.key, out, job.identity, metrics={}, series=[], perf={})


def offered(workspace: Workspace) -> set[str]:
    return {item.folder.name for item in gc.unneeded(workspace)}


def foreign(job: Job, **changes: Any) -> Job:
    """The same stage's job of something else."""
    return Job.of(job.identity | {"code": {"other.py": "0"}} | changes)


def test_what_the_next_run_looks_for_stays(sketch: Workspace) -> None:
    sft = keying.plan(sketch, STAGES["sft"])
    store(sketch, sft, foreign(sft), *chain.plan(sketch))
    assert offered(sketch) == {foreign(sft).key}
    assert not (sketch.root / "mlflow.db").exists(), "asking makes no database"


def test_asking_makes_no_database_elsewhere_either(sketch: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{sketch.root}/other.db")
    assert offered(sketch) == set()
    assert not (sketch.root / "other.db").exists()


def test_what_cannot_be_planned_now_stays(sketch: Workspace) -> None:
    """Without the Reward nobody knows the keys of PPO's iterations; SFT's are known."""
    sft, iterations = keying.plan(sketch, STAGES["sft"]), chain.plan(sketch)
    store(sketch, foreign(sft), foreign(keying.plan(sketch, STAGES["ppo"])), *iterations)
    assert sketch.store.partial("0" * 64).is_dir()
    shutil.rmtree(sketch.root / "checkpoints/reward")
    assert offered(sketch) == {foreign(sft).key}


def test_what_another_process_works_on_stays(sketch: Workspace) -> None:
    """Whoever goes on with a chain holds its first iteration's lock; one who came late keeps it too."""
    sft, (one, *_) = foreign(keying.plan(sketch, STAGES["sft"])), chain.plan(sketch)
    first = foreign(one)
    second = foreign(one, iteration=2, parent=first.key)
    store(sketch, sft, first, second)
    assert sketch.store.partial("0" * 64).is_dir()
    everything = {sft.key, first.key, second.key, "0" * 64}
    found = gc.unneeded(sketch)
    assert {item.folder.name for item in found} == everything
    for held, kept in ((first.key, {first.key, second.key}), ("0" * 64, {"0" * 64})):
        with sketch.store.lock(held):
            assert offered(sketch) == everything - kept
    with sketch.store.lock(first.key):
        assert {item.folder.name for item in gc.delete(sketch, found)} == {sft.key, "0" * 64}
        assert {entry.manifest["key"] for entry in sketch.store.entries()} == {first.key, second.key}
    gc.delete(sketch, found)
    assert offered(sketch) == set()

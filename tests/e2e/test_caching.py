"""Cached means reused, done means done: what `rlhf run` says, what Prefect says, and what the store holds agree."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Project, commit, git
from e2e.test_doors import STAGES, states


def read(manifest: Path) -> dict[str, Any]:
    return json.loads(manifest.read_text())


def entries(project: Project) -> list[dict[str, Any]]:
    return [read(path) for path in sorted((project.root / ".rlhf/store").glob("*/manifest.json"))]


def entry_folder(project: Project, stage: str) -> Path:
    """The store's entry of a stage that has one."""
    (key,) = [entry["key"] for entry in entries(project) if entry["identity"]["stage"] == stage]
    return project.root / ".rlhf/store" / key


def written(project: Project) -> dict[str, int]:
    """When each entry was written, by stage and iteration."""
    found = {}
    for entry in entries(project):
        identity = entry["identity"]
        name = f"{identity['stage']} {identity.get('iteration', '')}".strip()
        found[name] = (project.root / ".rlhf/store" / entry["key"] / "manifest.json").stat().st_mtime_ns
    return found


def test_refresh_does_everything_again_and_gets_the_same(copy_of: Project) -> None:
    before, lock = written(copy_of), copy_of.lock()
    done = copy_of.rlhf("run", "--refresh")
    assert states(done.stdout) == dict.fromkeys(STAGES, "done"), done.stdout + done.stderr
    after = written(copy_of)
    assert set(after) == set(before)
    assert all(after[name] > before[name] for name in before), "iterations too"
    assert copy_of.lock() == lock
    assert "came out different" not in done.stderr + done.stdout


def test_iterations_never_share_an_entry(finished: Project) -> None:
    iterations = [entry for entry in entries(finished) if entry["identity"]["stage"] == "ppo-iteration"]
    assert len(iterations) == 3
    assert len({entry["key"] for entry in iterations}) == 3
    assert len({entry["digest"] for entry in iterations}) == 3
    parents = {entry["identity"]["iteration"]: entry["identity"]["parent"] for entry in iterations}
    keys = {entry["identity"]["iteration"]: entry["key"] for entry in iterations}
    assert parents == {1: None, 2: keys[1], 3: keys[2]}


@pytest.mark.slow
def test_a_payload_that_is_gone_is_made_again(copy_of: Project) -> None:
    """Where something needs it: the workspace's copy is gone as well."""
    lock = copy_of.lock()
    shutil.rmtree(entry_folder(copy_of, "sft") / "payload")
    shutil.rmtree(copy_of.root / "checkpoints/sft")
    done = copy_of.rlhf("run")
    assert states(done.stdout) == {stage: "done" if stage == "sft" else "cached" for stage in STAGES}, done.stderr
    assert copy_of.lock() == lock


@pytest.mark.slow
def test_a_helper_deep_in_a_stages_code_counts(copy_of: Project) -> None:
    """A comment is enough: what it changes nobody knows. That nothing else changed is then seen in the digests."""
    before = copy_of.lock()
    helper = copy_of.root / "rlhf_tasks/ppo/functional.py"
    helper.write_text(helper.read_text() + "# another line\n")
    done = copy_of.rlhf("run")
    again = {"ppo": "done", "evaluate": "done"}
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached") | again, done.stdout + done.stderr
    after = copy_of.lock()
    changed = {path for stage, outs in after.items() for path in outs if outs[path] != before[stage][path]}
    assert changed == {"lineage/ppo.json", "lineage/evaluate.json"}, "which name the code"


class Attack:
    """What unpickling it does to a machine."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_prefects_records_are_written_and_never_read(copy_of: Project, tmp_path: Path) -> None:
    """A record names what it is to be deserialised with: somebody else's could say pickle."""
    marker = tmp_path / "ran"
    pickled = base64.encodebytes(pickle.dumps(Attack(marker))).decode()
    records = list((copy_of.root / ".rlhf/results").iterdir())
    assert records
    for record in records:
        document = read(record)
        document["metadata"] |= {"serializer": {"type": "pickle"}, "storage_key": str(record)}
        record.write_text(json.dumps(document | {"result": pickled}))
    done = copy_of.rlhf("run")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached"), done.stdout + done.stderr
    assert not marker.exists()


def test_what_has_no_content_cannot_be_keyed(copy_of: Project) -> None:
    os.mkfifo(copy_of.root / "data/raw/pipe.jsonl")
    copy_of.set(data__sources=[{"kind": "ratings", "path": "data/raw/pipe.jsonl"}])
    done = copy_of.rlhf("run", "--until", "prepare")
    assert done.returncode == 2, done.stdout
    assert "pipe.jsonl: found neither a file nor a folder" in done.stderr


def test_a_store_in_a_shared_folder_serves_another_clone(finished: Project, tmp_path: Path, prefect_url: str) -> None:
    """Iterations too: the second clone goes on where the first stopped, and trains only what is new."""
    shutil.copytree(finished.root / ".rlhf/store", tmp_path / "shared")
    environment = finished.environment | {"PREFECT_API_URL": prefect_url, "RLHF_STORE": str(tmp_path / "shared")}
    clone = Project(tmp_path / "clone", environment)
    git(finished.root, "clone", "-q", ".", str(clone.root))
    done = clone.rlhf("run", "--set", "ppo.iterations=4")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached") | dict.fromkeys(STAGES[3:], "done"), done.stderr
    stages = [entry["identity"] for entry in map(read, (tmp_path / "shared").glob("*/manifest.json"))]
    assert sorted(i["iteration"] for i in stages if i["stage"] == "ppo-iteration") == [1, 2, 3, 4]
    assert not list((clone.root / ".rlhf").glob("store/*/manifest.json"))


@pytest.mark.slow
def test_gc_keeps_what_is_needed(copy_of: Project) -> None:
    """A tag keeps what its dvc.lock names; iterations of other settings go, as nothing can ask for them."""
    nothing = "nothing: all that is stored is needed"
    assert copy_of.rlhf("gc").stdout.strip() == nothing
    commit(copy_of, "-f", "dvc.lock")
    copy_of.rlhf("run", "--from", "evaluate", "--until", "evaluate", "--set", "evaluate.bootstrap=150")
    copy_of.rlhf("run", "--from", "evaluate", "--until", "evaluate", "--set", "evaluate.bootstrap=120")
    (copy_of.root / ".rlhf/store/partial" / ("0" * 64)).mkdir(parents=True)
    before = entries(copy_of)
    shown = copy_of.rlhf("gc").stdout
    assert "evaluate" in shown
    assert "unfinished" in shown
    assert entries(copy_of) == before
    assert "deleted" in copy_of.rlhf("gc", "--yes").stdout
    gone = [entry["identity"]["parameters"]["evaluate"] for entry in before if entry not in entries(copy_of)]
    assert [settings["bootstrap"] for settings in gone] == [150]
    assert copy_of.rlhf("gc").stdout.strip() == nothing


def test_why_says_what_changed(copy_of: Project) -> None:
    assert "nothing that it depends on has changed" in copy_of.rlhf("why", "ppo").stdout
    copy_of.set(reward__epochs=2, ppo__kl__coef=0.25)
    told = copy_of.rlhf("why", "ppo").stdout
    assert re.search(r"^reward: to do; its result \w{12}, of .* is of something else:$", told, re.MULTILINE)
    assert re.search(r"parameters +reward\.epochs +1 +2 *$", told, re.MULTILINE)
    assert "ppo: waits for reward" in told
    assert re.search(r"parameters +ppo\.kl\.coef +0\.05 +0\.25 *$", told, re.MULTILINE)
    wrong = copy_of.rlhf("why", "pppo")
    assert wrong.returncode == 2
    assert "stage: found 'pppo', expected one of prepare" in wrong.stderr


def test_store_workspace_and_dvc_share_one_copy_on_disk(finished: Project) -> None:
    weights = finished.root / "checkpoints/actor/model.safetensors"
    holders = {"store": ".rlhf/store/*/payload/actor/model.safetensors", "DVC": ".dvc/cache/files/md5/*/*"}
    for name, pattern in holders.items():
        assert any(path.samefile(weights) for path in finished.root.glob(pattern)), name

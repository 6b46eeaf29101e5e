"""Cached means reused, done means done: what `rlhf run` says, what Prefect says, and what the store holds agree."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Project
from e2e.test_doors import STAGES, states


def entries(project: Project) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (project.root / ".rlhf/store").glob("*/manifest.json")]


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
    digests = {entry["identity"]["iteration"]: entry["digest"] for entry in iterations}
    assert parents == {1: None, 2: digests[1], 3: digests[2]}


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
    """A comment is enough: what it changes nobody knows. That nothing changed is then seen in the digests."""
    lock = copy_of.lock()
    helper = copy_of.root / "rlhf_tasks/ppo/functional.py"
    helper.write_text(helper.read_text() + "# another line\n")
    done = copy_of.rlhf("run")
    again = {"ppo": "done", "evaluate": "done"}
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached") | again, done.stdout + done.stderr
    assert copy_of.lock() == lock


def test_what_has_no_content_cannot_be_keyed(copy_of: Project) -> None:
    os.mkfifo(copy_of.root / "data/raw/pipe.jsonl")
    copy_of.set(data__sources=[{"kind": "ratings", "path": "data/raw/pipe.jsonl"}])
    done = copy_of.rlhf("run", "--until", "prepare")
    assert done.returncode == 2, done.stdout
    assert "pipe.jsonl: found neither a file nor a folder" in done.stderr

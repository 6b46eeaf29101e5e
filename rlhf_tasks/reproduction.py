"""Doing it all again in a clean folder, from git and DVC alone, and saying whether it came out the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_tasks import versioning
from rlhf_tasks.errors import UserError
from rlhf_tasks.explain import flat
from rlhf_tasks.lineage import Document, lineage_of, locked_outs
from rlhf_tasks.source import LOCK, git
from rlhf_tasks.stages import STAGES


@dataclass(frozen=True)
class Wanted:
    """What is to come out again.

    Attributes:
        commit: git's.
        patch: what was changed of it.
        lock: dvc.lock, with the digests.
        document: the lineage, if it is to be had: it holds the environment.
    """

    commit: str
    patch: bytes
    lock: bytes
    document: Document | None


@dataclass(frozen=True)
class Compared:
    """A stage, done again: its outs that differ, with the first file in each that does ("" for a file)."""

    stage: str
    outs: int
    differing: dict[str, str]


def wanted(root: Path, name: str) -> Wanted:
    """What a registered version or a git revision was made of, and what came out.

    Raises:
        UserError: there is no such thing, or it did not come out of git.
    """
    if name.startswith("models:/"):
        from rlhf_tasks.origins import origin_of_version

        origin = origin_of_version(root, name)
        commit = origin.document["git"]["commit"]
        if not git(root, "rev-parse", "--verify", f"{commit}^{{commit}}"):
            raise UserError(f"{name}: made from git commit {commit or 'none'}, which is not here; `git fetch` it")
        return Wanted(commit, origin.patch, origin.lock, origin.document)
    lock = versioning.committed_lock(root, name)
    locked_outs(lock, f"{LOCK} of {name}")  # now, not after hours
    commit = versioning.commit_of(root, name)
    try:
        document = lineage_of(lambda path: versioning.read_at(root, name, path))
    except UserError:  # not pushed, not fetched: the digests are in git
        document = None
    return Wanted(commit, b"", lock, document)


def make_again(root: Path, target: Path, what: Wanted) -> Path:
    """Clone, patch, pull the raw data, and run the whole pipeline with MLflow and Prefect of its own.

    Returns:
        The project in the clone.

    Raises:
        UserError: git, DVC or the pipeline could not.
    """
    repository, inside = versioning.place_in_repository(root)
    project = target / inside
    _git(root, "clone", "--quiet", "--no-checkout", str(repository), str(target))
    _git(target, "checkout", "--quiet", "--detach", what.commit)
    if what.patch:
        patch = target / ".git" / "source.patch"
        patch.write_bytes(what.patch)
        _git(target, "apply", "--whitespace=nowarn", str(patch))
    if (target / ".gitmodules").exists():
        _git(target, "submodule", "--quiet", "update", "--init", "--recursive")
    local = root / ".dvc/config.local"
    if local.exists():
        shutil.copyfile(local, project / ".dvc/config.local")
    versioning.pull_sources(project, root)
    (project / LOCK).unlink(missing_ok=True)  # nothing is to be adopted
    own = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "PREFECT_API_URL", "PREFECT_HOME", "RLHF_STORE")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run([sys.executable, "-m", "flows.cli", "run"], cwd=project, env=environment)
    if done.returncode:
        raise UserError(f"{project}: the pipeline ended with status {done.returncode}, see above")
    return project


def compare(root: Path, target: Path, what: Wanted) -> Iterator[Compared]:
    """Every stage's outs against those that were wanted. Their lineage is compared apart: it is no result."""
    before, now = locked_outs(what.lock, f"{LOCK} of {what.commit[:12]}"), locked_outs((target / LOCK).read_bytes())
    for stage in STAGES.values():
        results = [path for path in stage.outs.values() if path != stage.lineage]
        old, new = before.get(stage.name, {}), now.get(stage.name, {})
        differing = [path for path in results if old.get(path) != new.get(path)]
        yield Compared(
            stage.name,
            len(results),
            {path: _first_file(root, target, old.get(path), new.get(path)) for path in differing},
        )


def environment_changes(target: Path, document: Document) -> dict[str, tuple[Any, Any]]:
    """What of the environment is not as it was: name -> value then, value here."""
    changes: dict[str, tuple[Any, Any]] = {}
    for stage in STAGES.values():
        then = flat(document["stages"][stage.name]["identity"]["environment"])
        here = flat(json.loads((target / stage.lineage).read_bytes())["environment"])
        names = [name for name in sorted(then.keys() | here.keys()) if then.get(name) != here.get(name)]
        changes |= {name: (then.get(name), here.get(name)) for name in names}
    return changes


def _first_file(root: Path, target: Path, old: str | None, new: str | None) -> str:
    before, now = (versioning.files_of(place, md5) if md5 else {} for place, md5 in ((root, old), (target, new)))
    if not before or not now:
        return ""
    return next((name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)), "")


def _git(root: Path, *arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"`git {' '.join(arguments)}` failed: {' '.join(done.stderr.split())}")

"""DVC: the one module that talks to it. It writes dvc.yaml, asks what is out of date, and records finished stages.

python -m rlhf_tasks.versioning     write dvc.yaml from the table of stages and params.yaml
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_tasks.closure import import_closure
from rlhf_tasks.config import Params, load_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.keying import external_dependencies
from rlhf_tasks.source import LOCK, git
from rlhf_tasks.stages import STAGES, Stage

HEADER = """\
# Generated from rlhf_tasks/stages.py and params.yaml by `make dvc.yaml`: edit those, not this file.
# A stage's deps are what it reads and the code that it runs (its import closure).
"""
PLOTS = {
    "plots/sft.csv": ("SFT loss", ["loss"]),
    "plots/reward.csv": ("Reward model", ["loss", "accuracy"]),
    "plots/ppo.csv": ("PPO", ["objective/score", "objective/kl", "advantage/explained_variance", "response/length"]),
}


def pipeline_yaml(root: Path, params: Params) -> str:
    """The text of dvc.yaml for a project at `root`."""
    document = {
        "stages": {stage.name: _stage_entry(root, stage, params) for stage in STAGES.values()},
        "metrics": [stage.metrics for stage in STAGES.values()],
        "plots": [
            {f"{title}: {column}": {"x": "step", "y": {path: column}}}
            for path, (title, columns) in PLOTS.items()
            for column in columns
        ],
    }
    yaml, text = YAML(), io.StringIO()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 120
    yaml.dump(document, text)
    return HEADER + text.getvalue()


def update_pipeline(root: Path, params: Params) -> bool:
    """Write dvc.yaml if it is not what `params` and the stages say. Returns whether it changed."""
    path, text = root / "dvc.yaml", pipeline_yaml(root, params)
    if path.exists() and path.read_text() == text:
        return False
    temporary = path.with_name("dvc.yaml.new")  # whole or not at all, on a full disk too
    temporary.write_text(text)
    temporary.replace(path)
    return True


def inside_stage() -> bool:
    """Whether DVC itself runs this process as a stage; then DVC records it, and must not be asked anything."""
    return bool(os.environ.get("DVC_STAGE"))


def outdated_stages(root: Path) -> set[str]:
    """Stages whose dvc.lock entry does not match the workspace.

    Raises:
        UserError: DVC is not set up here, or cannot say.
    """
    changed = json.loads(_dvc(root, "status", "--json") or "{}")
    return {name for name in changed if name in STAGES}


def record(root: Path, stage: Stage) -> None:
    """Write a finished stage into dvc.lock and its outs into DVC's cache."""
    _dvc(root, "--wait-for-lock", "commit", "--force", stage.name)


def read_at(root: Path, revision: str, path: str) -> bytes:
    """An out, or dvc.lock, as it is at a git revision: from git, DVC's cache or its remote.

    Raises:
        UserError: the revision, or the file in it, is not there.
    """
    if path == LOCK:
        return committed_lock(root, revision)
    repository, inside = place_in_repository(root)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        try:
            _dvc(root, "get", str(repository), str(inside / path), "--rev", revision, "--out", str(target))
        except UserError as error:
            raise UserError(f"{path} of {revision}: {error}; `dvc push` where it is, or `dvc fetch` here") from None
        return target.read_bytes()


def place_in_repository(root: Path) -> tuple[Path, Path]:
    """The git repository that a project belongs to, and the project's folder in it: `.` if it is all of it."""
    inside = Path(git(root, "rev-parse", "--show-prefix").decode().rstrip("\n"))
    return Path(*root.resolve().parts[: -len(inside.parts) or None]), inside


def commit_of(root: Path, revision: str) -> str:
    """The commit that a git revision names.

    Raises:
        UserError: there is no such revision.
    """
    commit = git(root, "rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    if not commit:
        raise UserError(
            f"{revision}: no git revision of {root}; expected one, or models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    return commit


def committed_lock(root: Path, revision: str) -> bytes:
    """dvc.lock as git has it.

    Raises:
        UserError: there is no such revision, or no dvc.lock in it.
    """
    commit_of(root, revision)
    lock = git(root, "show", f"{revision}:./{LOCK}")  # a project may be a folder of its repository
    if not lock:
        raise UserError(f"{revision}: has no {LOCK}; commit it after a run (`git add {LOCK} && git commit`)")
    return lock


def files_of(root: Path, md5: str) -> dict[str, str]:
    """The files of an out by their md5: one, named "", or a folder's, from DVC's cache or its remote; else none."""
    if not md5.endswith(".dir"):
        return {"": md5}
    path = Path(_dvc(root, "cache", "dir").strip()) / "files/md5" / md5[:2] / md5[2:]
    listed = path.read_bytes() if path.exists() else _listed_by_remote(root, md5)
    return {file["relpath"]: file["md5"] for file in json.loads(listed)}


def _listed_by_remote(root: Path, md5: str) -> bytes:
    """The list of a folder's files alone: `dvc fetch` would bring the files, and knows folders by revision only."""
    done = subprocess.run([sys.executable, "-c", _LIST, md5], cwd=root, capture_output=True)
    return b"[]" if done.returncode else done.stdout  # no remote, or it has none


_LIST = """
import json, sys
from dvc.repo import Repo
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree

tree = Tree.load(Repo().cloud.get_remote_odb(), HashInfo("md5", sys.argv[1]))
print(json.dumps(tree.as_list()))
"""


def pull_sources(root: Path, origin: Path) -> None:
    """Have the data that git tracks by `.dvc` files in a clone: from the origin's cache, or from the remote.

    Raises:
        UserError: neither has it, or the listing of a folder is not the one that git tracks.
    """
    known = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.dvc").decode()
    tracked = [name for name in known.split("\0") if name and (root / name).exists()]
    if not tracked:
        return
    cache = _dvc(origin, "cache", "dir").strip()
    _dvc(root, "remote", "add", "--local", "--force", "origin-cache", cache)
    try:
        _dvc(root, "fetch", "--remote", "origin-cache", *tracked)
    except UserError:
        _dvc(root, "fetch", *tracked)
    _check_listings(root, [root / name for name in tracked])
    _dvc(root, "checkout", *tracked)


def _check_listings(root: Path, tracked: list[Path]) -> None:
    """DVC believes a cache's listing of a folder, and would put its files anywhere: `../../.bashrc`, say (3.67.1)."""
    cache = Path(root, _dvc(root, "cache", "dir").strip())
    for file in tracked:
        for out in YAML(typ="safe").load(file.read_text()).get("outs", ()):
            if not (md5 := str(out.get("md5", ""))).endswith(".dir"):
                continue
            listing = cache / ("files/md5" if out.get("hash") == "md5" else "") / md5[:2] / md5[2:]
            found = hashlib.md5(listing.read_bytes(), usedforsecurity=False).hexdigest() if listing.exists() else None
            if found != md5.removesuffix(".dir"):
                listing.unlink(missing_ok=True)
                raise UserError(
                    f"{file.relative_to(root)}: the listing of `{out['path']}` that DVC fetched is not the one that "
                    "git tracks; nothing of it was taken: mend the cache or the remote that it came from"
                )


def _dvc(root: Path, *arguments: str) -> str:
    if not (root / ".dvc").is_dir():
        raise UserError(f"{root}: not a DVC project; run `dvc init` there (with `--no-scm` where there is no git)")
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join((done.stderr.strip() or done.stdout.strip()).removeprefix("ERROR: ").split())
        remedy = next((remedy for found, remedy in _REMEDIES.items() if found in reason), reason or "no reason given")
        raise UserError(f"`dvc {' '.join(arguments)}` failed: {remedy}")
    return done.stdout


#: what DVC says -> what it means here
_REMEDIES = {
    "not a git repository": "there is no git repository; run `git init`, or `dvc config core.no_scm true`",
    "Unable to acquire lock": "another DVC process works in this repository; wait until it has ended",
    "is busy, it is being blocked by": "another DVC process works on these files; wait until it has ended",
    "No space left on device": "the disk is full; make room, then run again: what is finished is kept",
}


def _stage_entry(root: Path, stage: Stage, params: Params) -> dict[str, Any]:
    external = external_dependencies(params, root, stage)
    return {
        "cmd": f"rlhf stage {stage.name}",
        "deps": sorted([*stage.inputs.values(), *external, *import_closure(stage.module)]),
        "params": list(stage.sections),
        "outs": list(stage.outs.values()),
    }


if __name__ == "__main__":
    here = Path.cwd()
    update_pipeline(here, load_params(here / "params.yaml"))

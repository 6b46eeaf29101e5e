"""`rlhf gc`: what the store holds that nothing needs any more.

Kept is what this checkout's next run would find, and the stage results that a dvc.lock of a branch, a tag or the
checkout, or a registered version, names. Deleting more would cost time, never results: DVC's cache holds those.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlhf_tasks import chain, engine
from rlhf_tasks.engine import Workspace, lineage_text
from rlhf_tasks.errors import UserError
from rlhf_tasks.lineage import locked_outs
from rlhf_tasks.origins import keys_of_versions
from rlhf_tasks.source import LOCK, git
from rlhf_tasks.stages import LINEAGE, STAGES
from rlhf_tasks.store import Entry


@dataclass(frozen=True)
class Unneeded:
    """Something that may go: an entry of a stage, or what unfinished work left."""

    what: str
    folder: Path

    @property
    def size(self) -> int:
        """Bytes that deleting it frees: not those of files that the workspace or DVC's cache link too."""
        files = [path.lstat() for path in self.folder.rglob("*") if path.is_file()]
        return sum(facts.st_size for facts in files if facts.st_nlink == 1)


def unneeded(workspace: Workspace) -> list[Unneeded]:
    """What may go.

    Raises:
        UserError: MLflow does not answer, so nobody knows what registered versions need.
    """
    own, versions = _own_keys(workspace), keys_of_versions(workspace.root, workspace.params.register_.name)
    locked = _locked_lineages(workspace.root)

    def needed(entry: Entry) -> bool:
        return entry.manifest["key"] in own | versions or _lineage_md5(entry) in locked

    found = [Unneeded(_named(entry), entry.folder) for entry in workspace.store.entries() if not needed(entry)]
    begun = [folder for folder in (workspace.store.root / "partial").iterdir() if folder.name not in own]
    return found + [Unneeded("unfinished work", folder) for folder in begun]


def delete(workspace: Workspace, what: list[Unneeded]) -> None:
    """Delete it, entry by entry: a kill leaves whole ones."""
    for item in what:
        if item.folder.parent == workspace.store.root:
            workspace.store.discard(item.folder.name)
        else:
            shutil.rmtree(item.folder, ignore_errors=True)


def _own_keys(workspace: Workspace) -> set[str]:
    """Keys of what the next run in this checkout would look for, as far as they are known before it."""
    keys = set()
    for stage in STAGES.values():
        try:
            keys.add(engine.plan(workspace, stage).key)
            keys |= {job.key for job in chain.plan(workspace)} if stage.name == "ppo" else set()
        except UserError:  # an earlier stage has to run first
            continue
    return keys


def _locked_lineages(root: Path) -> set[str]:
    """The md5 of every `lineage/<stage>.json` in a dvc.lock of the checkout, a branch or a tag."""
    commits = git(root, "for-each-ref", "--format=%(objectname)").decode().split()
    locks = [git(root, "show", f"{commit}:{LOCK}") for commit in {*commits, "HEAD"}]
    if (root / LOCK).exists():
        locks.append((root / LOCK).read_bytes())
    outs = [outs for lock in locks if lock for outs in locked_outs(lock).values()]
    wanted = {stage.lineage for stage in STAGES.values()}
    return {md5 for stage in outs for path, md5 in stage.items() if path in wanted}


def _lineage_md5(entry: Entry) -> str:
    """As DVC would give it for the entry's `lineage.json`; an adopted one is its maker's."""
    path = entry.payload / LINEAGE
    text = path.read_bytes() if path.exists() else lineage_text(entry.manifest["identity"]).encode()
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


def _named(entry: Entry) -> str:
    identity = entry.manifest["identity"]
    return f"iteration {identity['iteration']}" if "iteration" in identity else str(identity["stage"])

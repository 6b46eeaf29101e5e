"""`rlhf gc`: what the store holds that nothing needs any more.

Kept is what this checkout's next run would find, and the stage results that a dvc.lock of a branch, a tag or the
checkout, or a registered version, names; and whatever a process works on. Deleting more would cost time, never results:
DVC's cache holds those.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_tasks import chain, engine, keying
from rlhf_tasks.errors import UserError
from rlhf_tasks.keying import lineage_text
from rlhf_tasks.lineage import locked_outs
from rlhf_tasks.origins import keys_of_versions
from rlhf_tasks.source import LOCK, git, git_or_fail, is_repository
from rlhf_tasks.stages import LINEAGE, STAGES
from rlhf_tasks.store import Entry, Store, open_lock
from rlhf_tasks.workspace import Workspace


@dataclass(frozen=True)
class Unneeded:
    """Something that may go: an entry of a stage, or what unfinished work left.

    Attributes:
        lock: the key whose lock those hold who work on it.
        frees: bytes that deleting it frees: not those of files that the workspace or DVC's cache link too.
    """

    what: str
    folder: Path
    lock: str
    frees: int

    @classmethod
    def of(cls, what: str, folder: Path, lock: str) -> Unneeded:
        """With the size that its folder has now."""
        files = [path.lstat() for path in folder.rglob("*") if path.is_file()]
        return cls(what, folder, lock, sum(facts.st_size for facts in files if facts.st_nlink == 1))


def unneeded(workspace: Workspace) -> list[Unneeded]:
    """What may go.

    Raises:
        UserError: nobody knows what registered versions, or a dvc.lock, need.
    """
    (own, unknown), versions = _own_keys(workspace), keys_of_versions(workspace.root)
    locked = _locked_lineages(workspace.root)
    entries = list(workspace.store.entries())
    parents = {entry.manifest["key"]: entry.manifest["identity"].get("parent") for entry in entries}

    def needed(entry: Entry) -> bool:
        ours = {entry.manifest["key"], entry.answers} & (own | versions)
        return bool(ours) or entry.manifest["identity"]["stage"] in unknown or _lineage_md5(entry) in locked

    found = [
        Unneeded.of(_named(entry), entry.folder, _first(entry.manifest["key"], parents))
        for entry in entries
        if not needed(entry)
    ]
    if not unknown:  # whose work is unfinished its folder does not say
        begun = [folder for folder in (workspace.store.root / "partial").iterdir() if folder.name not in own]
        found += [Unneeded.of("unfinished work", folder, folder.name) for folder in begun]
    return [item for item in found if _is_free(workspace.store, item.lock)]


def delete(workspace: Workspace, what: list[Unneeded]) -> list[Unneeded]:
    """Delete it, entry by entry, but what somebody works on by now: a kill leaves whole ones. Returns what is gone."""
    gone = []
    for item in what:
        with _lock_if_free(workspace.store, item.lock) as free:
            if not free:
                continue
            if item.folder.parent == workspace.store.root:
                workspace.store.discard(item.folder.name)
            else:
                shutil.rmtree(item.folder, ignore_errors=True)
            gone.append(item)
    return gone


@contextlib.contextmanager
def _lock_if_free(store: Store, key: str) -> Iterator[bool]:
    """Hold the lock of a key unless another process does. Yields whether it is held here."""
    with open_lock(store.root / "locks" / key) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free


def _is_free(store: Store, key: str) -> bool:
    with _lock_if_free(store, key) as free:
        return free


def _first(key: str, parents: Mapping[str, str | None]) -> str:
    """The key of the first iteration of an entry's chain: whoever works on any holds its lock."""
    while parent := parents.get(key):
        key = parent
    return key


def _own_keys(workspace: Workspace) -> tuple[set[str], set[str]]:
    """Keys of what the next run in this checkout would look for, and stages (as in a manifest) whose keys only an
    earlier stage's result will tell.
    """
    keys, unknown, coming = set[str](), set[str](), dict[str, str]()
    for stage in STAGES.values():
        try:
            job = keying.plan(workspace, stage, coming)
            keys.add(job.key)
            keys |= {job.key for job in chain.plan(workspace, coming)} if stage.name == "ppo" else set()
            if entry := engine.find(workspace, job):
                coming |= {path: entry.parts[part] for part, path in stage.outs.items()}
        except UserError:  # an input is missing
            unknown |= {stage.name, chain.ITERATION} if stage.name == "ppo" else {stage.name}
    return keys, unknown


def _locked_lineages(root: Path) -> set[str]:
    """The md5 of every `lineage/<stage>.json` in a dvc.lock of the checkout, a branch or a tag."""
    locks = _committed_locks(root) if is_repository(root) else {}
    if (root / LOCK).exists():
        locks[str(root / LOCK)] = (root / LOCK).read_bytes()
    outs = [outs for name, lock in locks.items() for outs in locked_outs(lock, name).values()]
    wanted = {stage.lineage for stage in STAGES.values()}
    return {md5 for stage in outs for path, md5 in stage.items() if path in wanted}


def _committed_locks(root: Path) -> dict[str, bytes]:
    """Every dvc.lock that a ref leads to, named by the first that does."""
    refs = git_or_fail(root, "for-each-ref", "--format=%(refname)").decode().split()
    blobs: dict[str, str] = {}
    for ref in ["HEAD", *refs]:
        if blob := git(root, "rev-parse", "--quiet", "--verify", f"{ref}:./{LOCK}").decode().strip():
            blobs.setdefault(blob, f"{LOCK} of {ref}")
    return {name: git_or_fail(root, "cat-file", "blob", blob) for blob, name in blobs.items()}


def _lineage_md5(entry: Entry) -> str:
    """As DVC would give it for the entry's `lineage.json`; an adopted one is its maker's."""
    path = entry.payload / LINEAGE
    text = path.read_bytes() if path.exists() else lineage_text(entry.manifest["identity"]).encode()
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


def _named(entry: Entry) -> str:
    identity = entry.manifest["identity"]
    return f"iteration {identity['iteration']}" if "iteration" in identity else str(identity["stage"])

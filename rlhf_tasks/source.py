"""The checkout's own origin: its git commit, and what was changed since, as a patch that git can apply."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

LOCK = "dvc.lock"  # a run's result, not its source


@dataclass(frozen=True)
class Source:
    """What a run was made from.

    Attributes:
        commit: the git commit; empty where there is no git.
        patch: what the work tree changes of it, untracked files included, as `git apply` takes it; empty if clean.
    """

    commit: str
    patch: bytes

    @property
    def dirty(self) -> bool:
        return bool(self.patch)


def source_of(root: Path) -> Source:
    """The checkout at `root` as it is now; dvc.lock does not count."""
    commit = git(root, "rev-parse", "HEAD").decode().strip()
    return Source(commit, _patch(root) if commit else b"")


def git(root: Path, *arguments: str, index: str | None = None) -> bytes:
    """What a git command prints; nothing where it fails or where there is no git."""
    environment = os.environ | ({"GIT_INDEX_FILE": index} if index else {})
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, env=environment)
    except FileNotFoundError:
        return b""
    return done.stdout if done.returncode == 0 else b""


def _patch(root: Path) -> bytes:
    """Made through an index of its own: the user's is left alone."""
    if not git(root, "status", "--porcelain", "--", ".", f":(exclude){LOCK}"):
        return b""
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "index")
        git(root, "read-tree", "HEAD", index=index)
        git(root, "add", "--all", "--", ".", f":(exclude){LOCK}", index=index)
        return git(root, "diff", "--cached", "--binary", "HEAD", "--", ".", f":(exclude){LOCK}", index=index)

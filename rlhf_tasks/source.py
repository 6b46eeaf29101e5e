"""The checkout's own origin: its git commit, and what was changed since, as a patch that git can apply."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlhf_tasks.errors import UserError

log = logging.getLogger(__name__)

LOCK = "dvc.lock"  # a run's result, not its source

_SOURCE = (".", f":(exclude){LOCK}")
_NO_SECRETS = tuple(f":(exclude,glob)**/{name}" for name in (".env", ".env.*", ".env/**", ".env.*/**"))
#: what the user's configuration may set otherwise, and `git apply` would not take
_PLAIN = (
    *("--binary", "--full-index", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--no-relative"),
    *("--submodule=short", "--src-prefix=a/", "--dst-prefix=b/"),
)


@dataclass(frozen=True)
class Source:
    """What a run was made from.

    Attributes:
        commit: the git commit; empty where there is no git.
        patch: what the work tree changes of it, as `git apply` takes it; empty if clean. Untracked files are in it,
            but none that git ignores, no `.env` or `.env.*`, which hold secrets, and no other repository inside.
    """

    commit: str
    patch: bytes

    @property
    def dirty(self) -> bool:
        return bool(self.patch)


def source_of(root: Path) -> Source:
    """The checkout at `root` as it is now; dvc.lock does not count.

    A repository that git does not read, as it belongs to another user, stops nobody from training; that is said.

    Raises:
        UserError: git cannot say what was changed.
    """
    try:
        commit = _commit(root)
    except UserError as error:
        log.warning("%s; the run records no commit", error)
        return Source("", b"")
    return Source(commit, _patch(root) if commit else b"")


def git(root: Path, *arguments: str) -> bytes:
    """What a git command prints; nothing where it fails or where there is no git."""
    done = _run(root, *arguments)
    return done.stdout if done and done.returncode == 0 else b""


def git_or_fail(root: Path, *arguments: str, index: str | None = None, given: bytes = b"") -> bytes:
    """What a git command prints.

    Args:
        index: a file to use instead of the repository's index.
        given: what it reads.

    Raises:
        UserError: it failed; with git's reason.
    """
    done = _run(root, *arguments, index=index, given=given)
    if done is None or done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split()) if done else "there is no such program"
        raise UserError(
            f"{root}: `git {arguments[0]}` failed ({reason or 'no reason given'}); mend that, then try again"
        )
    return done.stdout


def is_repository(root: Path) -> bool:
    """Whether git is installed and keeps this folder.

    Raises:
        UserError: there is a repository, but git does not read it.
    """
    done = _run(root, "rev-parse", "--git-dir")
    if done is None or (done.returncode and b"not a git repository" in done.stderr):
        return False
    git_or_fail(root, "rev-parse", "--git-dir")
    return True


def _run(
    root: Path, *arguments: str, index: str | None = None, given: bytes = b""
) -> subprocess.CompletedProcess[bytes] | None:
    """A git command, in English; none where there is no git."""
    environment = os.environ | {"LC_ALL": "C"} | ({"GIT_INDEX_FILE": index} if index else {})
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, env=environment, input=given)
    except FileNotFoundError:
        return None


def _commit(root: Path) -> str:
    """The commit of HEAD; empty where there is no repository, or none yet."""
    if not is_repository(root):
        return ""
    return git(root, "rev-parse", "--quiet", "--verify", "HEAD^{commit}").decode().strip()


def _patch(root: Path) -> bytes:
    """Made through an index of its own: the user's is left alone."""
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "index")
        git_or_fail(root, "read-tree", "HEAD", index=index)
        git_or_fail(root, "add", "--update", "--", *_SOURCE, index=index)
        git_or_fail(root, "update-index", "--add", "--remove", "-z", "--stdin", index=index, given=_unknown_files(root))
        return git_or_fail(root, "diff-index", "-p", "--cached", *_PLAIN, "HEAD", "--", *_SOURCE, index=index)


def _unknown_files(root: Path) -> bytes:
    """Files that HEAD may not know, each ended by NUL: added ones, which git may ignore, and untracked ones."""
    listed = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_SOURCE, *_NO_SECRETS)
    names = git_or_fail(root, *listed).split(b"\0")
    return b"".join(name + b"\0" for name in names if name and not name.endswith(b"/"))  # a/ is a repository

"""The patch of a changed checkout, in small git repositories."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rlhf_tasks.errors import UserError
from rlhf_tasks.source import Source, is_repository, source_of

SPOILERS = {
    "diff.external": "true",
    "diff.noprefix": "true",
    "diff.mnemonicPrefix": "true",
    "diff.submodule": "log",
    "diff.renames": "copies",
    "color.ui": "always",
    "core.quotePath": "false",
    "status.showUntrackedFiles": "no",
    "diff.shout.textconv": "tr a-z A-Z <",
}


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    done = subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one commit, which has not changed."""
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q")
    (root / ".gitattributes").write_text("*.txt diff=shout\n")
    (root / "text.txt").write_text("one\ntwo\n")
    (root / "gone.txt").write_text("gone\n")
    (root / "dvc.lock").write_text("first\n")
    commit(root)
    return root


def commit(root: Path) -> None:
    git(root, "add", "--all", "--force")
    git(root, "commit", "-qm", "start")


def applied(root: Path, source: Source, target: Path) -> dict[str, bytes]:
    """The files of a clone of the commit with the patch, as `rlhf reproduce` makes it."""
    git(root, "clone", "-q", ".", str(target))
    git(target, "checkout", "-q", source.commit)
    if source.patch:
        (target / ".git/source.patch").write_bytes(source.patch)
        git(target, "apply", "--whitespace=nowarn", ".git/source.patch")
    return files(target)


def files(root: Path) -> dict[str, bytes]:
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".git/")}


def test_a_clean_checkout_has_no_patch(root: Path) -> None:
    (root / "dvc.lock").write_text("second\n")
    assert source_of(root) == Source(git(root, "rev-parse", "HEAD"), b"")
    assert not source_of(root).dirty


@pytest.mark.parametrize("spoiled", [False, True])
def test_the_patch_makes_the_checkout(root: Path, tmp_path: Path, spoiled: bool) -> None:
    for name, value in SPOILERS.items() if spoiled else ():
        git(root, "config", name, value)
    (root / ".gitignore").write_text("ignored*\n")
    (root / "text.txt").write_text("one\nthree\n")
    (root / "gone.txt").unlink()
    (root / "a folder").mkdir()
    (root / "a folder/größer.bin").write_bytes(bytes(range(256)))
    (root / "ignored").write_text("left out\n")
    (root / "ignored but added").write_text("kept\n")
    git(root, "add", "--force", "ignored but added")
    before = git(root, "ls-files", "--stage")
    source = source_of(root)
    assert git(root, "ls-files", "--stage") == before, "the user's index is left alone"
    wanted = {name: content for name, content in files(root).items() if name != "ignored"}
    assert applied(root, source, tmp_path / "clone") == wanted


def test_another_repository_inside_is_left_out(root: Path, tmp_path: Path) -> None:
    """One without a commit, which `git add` refuses, and one with."""
    for name in ("empty", "full"):
        (root / name).mkdir()
        git(root / name, "init", "-q")
        (root / name / "file").write_text("theirs\n")
    commit(root / "full")
    assert not source_of(root).dirty
    (root / "mine").write_text("mine\n")
    clone = applied(root, source_of(root), tmp_path / "clone")
    assert clone["mine"] == b"mine\n"
    assert not any(name.endswith("/file") for name in clone)


def test_secrets_stay_here(root: Path) -> None:
    for name in (".env", ".env.local", "deep/down/.env", "deep/.env.d/token"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("SECRET\n")
    assert not source_of(root).dirty
    git(root, "add", "--force", ".env")
    assert not source_of(root).dirty, "not yet committed"
    commit(root)
    (root / ".env").write_text("no longer SECRET\n")
    assert b"no longer" in source_of(root).patch, "who commits it means it"


def test_a_subfolder_speaks_for_itself(root: Path) -> None:
    (root / "project").mkdir()
    (root / "project/text.txt").write_text("mine\n")
    (root / "elsewhere.txt").write_text("theirs\n")
    patch = source_of(root / "project").patch
    assert b"+++ b/project/text.txt" in patch
    assert b"elsewhere" not in patch


def test_without_a_commit_there_is_no_source(tmp_path: Path) -> None:
    assert source_of(tmp_path) == Source("", b"")
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("new\n")
    assert source_of(tmp_path) == Source("", b"")


def test_without_git_there_is_no_source(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(root))
    assert source_of(root) == Source("", b"")


def test_what_git_cannot_do_is_a_sentence(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / ".git/objects" / git(root, "rev-parse", "HEAD^{tree}")[:2]).rename(root / "lost")
    with pytest.raises(UserError, match=r"`git read-tree` failed \(.+\); mend that"):
        source_of(root)
    (root / ".git/config").write_text("no configuration")
    with pytest.raises(UserError, match=r"`git rev-parse` failed .*bad config"):
        is_repository(root)
    assert source_of(root) == Source("", b"")
    assert "the run records no commit" in caplog.text

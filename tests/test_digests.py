"""A file's digest is never another content's, and a file that has not changed is read once."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_tasks import digests
from rlhf_tasks.digests import digest_file, remember_in, remembered_digest

REPOSITORY = Path(__file__).resolve().parent.parent
ASK = (
    "import sys; from pathlib import Path; from rlhf_tasks import digests; digests.remember_in(Path(sys.argv[1])); "
    "read = []; real = digests.digest_file; digests.digest_file = lambda path: read.append(path) or real(path); "
    "print(digests.remembered_digest(Path(sys.argv[2])), len(read))"
)


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written long ago, as far as the rule is concerned, and a memory of its own."""
    monkeypatch.setattr(digests, "SETTLED_NS", 50_000_000)
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setattr(digests, "_memory", None)
    path = tmp_path / "file"
    path.write_text("one")
    time.sleep(0.1)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read."""
    seen: list[Path] = []
    monkeypatch.setattr(digests, "digest_file", lambda path: seen.append(path) or digest_file(path))
    return seen


def test_an_unchanged_file_is_read_once_by_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    time.sleep(digests.SETTLED_NS / 1e9 + 0.1)

    def ask() -> list[str]:
        line = [sys.executable, "-c", ASK, str(tmp_path / "memory"), str(path)]
        done = subprocess.run(line, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        return done.stdout.split()

    assert [ask(), ask()] == [[digest_file(path), "1"], [digest_file(path), "0"]]
    path.write_text("two")
    assert ask() == [digest_file(path), "1"]


def test_a_file_that_has_just_changed_is_not_remembered(settled: Path, reads: list[Path], tmp_path: Path) -> None:
    """It could change again within a tick of the clock and look the same: git calls that racy."""
    remember_in(tmp_path / "memory")
    settled.write_text("two")
    for _ in range(2):
        assert remembered_digest(settled) == digest_file(settled)
    assert len(reads) == 2
    assert not (tmp_path / "memory/digests.db").exists()
    time.sleep(0.1)
    for _ in range(3):
        assert remembered_digest(settled) == digest_file(settled)
    assert len(reads) == 3


@pytest.mark.parametrize("way", ["in place", "replaced", "times set back", "moved here"])
def test_another_content_of_the_same_size_is_another_digest(settled: Path, tmp_path: Path, way: str) -> None:
    remember_in(tmp_path / "memory")
    before, facts = remembered_digest(settled), settled.stat()
    if way in ("in place", "times set back"):
        settled.write_text("two")
    else:
        other = tmp_path / "other"
        other.write_text("two")
        os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        other.replace(settled)
    if way != "in place":
        os.utime(settled, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert settled.stat().st_size == facts.st_size
    assert remembered_digest(settled) == digest_file(settled) != before


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_in(tmp_path / "memory")

    def read_and_change(path: Path) -> str:
        digest = digest_file(path)
        path.write_text("two")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(digests, "digest_file", read_and_change)
        remembered_digest(settled)
    assert remembered_digest(settled) == digest_file(settled)


@pytest.mark.parametrize("damage", ["digest", "whole", "gone", "folder"])
def test_a_damaged_memory_is_not_believed(settled: Path, reads: list[Path], tmp_path: Path, damage: str) -> None:
    remember_in(tmp_path / "memory")
    digest, database = remembered_digest(settled), tmp_path / "memory/digests.db"
    digests._known.clear()
    if damage == "digest":
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE digests SET digest = ?", ("0" * 64,))
        connection.close()
    elif damage == "whole":
        database.write_bytes(os.urandom(5000))
    else:
        database.unlink()
        if damage == "folder":
            database.mkdir()
    for count in (2, 2 if damage != "folder" else 3):
        assert remembered_digest(settled) == digest
        digests._known.clear()
        if damage == "whole":
            count = len(reads)  # the damaged file is taken away once, and then begun again
        assert len(reads) == count


def test_what_other_files_are_remembered_for_does_not_matter(settled: Path, reads: list[Path], tmp_path: Path) -> None:
    remember_in(tmp_path / "memory")
    (tmp_path / "twin").write_text("two")
    os.link(settled, tmp_path / "linked")
    time.sleep(0.1)
    names = [settled, tmp_path / "twin", tmp_path / "linked"]
    assert [remembered_digest(path) for path in names] == [digest_file(path) for path in names]
    digests._known.clear()
    assert [remembered_digest(path) for path in names] == [digest_file(path) for path in names]
    assert len(reads) == 3

"""Digests of files, remembered: a file that has not changed is not read again, by this process or the next.

As git's index does, a file is known by its place, device, inode, size and times of change. A file that changed just
before it was read is not remembered: it could change again within a tick of the file system's clock, and look the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from pathlib import Path

SETTLED_NS = 2_000_000_000
"""How long ago a file must have changed when it is read: no file system's clock has coarser ticks than 2 s (FAT)."""

_known: dict[str, tuple[str, str]] = {}  # absolute path -> what it was known by, its digest
_memory: Path | None = None


def remember_in(folder: Path) -> None:
    """Keep what is learnt from now on in `digests.db` of a folder, for other processes. It may be deleted any time."""
    global _memory
    _memory = folder / "digests.db"


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read if nobody has since it changed."""
    place, facts = os.path.abspath(path), path.stat()
    mark, began = _mark(facts), time.time_ns()
    known = _known.get(place)
    if known and known[0] == mark:
        return known[1]
    digest = _recall(place, mark)
    if digest is None:
        digest = digest_file(path)
        if max(facts.st_mtime_ns, facts.st_ctime_ns) + SETTLED_NS > began or _mark(path.stat()) != mark:
            return digest
        _store(place, mark, digest)
    _known[place] = mark, digest
    return digest


def _mark(facts: os.stat_result) -> str:
    """What a file is known by. The time of its last change of any kind (ctime) cannot be set back as mtime can."""
    return f"{facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"


def _recall(place: str, mark: str) -> str | None:
    """What another process has learnt, if the record is whole."""
    if _memory is None or not _memory.is_file():
        return None
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(_memory, timeout=1)) as database:
        row = database.execute("SELECT mark, digest, seal FROM digests WHERE place = ?", (place,)).fetchone()
        if row and row[0] == mark and row[2] == _seal(place, mark, row[1]):
            return str(row[1])
    return None


def _store(place: str, mark: str, digest: str) -> None:
    """Leave it for other processes; where that cannot be, they read the file themselves."""
    if _memory is None:
        return
    try:
        _memory.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(_memory, timeout=1)) as database, database:
            database.execute("PRAGMA synchronous = OFF")  # a record that a power cut breaks is seen as broken
            database.execute("CREATE TABLE IF NOT EXISTS digests (place PRIMARY KEY, mark, digest, seal)")
            record = (place, mark, digest, _seal(place, mark, digest))
            database.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", record)
    except (OSError, sqlite3.OperationalError):  # read-only, full, or busy
        return
    except sqlite3.Error:
        _memory.unlink(missing_ok=True)  # damaged: begun again


def _seal(place: str, mark: str, digest: object) -> str:
    return hashlib.blake2b(f"{place}\0{mark}\0{digest}".encode(errors="surrogateescape"), digest_size=8).hexdigest()

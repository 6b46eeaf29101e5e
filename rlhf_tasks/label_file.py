"""The feedback file of `rlhf label`: JSON lines, one a judgement, that are only ever added to.

A line is written whole, with one call, under a lock, and is on disk before anybody is told so. Undoing adds a line that
withdraws another. Several processes may add to one file at a time. It is a source of kind `labels` (docs/data.md).
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import logging
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_tasks.data.fields import LABELS
from rlhf_tasks.data.formats import Compared, parse_row
from rlhf_tasks.data.json_files import read_jsonl
from rlhf_tasks.data.judgements import WITHDRAWN, Judged, standing, text_digest
from rlhf_tasks.data.prompts import prompt_fields
from rlhf_tasks.errors import UserError
from rlhf_tasks.store import full_disk_is_a_sentence, sync_folder

log = logging.getLogger(__name__)


class LabelFile:
    """The judgements of a file, which is made if need be and read again when somebody else has written to it.

    Raises:
        UserError: here or in any method: it cannot be written, or holds a line that is no judgement.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._judged: list[Judged] = []
        self._seen: tuple[int, int, int] | None = None
        self.judged()

    def judged(self) -> list[Judged]:
        """All of them, in the order in which they were made."""
        with self._opened():
            return list(self._judged)

    def add(self, compared: Compared, choice: str, rater: str) -> None:
        """Keep what a rater says of two answers, which are in the order in which they were shown."""
        with self._opened() as file:
            self._add(file, line(compared, choice, rater))

    def undo(self, rater: str, pairs: Container[str]) -> Judged | None:
        """Withdraw what a rater said last of some pairs, and return it; None if nothing stands."""
        with self._opened() as file:
            own = (one for one in reversed(standing(self._judged)) if one.rater == rater and one.pair in pairs)
            last = next(own, None)
            if last is not None:
                compared = Compared(last.prompt, last.answers, last.scores, last.models)
                self._add(file, line(compared, WITHDRAWN, rater))
            return last

    def _add(self, file: int, new: dict[str, Any]) -> None:
        judged = parse_row(str(self.path), new, LABELS)  # what is written can be read
        assert isinstance(judged, Judged)
        _append(file, json.dumps(new, ensure_ascii=False).encode() + b"\n")
        self._judged.append(judged)
        self._seen = _mark(file)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Hold the file, locked and read. Another process, and another thread of this one, waits."""
        with full_disk_is_a_sentence(self.path.parent):
            file = self._locked()
            try:
                if _mark(file) != self._seen:
                    self._judged = self._read(_mend(file, self.path))
                    self._seen = _mark(file)
                yield file
            finally:
                os.close(file)

    def _locked(self) -> int:
        """The file itself, however often it is replaced by another while this waits for its lock."""
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise self._unwritable(error) from None
            fcntl.flock(file, fcntl.LOCK_EX)
            own = os.fstat(file)
            if own.st_nlink > 1:
                os.close(file)
                raise self._shared("a file with other names, which would change with it")
            if self.path.exists() and self.path.stat().st_ino == own.st_ino:
                return file
            os.close(file)

    def _unwritable(self, error: OSError) -> UserError:
        if error.errno == errno.ELOOP:
            return self._shared("a link to another file")
        return UserError(f"{self.path}: cannot be written ({error.strerror}); name another file with `--into`")

    def _shared(self, found: str) -> UserError:
        return UserError(f"{self.path}: found {found}; if it is DVC's, `dvc unprotect {self.path}`, else copy it")

    def _read(self, data: bytes) -> list[Judged]:
        return [_judgement(where, row) for where, row in read_jsonl(self.path, io.BytesIO(data))]


def line(compared: Compared, choice: str, rater: str) -> dict[str, Any]:
    """A judgement as it is written."""
    fields: dict[str, Any] = {"pair": compared.pair, **prompt_fields(compared.prompt)}
    fields |= {"answers": list(compared.answers), "digests": list(map(text_digest, compared.answers))}
    fields |= {"scores": list(compared.scores)} if compared.scores else {}
    fields |= {"models": list(compared.models)} if compared.models else {}
    return fields | {"choice": choice, "rater": rater, "time": datetime.now(UTC).isoformat(timespec="seconds")}


def _judgement(where: str, row: dict[str, Any] | UserError) -> Judged:
    if isinstance(row, UserError):
        raise row
    judged = parse_row(where, row, LABELS)
    assert isinstance(judged, Judged)
    return judged


def _mark(file: int) -> tuple[int, int, int]:
    """What tells that nobody else has written to a file."""
    facts = os.fstat(file)
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _append(file: int, data: bytes) -> None:
    """Add to a file all of it or nothing."""
    size = os.fstat(file).st_size
    try:
        if os.write(file, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def _mend(file: int, path: Path) -> bytes:
    """The whole lines of a file. An end without a line end, as a power cut leaves it, is completed or put aside."""
    data = os.pread(file, os.fstat(file).st_size, 0)
    whole = data.rfind(b"\n") + 1
    torn = data[whole:]
    if not torn:
        sync_folder(path.parent)  # it may be new
        return data
    try:
        json.loads(torn)
    except (ValueError, RecursionError):
        aside = path.with_name(f"{path.name}.torn")
        log.warning("%s: its last line was torn; that part is in %s, all others are whole", path, aside.name)
        with aside.open("ab") as other:
            other.write(torn + b"\n")
            other.flush()
            os.fsync(other.fileno())
        sync_folder(path.parent)
        os.ftruncate(file, whole)
        os.fsync(file)
        return data[:whole]
    _append(file, b"\n")
    return data + b"\n"

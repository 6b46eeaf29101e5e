"""Digests, and the content-addressed store of finished work: `.rlhf/store/<key>/`.

The store is disposable: deleting it costs time, never results. An entry is a manifest (small JSON) and a payload
(safetensors, Arrow and JSON files, prunable). It is written to a temporary folder, synced and renamed, so a
half-written entry never looks whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from rlhf_tasks.digests import digest_file, remembered_digest
from rlhf_tasks.errors import UserError
from rlhf_tasks.processes import process_started

log = logging.getLogger(__name__)

SCHEMA = 1
FULL = "No space left on device|File too large|database or disk is full"  # of libraries that keep no errno
MANIFEST_BYTES = 16 << 20  # a foreign one may be any size
DEEPEST = 20  # of nested parameters, of which each level costs whoever reads them some of the stack


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _File(_Strict):
    size: int
    sha256: str


class _Row(_Strict):
    step: int
    time_ms: int
    values: dict[str, FiniteFloat]


class _Identity(_Strict):
    """All that a key was made from; an iteration's has its number and its parent's key too."""

    stage: str
    parameters: dict[str, Any]
    inputs: dict[str, str]
    code: dict[str, str]
    environment: dict[str, Any]
    iteration: int = Field(default=1, ge=1)
    parent: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")  # it becomes a file's name


class _Manifest(_Strict):
    """What manifest.json has to be; anything else is somebody else's."""

    schema_: int = Field(alias="schema")
    key: str
    identity: _Identity
    digest: str
    parts: dict[str, str]
    files: dict[str, _File]
    metrics: dict[str, FiniteFloat]
    series: list[_Row]
    perf: dict[str, Annotated[FiniteFloat, Field(ge=0)]]
    adopted: str = ""


class DamagedEntry(RuntimeError):
    """An entry's payload is not what its manifest says: it must be made again."""


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no white space, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_path(path: Path) -> str:
    """The digest of a file, or of a folder: SHA-256 over its files' relative names and digests.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: there is something that has no content to digest.
    """
    if path.is_file():
        return remembered_digest(path)
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_dir():
        raise UserError(f"{path}: found neither a file nor a folder: what it holds cannot be keyed")
    return digest_json({name: remembered_digest(path / name) for name in _files(path)})


@dataclass(frozen=True)
class Ref:
    """What crosses a task boundary: whose result it is, where it lies in the store, and its content's digest."""

    stage: str
    path: str
    digest: str


@dataclass(frozen=True)
class Entry:
    """A finished piece of work in the store."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def payload(self) -> Path:
        return self.folder / "payload"

    @property
    def digest(self) -> str:
        """The digest of the whole payload."""
        return self.manifest["digest"]

    @property
    def parts(self) -> dict[str, str]:
        """Digest of each top-level file or folder of the payload, as `digest_path` gives it."""
        return self.manifest["parts"]

    @property
    def ref(self) -> Ref:
        return Ref(self.manifest["identity"]["stage"], self.folder.name, self.digest)

    @property
    def answers(self) -> str:
        """The key that it is the result of: its own, or the one that it was adopted for."""
        return self.manifest.get("adopted") or self.manifest["key"]

    def has_payload(self) -> bool:
        """Whether every file is there with the right size: enough for a hit that nobody reads."""
        sizes = {name: facts["size"] for name, facts in self.manifest["files"].items()}
        return bool(sizes) and sizes == _sizes(self.payload)

    def verify(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            DamagedEntry: a file is missing, differs, or was never part of it.
        """
        if not self.has_payload():
            raise DamagedEntry(f"{self.payload}: not the files that were written there")
        for name, facts in self.manifest["files"].items():
            if digest_file(self.payload / name) != facts["sha256"]:
                raise DamagedEntry(f"{self.payload / name}: not what was written there")

    def prune(self) -> None:
        """Delete the payload, keep the manifest."""
        shutil.rmtree(self.payload, ignore_errors=True)


class Store:
    """Entries by key under one folder, which several processes may share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("locks", "partial", "tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)
            if (root / name).is_symlink():
                raise UserError(f"{root / name}: a link to another place, where nothing of ours is written; delete it")
        self._sweep()

    def _scratch(self, key: str) -> Path:
        """A new name below `tmp`, which says what process it belongs to."""
        pid = os.getpid()
        owner = (socket.gethostname(), str(pid), process_started(pid) or "")
        return self.root / "tmp" / "~".join((key, *owner, uuid.uuid4().hex))

    def _sweep(self) -> None:
        """Remove what processes of this machine that are gone left below `tmp`."""
        for folder in (self.root / "tmp").iterdir():
            match folder.name.split("~"):
                case [_, host, pid, start, _] if host == socket.gethostname() and pid.isdecimal():
                    if process_started(int(pid)) != start:
                        shutil.rmtree(folder, ignore_errors=True)

    def find(self, key: str) -> Entry | None:
        """The entry of a key, if its manifest is whole; its payload may have been pruned."""
        path = self.root / key / "manifest.json"
        try:
            return Entry(path.parent, _read_manifest(path, key))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0][:200]
            log.warning("%s: damaged or foreign, ignored (%s); the work is done again", path, reason)
        return None

    def entries(self) -> Iterator[Entry]:
        """Every entry with a whole manifest."""
        for folder in self.root.iterdir():
            if (folder / "manifest.json").exists() and (entry := self.find(folder.name)):
                yield entry

    def discard(self, key: str) -> None:
        """Remove an entry, whatever its state."""
        with contextlib.suppress(FileNotFoundError):
            doomed = self._scratch(key)
            (self.root / key).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def partial(self, key: str) -> Path:
        """The folder in which unfinished work on a key keeps what it needs to go on after a kill.

        It is made if need be. One that holds a link, or anything but files and folders, is not ours and is removed:
        writing there could change a file anywhere.
        """
        folder = self.root / "partial" / key
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or -1 in _sizes(folder).values())):
            log.warning("%s: holds links or the like, which nothing here writes; removed", folder)
            remove(folder)
        folder.mkdir(exist_ok=True)
        return folder

    def has_partial(self, key: str) -> bool:
        """Whether work on a key was begun and not finished."""
        return (self.root / "partial" / key).exists()

    def forget_partial(self, key: str) -> None:
        """Drop what unfinished work on a key has kept."""
        remove(self.root / "partial" / key)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A fresh folder to fill with a payload; `commit` makes it an entry, leaving without it drops it.

        Raises:
            UserError: the disk is full.
        """
        folder = self._scratch(key)
        with full_disk_is_a_sentence(self.root):
            (folder / "payload").mkdir(parents=True)
            try:
                yield folder / "payload"
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def commit(
        self,
        key: str,
        payload: Path,
        identity: dict[str, Any],
        *,
        metrics: Mapping[str, float],
        series: list[dict[str, Any]],
        perf: Mapping[str, float],
        adopted: str = "",
    ) -> Entry:
        """Make a filled payload the entry of a key: digests, manifest, sync, rename.

        Args:
            identity: all that the key was made from.
            metrics: final numbers, which with the `series` of rows (`step`, `time_ms`, `values`) are shown of it.
            perf: seconds and the like, to which those of digesting and syncing are added as `save_seconds`.
            adopted: the key that it is to answer, if it was taken over from the workspace instead of made.
        """
        started = time.perf_counter()
        digests = {name: digest_file(payload / name) for name in _files(payload)}
        files = {name: {"size": (payload / name).stat().st_size, "sha256": sha} for name, sha in digests.items()}
        folder = payload.parent
        for name in files:
            (payload / name).chmod(0o444)
        _sync(payload)
        perf = dict(perf)
        if files:
            perf["save_seconds"] = perf.get("save_seconds", 0.0) + time.perf_counter() - started
        manifest: dict[str, Any] = {"schema": SCHEMA, "key": key, "identity": identity, "digest": digest_json(digests)}
        manifest |= {"parts": _parts(digests), "files": files, "metrics": metrics, "series": series, "perf": perf}
        manifest |= {"adopted": adopted} if adopted else {}
        while len(text := json.dumps(manifest, allow_nan=False)) > MANIFEST_BYTES and len(manifest["series"]) > 1:
            manifest["series"] = manifest["series"][::-2][::-1]  # of a curve that long every second point will do
        (folder / "manifest.json").write_text(text)
        _sync(folder)
        self.discard(key)
        folder.rename(self.root / key)
        sync_folder(self.root)
        self.forget_partial(key)
        return Entry(self.root / key, manifest)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock that the system drops with its process. Waits for whoever else works on the same key."""
        with open_lock(self.root / "locks" / name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("waiting: another process is working on the same result (%s)", name[:12])
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def open_lock(path: Path) -> BinaryIO:
    """Open a file to lock, made if need be and never changed.

    Raises:
        UserError: it is a link: somebody else's file would be opened.
    """
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path}: a link to another file, expected a lock; delete it") from None


def place(source: Path, target: Path) -> None:
    """Put a file or folder of the store into the workspace, hard-linked where the file system can, else copied."""
    for left in target.parent.glob(f".{target.name}.{'[0-9a-f]' * 32}"):  # by a kill
        remove(left)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with full_disk_is_a_sentence(target.parent):
            staging.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, staging, copy_function=_link_or_copy)
            else:
                _link_or_copy(str(source), str(staging))
        remove(target)
        staging.rename(target)
    finally:
        remove(staging)


@contextlib.contextmanager
def full_disk_is_a_sentence(folder: Path) -> Iterator[None]:
    """Say it plainly when writing below a folder fails for want of space, whichever library wrote.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise UserError(
            f"{folder}: the disk is full ({free:.2f} GB free) or a size limit is reached; make room, then run again: "
            "what is finished is kept"
        ) from None


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(FULL, str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _files(folder: Path) -> list[str]:
    """The files below a folder, by relative name.

    Raises:
        UserError: there is something that has no content to digest, such as a pipe or a link to nothing.
    """
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    for path in found:
        if not path.is_file():
            what = "a link to a folder" if path.is_dir() else "neither a file nor a folder"
            raise UserError(f"{path}: found {what}, expected a file: what it holds cannot be keyed")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _read_manifest(path: Path, key: str) -> dict[str, Any]:
    """A manifest whose parts agree with each other and with its key.

    Raises:
        ValueError: it is not ours, or not whole.
    """
    if path.is_symlink() or path.parent.is_symlink():
        raise ValueError("a link to another place")
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > MANIFEST_BYTES:
        raise ValueError(f"no file, or one of {facts.st_size} bytes")
    manifest: dict[str, Any] = json.loads(path.read_bytes(), parse_constant=_no_such_number)
    if _deeper_than(manifest, DEEPEST):
        raise ValueError(f"nested more than {DEEPEST} deep")
    _Manifest.model_validate(manifest)
    names = manifest["files"]
    if any(not _is_inside(name) for name in names):
        raise ValueError("a file name that leaves its folder")
    digests = {name: facts["sha256"] for name, facts in names.items()}
    found = (manifest["schema"], manifest["key"], manifest["digest"], manifest["parts"])
    if found != (SCHEMA, digest_json(manifest["identity"]), digest_json(digests), _parts(digests)):
        raise ValueError("its digests do not agree")
    if manifest["key"] != key:
        raise ValueError("another key than its folder's name")
    return manifest


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether lists and dictionaries are nested more than `depth` deep."""
    if depth < 0:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_deeper_than(part, depth - 1) for part in inner if isinstance(part, dict | list))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative name; a link, a pipe or the like has -1, as nobody wrote it."""
    found = {} if folder.is_symlink() else {path: path.lstat() for path in folder.rglob("*")}
    return {
        path.relative_to(folder).as_posix(): facts.st_size if stat.S_ISREG(facts.st_mode) else -1
        for path, facts in found.items()
        if not stat.S_ISDIR(facts.st_mode)
    }


def _no_such_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _is_inside(name: str) -> bool:
    """Whether a file name of a manifest stays below its entry's payload."""
    pure = PurePosixPath(name)
    return "\0" not in name and str(pure) == name != "." and not pure.is_absolute() and ".." not in pure.parts


def _parts(digests: Mapping[str, str]) -> dict[str, str]:
    """Digest of each top-level file or folder, as `digest_path` gives it, from every file's."""
    parts: dict[str, str] = {}
    for top in sorted({name.split("/")[0] for name in digests}):
        inner = {name[len(top) + 1 :]: sha for name, sha in digests.items() if name.startswith(top + "/")}
        parts[top] = digest_json(inner) if inner else digests[top]
    return parts


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

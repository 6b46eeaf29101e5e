"""Which local files a source names: one file, a folder or a pattern. Names alone; nothing is read here."""

from __future__ import annotations

import glob
import os
from pathlib import Path, PurePosixPath

from rlhf_tasks.data.texts import printable
from rlhf_tasks.errors import UserError

KINDS = (".json", ".jsonl", ".csv", ".parquet")


def kind_of(path: Path) -> str:
    """The kind of a file by its name, without .gz: `.jsonl`; empty if the name has no ending."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def source_files(path: str, root: Path = Path()) -> list[str]:
    """The files of a source's `path`, in the order in which they are read: by name.

    A folder stands for the files of a known kind at any depth in it, a pattern (`*`, `?`, `[...]`, `**`) for those that
    it matches; hidden ones are left out. Any other path stands for itself, whether it is there or not.

    Raises:
        UserError: a folder or a pattern names no file, or something that is none or has a name that is no text.
    """
    if (root / path).is_dir():
        found, what = _below(path, root), "in this folder"
    elif _is_pattern(path, root):
        found, what = glob.glob(path, root_dir=root, recursive=True), "matches"
    else:
        return [path]
    named = sorted(name for name in found if kind_of(Path(name)) in KINDS and not (root / name).is_dir())
    for name in named:
        if not _is_unicode(name):
            raise UserError(f"{printable(name)}: the name of this file is not UTF-8; rename it")
        if not (root / name).is_file():
            raise UserError(f"{name}: found neither a file nor a folder; take it away, or correct `data.sources`")
    if not named:
        expected = ", ".join(KINDS)
        raise UserError(f"{path}: no file {what} whose name ends in {expected}, with or without .gz; correct the path")
    return named


def watched_path(path: str, root: Path = Path()) -> str:
    """What DVC has to watch, so that a new file is noticed: the path itself, or the folder that a pattern is about."""
    if not _is_pattern(path, root):
        return path
    fixed: list[str] = []
    for part in PurePosixPath(path).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return str(PurePosixPath(*fixed))


def _is_pattern(path: str, root: Path) -> bool:
    """Whether a path has wildcards and is not, brackets and all, the name of what is there."""
    return glob.has_magic(path) and not (root / path).exists()


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _below(folder: str, root: Path) -> list[str]:
    found = []
    for place, folders, files in os.walk(root / folder):
        for name in folders:
            if not name.startswith(".") and Path(place, name).is_symlink():
                raise UserError(f"{Path(place, name)}: found a link to a folder, which is not followed; move the files")
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(root / folder)
        found += [(Path(folder) / inside / name).as_posix() for name in files if not name.startswith(".")]
    return found

"""Rows of human feedback, read lazily from one local file or one pinned Hub data set."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_tasks.errors import UserError

if TYPE_CHECKING:
    from rlhf_tasks.config import Source

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]

LONGEST_CELL = 2**31 - 1
"""Characters in one CSV cell; Python's own limit of 131,072 would refuse long texts."""


def read_rows(source: Source) -> Rows:
    """The rows of one source, each with where it stands, as messages name it.

    Yields:
        `(where, row)`: `where` is `file:17` by line (.jsonl, .csv) or `file:row 17` (.json, .parquet, Hub), from 1.

    Raises:
        UserError: the file is missing, empty, damaged, not UTF-8, or of an unknown kind; a row is not an object.
    """
    rows = read_hub(source) if source.hub is not None else read_file(Path(str(source.path)))
    name = source.hub if source.hub is not None else source.path
    empty = True
    for where, row in rows:
        empty = False
        yield where, row
    if empty:
        raise UserError(f"{name}: holds no rows; fill the file or remove it from `data.sources`")


def read_file(path: Path) -> Rows:
    """The rows of a local .json, .jsonl, .csv or .parquet file, each of them also .gz."""
    zipped = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if zipped else path).suffix.lower()
    reader = READERS.get(kind)
    if reader is None:
        known = ", ".join(READERS)
        raise UserError(f"{path}: unknown kind of file `{kind}`; expected {known}, each also with .gz")
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "not found"
        raise UserError(f"{path}: {found}; correct its path in `data.sources`, relative to the project's folder")
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            yield from reader(path, cast(IO[bytes], file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); copy or download it again") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it; change its access rights") from None


def read_hub(source: Source) -> Rows:
    """The rows of a Hub data set at its pinned revision; no code of the data set is run."""
    import datasets

    name = f"{source.hub}[{source.split}]"
    try:
        data = datasets.load_dataset(str(source.hub), revision=source.revision, split=source.split)
    except Exception as error:  # datasets raises its own, huggingface_hub's, requests' and fsspec's errors
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{source.hub}: could not load split `{source.split}` at revision `{source.revision}`: {reason}; "
            "check the three in `data.sources`, and that the Hub can be reached"
        ) from None
    for number, row in enumerate(data, 1):
        yield f"{name}:row {number}", dict(row)


def _read_json(path: Path, file: IO[bytes]) -> Rows:
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content.count(b"\n", 0, error.start) + 1) from None
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken_json(path, getattr(error, "lineno", 1), error) from None
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise UserError(f'{path}: found {_kind(document)}, expected a list of rows or {{"data": [rows]}}')
    for number, row in enumerate(rows, 1):
        where = f"{path}:row {number}"
        yield where, _object(where, row)


def _read_jsonl(path: Path, file: IO[bytes]) -> Rows:
    for number, line in enumerate(_lines(path, file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _broken_json(path, number, error) from None
        where = f"{path}:{number}"
        yield where, _object(where, row)


def _read_csv(path: Path, file: IO[bytes]) -> Rows:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(_lines(path, file), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "" in header or len(set(header)) < len(header):
            raise UserError(f"{path}:1: found the columns {header}, expected a name for each, and each only once")
        start = reader.line_num + 1
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(f"{where}: found {len(cells)} cells, expected {len(header)}, one for each column")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV ({error}); check the quotes around its cells") from None


def _read_parquet(path: Path, file: IO[bytes]) -> Rows:
    try:
        parquet = pq.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        number = 0
        for batch in parquet.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable Parquet file ({reason}); write it again") from None


READERS: dict[str, Callable[[Path, IO[bytes]], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Decoded lines with their line ends; only \\n ends a line, because texts may hold U+2028 and the like."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _not_utf8(path, number) from None


def _object(where: str, row: object) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {_kind(row)}, expected an object with named fields")
    return row


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _not_utf8(path: Path, line: int) -> UserError:
    return UserError(f"{path}:{line}: not UTF-8; save the file in that encoding, for example with `iconv -t UTF-8`")


def _broken_json(path: Path, line: int, error: Exception) -> UserError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
    hint = "; a file with one object a line must be named .jsonl" if reason == "Extra data" else ""
    return UserError(f"{path}:{line}: broken JSON ({reason}){hint}")

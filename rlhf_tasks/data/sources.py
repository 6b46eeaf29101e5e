"""Rows of human feedback, read lazily from local files or one pinned Hub data set.

What is wrong with a row or a file is handed on in its place, as an item of its own: `prepare` stops at the first, `rlhf
data check` goes on to the next row or, where a file cannot be read on, to the next file.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_tasks.data.files import KINDS, kind_of, source_files
from rlhf_tasks.data.json_files import not_utf8, read_json, read_jsonl
from rlhf_tasks.errors import UserError

if TYPE_CHECKING:
    from rlhf_tasks.config import Source

Row = dict[str, Any]
Items = Iterator[tuple[str, Row | UserError]]
"""Where a row stands, as messages name it, and the row or what is wrong with it."""

LONGEST_CELL = 2**31 - 1
"""Characters in one CSV cell; Python's own limit of 131,072 would refuse long texts."""

METER_ROWS = 256
"""Rows between two looks at how far a file has been read."""


@dataclass
class Meter:
    """How much of some sources has been read, in bytes as they lie on disk; a Hub data set counts for nothing."""

    total: int = 0
    done: int = 0

    @classmethod
    def of(cls, sources: Iterable[Source]) -> Meter:
        """A meter for all of the sources' files; what is missing is left for reading to complain about."""
        meter = cls()
        for path in (source.path for source in sources if source.path is not None):
            try:
                meter.total += sum(Path(file).stat().st_size for file in source_files(path))
            except (UserError, OSError):
                continue
        return meter

    @property
    def fraction(self) -> float:
        """0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0


def source_name(source: Source) -> str:
    """How messages name a source."""
    return str(source.hub if source.hub is not None else source.path)


def read_rows(source: Source, meter: Meter | None = None) -> Items:
    """The first `source.rows` rows of one source, or all, with their fields under the names of docs/data.md.

    Yields:
        `(where, row)`: `where` is `file:17` by line (.jsonl, .csv) or `file:row 17` (.json, .parquet, Hub), from 1; or
        `(where, error)`: a file is missing, empty, damaged, not UTF-8 or of an unknown kind; a row is not an object.
    """
    items = _read_hub(source) if source.hub is not None else _read_files(str(source.path), meter or Meter())
    empty, unseen = True, dict(source.fields)
    for where, row in islice(items, source.rows):
        empty = False
        if source.fields and isinstance(row, dict):
            unseen = {ours: theirs for ours, theirs in unseen.items() if theirs not in row}
            yield where, _renamed(row, source.fields)
        else:
            yield where, row
    name = source_name(source)
    if empty:
        yield name, UserError(f"{name}: holds no rows; fill the file or remove it from `data.sources`")
        return
    for ours, theirs in unseen.items():
        yield (
            name,
            UserError(
                f"{name}: no row has the field `{theirs}`, which `data.sources[].fields` gives for `{ours}`; correct it"
            ),
        )


def _renamed(row: Row, fields: dict[str, str]) -> Row:
    taken = set(fields.values())
    kept = {name: value for name, value in row.items() if name not in taken and name not in fields}
    return kept | {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}


def _read_files(path: str, meter: Meter) -> Items:
    try:
        files = source_files(path)
    except UserError as error:
        yield path, error
        return
    for file in files:
        before = meter.done
        yield from _read_file(Path(file), meter)
        meter.done = before + (Path(file).stat().st_size if Path(file).is_file() else 0)


def _read_file(path: Path, meter: Meter) -> Items:
    """The rows of a local .json, .jsonl, .csv or .parquet file, each of them also .gz."""
    before = meter.done
    try:
        reader = READERS.get(kind_of(path))
        if reader is None:
            known = ", ".join(KINDS)
            raise UserError(f"{path}: unknown kind of file `{kind_of(path)}`; expected {known}, each also with .gz")
        if not path.is_file():
            raise UserError(f"{path}: not found; correct its path in `data.sources`, relative to the project's folder")
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for number, item in enumerate(reader(path, cast(IO[bytes], file))):
                if number % METER_ROWS == 0:
                    meter.done = before + raw.tell()
                yield item
    except UserError as error:
        yield str(path), error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield str(path), UserError(f"{path}: damaged gzip file ({error}); copy or download it again")
    except PermissionError:
        yield str(path), UserError(f"{path}: no permission to read it; change its access rights")


def _read_hub(source: Source) -> Items:
    """The rows of a Hub data set at its pinned revision; no code of the data set is run.

    Where only the first rows are asked for, they are streamed: the rest is never downloaded.
    """
    import datasets

    name, rows = f"{source.hub}[{source.split}]", source.rows
    try:
        data = datasets.load_dataset(
            str(source.hub), revision=source.revision, split=source.split, streaming=rows is not None
        )
        for number, row in enumerate(data if rows is None else data.take(rows), 1):
            yield f"{name}:row {number}", dict(row)
    except Exception as error:  # datasets raises its own, huggingface_hub's, requests' and fsspec's errors
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        yield (
            name,
            UserError(
                f"{source.hub}: could not load split `{source.split}` at revision `{source.revision}`: {reason}; "
                "check the three in `data.sources`, and that the Hub can be reached"
            ),
        )


def _read_csv(path: Path, file: IO[bytes]) -> Items:
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
                error = UserError(f"{where}: found {len(cells)} cells, expected {len(header)}, one for each column")
                yield where, error
                continue
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV ({error}); check the quotes around its cells") from None


def _read_parquet(path: Path, file: IO[bytes]) -> Items:
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


READERS: dict[str, Callable[[Path, IO[bytes]], Items]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Decoded lines with their line ends; only \\n ends a line, because texts may hold U+2028 and the like."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise not_utf8(path, number) from None

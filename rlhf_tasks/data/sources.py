"""Rows of human feedback, read lazily from local files or one pinned Hub data set.

What is wrong with a row or a file is handed on in its place, as an item of its own: `prepare` stops at the first, `rlhf
data check` goes on to the next row or, where a file cannot be read on, to the next file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_tasks.data.fields import FIELDS, LABELLED, inside, swapped
from rlhf_tasks.data.files import KINDS, kind_of, source_files
from rlhf_tasks.data.json_files import not_utf8, read_json, read_jsonl
from rlhf_tasks.data.texts import listed, printable
from rlhf_tasks.errors import UserError

if TYPE_CHECKING:
    from rlhf_tasks.config import Source

Row = dict[str, Any]
Items = Iterator[tuple[str, Row | UserError]]
"""Where a row stands, as messages name it, and the row or what is wrong with it."""

LONGEST_CELL = 2**31 - 1
"""Characters in one CSV cell; Python's own limit of 131,072 would refuse long texts."""

INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
"""Names of the column that pandas writes its index into; it is left out."""

UNREAD = ...
"""What stands for the value of a Parquet column that nobody wants: messages name it."""

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
    """The first `source.rows` rows of one source, or all, with their fields as they are in its files.

    Yields:
        `(where, row)`: `where` is `file:17` by line (.jsonl, .csv) or `file:row 17` (.json, .parquet, Hub), from 1; or
        `(where, error)`: a file is missing, empty, damaged, not UTF-8 or of an unknown kind; a row is not an object; at
        the end, a name of `source.fields` that no row has.
    """
    items = _read_hub(source) if source.hub is not None else _read_files(source, meter or Meter())
    empty, unseen, last = True, dict(source.fields), Row()
    for where, row in islice(items, source.rows):
        empty = False
        if unseen and isinstance(row, dict):
            last, unseen = row, {ours: theirs for ours, theirs in unseen.items() if not inside(row, theirs)}
        yield where, row
    name = source_name(source)
    if empty:
        yield name, UserError(f"{name}: holds no rows; fill the file or remove it from `data.sources`")
    elif last:
        for ours, theirs in unseen.items():
            said = f"no row has the field `{printable(theirs)}`, which `data.sources[].fields` gives for `{ours}`"
            hint = swapped(ours, theirs, last)
            yield name, UserError(f"{name}: {said}; the last one has {listed(last)}; correct it{hint}")


def _read_files(source: Source, meter: Meter) -> Items:
    path, wanted = str(source.path), [*FIELDS, *source.fields.values()]
    wanted += LABELLED if source.kind == "labels" else ()
    try:
        files = source_files(path)
    except UserError as error:
        yield path, error
        return
    for file in files:
        before = meter.done
        yield from _read_file(Path(file), wanted, meter)
        meter.done = before + (Path(file).stat().st_size if Path(file).is_file() else 0)


def _read_file(path: Path, wanted: Sequence[str], meter: Meter) -> Items:
    """The rows of a local .json, .jsonl, .csv or .parquet file, each of them also .gz, as far as columns are wanted."""
    before = meter.done
    try:
        if kind_of(path) not in KINDS:
            known = ", ".join(KINDS)
            raise UserError(f"{path}: unknown kind of file `{kind_of(path)}`; expected {known}, each also with .gz")
        if not path.is_file():
            raise UserError(f"{path}: not found; correct its path in `data.sources`, relative to the project's folder")
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for number, item in enumerate(_items(path, file, wanted)):
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


def _items(path: Path, file: io.BufferedReader | gzip.GzipFile, wanted: Sequence[str]) -> Items:
    if kind_of(path) == ".parquet":
        return _read_parquet(path, file, wanted)
    encoding = json.detect_encoding(file.peek(4)[:4])  # two of the first characters are enough to tell
    if not encoding.startswith("utf-8"):
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        raise UserError(
            f"{path}: found {name}, expected UTF-8; save it so, for example with `iconv -f {name} -t UTF-8`"
        )
    return TEXT_READERS[kind_of(path)](path, cast(IO[bytes], file))


def _read_csv(path: Path, file: IO[bytes]) -> Items:
    csv.field_size_limit(LONGEST_CELL)
    lines = _Lines(file)
    reader = csv.reader(lines, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if lines.take_bad():
            raise not_utf8(path, 1)
        if "" in header[1:] or len(set(header)) < len(header):
            expected = "a name for each, and each only once"
            raise UserError(f"{path}:1: found the columns {listed(header)}, expected {expected}")
        known = [i for i, name in enumerate(header) if not INDEX.fullmatch(name)]
        start = reader.line_num + 1
        for cells in reader:
            number, start = start, reader.line_num + 1
            where = f"{path}:{number}"
            if lines.take_bad():
                yield where, not_utf8(path, number)
            elif cells and len(cells) != len(header):
                error = f"{where}: found {len(cells)} cells, expected {len(header)}, one for each column"
                yield where, UserError(error)
            elif cells:
                yield where, {header[i]: cells[i] for i in known}
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken CSV ({error}); check the quotes around its cells") from None


class _Lines:
    """Decoded lines with their line ends; only \\n ends a line, because texts may hold U+2028 and the like."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._first, self._bad = file, True, False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            encoding, self._first = "utf-8-sig" if self._first else "utf-8", False
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError:
                self._bad = True
                yield line.decode(encoding, "replace")

    def take_bad(self) -> bool:
        """Whether a line since the last call was not UTF-8."""
        bad, self._bad = self._bad, False
        return bad


def _read_parquet(path: Path, file: IO[bytes] | gzip.GzipFile, wanted: Sequence[str]) -> Items:
    """Rows with the columns that are wanted; of others, which may hold what Python cannot, the names alone."""
    try:
        parquet = pq.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        names, number = [name for name in parquet.schema_arrow.names if not INDEX.fullmatch(name)], 0
        if len(set(names)) < len(names):
            raise UserError(f"{path}: found the columns {listed(names)}, expected each only once")
        for batch in parquet.iter_batches(batch_size=1024, columns=list(dict.fromkeys(wanted))):
            unread = dict.fromkeys((name for name in names if name not in batch.schema.names), UNREAD)
            for row in _rows(batch):
                number += 1
                where = f"{path}:row {number}"
                yield where, UserError(f"{where}: {row}") if isinstance(row, str) else row | unread
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable Parquet file ({reason}); write it again") from None


def _rows(batch: pa.RecordBatch) -> Iterator[Row | str]:
    """The rows of a batch; for one that Python cannot hold, what is wrong with it."""
    try:
        yield from batch.to_pylist() if batch.num_columns else ({} for _ in range(batch.num_rows))
    except (UnicodeDecodeError, OverflowError, ValueError):
        if batch.num_rows > 1:  # which of them?
            for number in range(batch.num_rows):
                yield from _rows(batch.slice(number, 1))
            return
        yield next(filter(None, (_unreadable(batch, column) for column in batch.schema.names)), "it cannot be read")


def _unreadable(batch: pa.RecordBatch, column: str) -> str:
    """What is wrong with a column of one row, or nothing."""
    try:
        batch.column(column).to_pylist()
    except UnicodeDecodeError:
        return f"`{printable(column)}` is not UTF-8; write the file again with its texts in that encoding"
    except (OverflowError, ValueError) as error:
        return f"`{printable(column)}` cannot be read ({error}); take this value away"
    return ""


TEXT_READERS: dict[str, Callable[[Path, IO[bytes]], Items]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": _read_csv,
}

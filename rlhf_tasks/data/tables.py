"""Prepared rows on disk: Arrow IPC stream files, memory-mapped when read.

`datasets.Dataset.from_file` opens them too. The same rows give the same bytes: no clock, no compression, no metadata.
A file may be somebody else's, so what is read is checked first: offsets that point elsewhere, or a few compressed bytes
that would fill the memory, are refused.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rlhf_tasks.errors import UserError

BATCH_ROWS = 1024
"""Rows held in memory at a time, and rows a record batch; part of the files' bytes."""

TOKENS = pa.list_(pa.int32())


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write rows, in memory `BATCH_ROWS` at a time, and return how many there were; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, rows = 0, iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(islice(rows, BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a file's table, or all, memory-mapped.

    What they hold is checked: of texts that means to read them whole, of rows of tokens their offsets alone. So who
    trains names the columns of tokens, and what it does not name it cannot get at.

    Raises:
        UserError: the file is no such table.
    """
    try:
        with pa.memory_map(str(path)) as file:
            messages = pa.ipc.MessageReader.open_stream(file)
            schema = pa.ipc.read_schema(messages.read_next_message())
            batches = [_read_batch(message, schema) for message in messages]
        table = pa.Table.from_batches(batches, schema)
        table = table if columns is None else table.select(columns)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, StopIteration, struct.error) as error:
        reason = " ".join(str(error).split())[:200] or "it is empty"
        raise UserError(f"{path}: not a table that `prepare` wrote ({reason}); delete it and run `rlhf run`") from None
    return table


def _read_batch(message: pa.ipc.Message, schema: pa.Schema) -> pa.RecordBatch:
    if message.type != "record batch":
        raise ValueError(f"found a {message.type}, expected a record batch")
    if _is_compressed(message.metadata.to_pybytes()):
        raise ValueError("compressed, which nothing here writes")
    return pa.ipc.read_record_batch(message, schema)


def _is_compressed(metadata: bytes) -> bool:
    """Whether the flatbuffer of a record batch names a codec: Message's field 2 is the RecordBatch, whose field 3 is
    `compression` (format/Message.fbs of Apache Arrow). pyarrow tells only after it has unpacked everything.
    """

    def number(form: str, at: int) -> int:
        return int(struct.unpack_from(form, metadata, at)[0])

    def field(table: int, index: int) -> int:
        """Where in a flatbuffer table a field lies, from the table's start; 0 if it is not there."""
        vtable, slot = table - number("<i", table), 4 + 2 * index
        return number("<H", vtable + slot) if slot < number("<H", vtable) else 0

    message = number("<I", 0)
    reference = message + field(message, 2)
    return field(reference + number("<I", reference), 3) != 0


class TokenColumn(Sequence[npt.NDArray[np.int64]]):
    """One list column of a table as a lazy sequence: each row is an int64 array, made when it is asked for.

    Views into the memory-mapped offsets and values are kept, never the rows.
    """

    def __init__(self, table: pa.Table, column: str) -> None:
        chunks = [chunk for chunk in table.column(column).chunks if len(chunk)]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks]).tolist()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[np.int64]: ...

    @overload
    def __getitem__(self, index: slice) -> list[npt.NDArray[np.int64]]: ...

    def __getitem__(self, index: int | slice) -> npt.NDArray[np.int64] | list[npt.NDArray[np.int64]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        chunk = bisect_right(self._starts, row) - 1
        start, end = self._offsets[chunk][row - self._starts[chunk] :][:2]
        row_ids: npt.NDArray[np.int64] = self._values[chunk][start:end].astype(np.int64)
        return row_ids

    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of every row, [rows], from the offsets alone."""
        parts = [np.diff(offsets).astype(np.int64) for offsets in self._offsets]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return (self[i] for i in range(len(self)))

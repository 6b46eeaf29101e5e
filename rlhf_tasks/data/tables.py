"""Prepared rows on disk: Arrow IPC stream files, memory-mapped when read.

`datasets.Dataset.from_file` opens them too. The same rows give the same bytes: no clock, no compression, no metadata.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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


def read_table(path: Path) -> pa.Table:
    """The table of a file, memory-mapped: nothing is read before it is used."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all()


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

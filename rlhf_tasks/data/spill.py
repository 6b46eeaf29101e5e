"""Rows on their way through `prepare`: their texts wait on disk, and only what decides which of them stay is in memory.

That is some fifty to a hundred bytes a row, so a million pairs need a hundred megabytes however long they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rlhf_tasks.data.texts import normal

SPILL_ROWS = 1024
DIGEST_BYTES = 16


class Text(NamedTuple):
    """A rendered SFT row, and where it came from."""

    prompt: str
    response: str
    where: str


class Pair(NamedTuple):
    """A rendered preference row, and where it came from."""

    prompt: str
    chosen: str
    rejected: str
    margin: float
    where: str


class Ask(NamedTuple):
    """A rendered prompt, what it was rendered from, and where it came from.

    `asked` is the fields of a row (docs/data.md) as JSON; empty where that is `prompt` as it stands.
    """

    prompt: str
    asked: str
    where: str


Row = TypeVar("Row", Text, Pair, Ask)
_TYPES = {"margin": pa.float64()}
_TEXTS = {Text: 1, Pair: 2, Ask: 1}

Digests = npt.NDArray[np.uint64]
"""16-byte digests as two numbers each, `[..., 2]`."""


class Spill(Generic[Row]):
    """Rows of one kind in order of appearance: written once, then read as often as needed, a batch at a time.

    Attributes, but for `kind` once it is sealed:
        kind: the class of its rows.
        heldout: the side of each row, [rows].
        identities: of each row, [rows, 2]; of a pair also that of the pair turned round, in `reversals`.
        texts: the fingerprints of the texts that must not be on both sides, [rows, texts a row, 2].
        kept: which rows stay, [rows]; whoever drops one says so here.
    """

    heldout: npt.NDArray[np.bool_]
    identities: Digests
    reversals: Digests
    texts: Digests
    kept: npt.NDArray[np.bool_]

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self._path = path
        self.kind: type[Row] = kind
        self._schema = pa.schema({name: _TYPES.get(name, pa.string()) for name in kind._fields})
        self._writer = pa.ipc.new_stream(pa.OSFile(str(path), "wb"), self._schema)
        self._buffer: list[Row] = []
        self._sides, self._digests = bytearray(), bytearray()

    def __len__(self) -> int:
        return len(self._sides)

    def add(self, row: Row, heldout: bool, texts: Sequence[bytes]) -> None:
        """Take a row, with the fingerprints of its texts: of a pair two, else one."""
        self._buffer.append(row)
        self._sides.append(heldout)
        self._digests += b"".join([*_identities(row), *texts])
        if len(self._buffer) == SPILL_ROWS:
            self._flush()

    def seal(self) -> None:
        """No row comes after this."""
        self._flush()
        self._writer.close()
        self.heldout = np.frombuffer(self._sides, np.bool_)
        texts, own = _TEXTS[self.kind], 2 if self.kind is Pair else 1
        digests = np.frombuffer(self._digests, np.uint64).reshape(len(self), own + texts, 2)
        self.identities, self.reversals, self.texts = digests[:, 0], digests[:, own - 1], digests[:, own:]
        self.kept = np.ones(len(self), np.bool_)

    def batches(self, wanted: npt.NDArray[np.bool_] | None = None) -> Iterator[list[Row]]:
        """The wanted rows, or all, at most `SPILL_ROWS` at a time."""
        start = 0
        with pa.OSFile(str(self._path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                inside = slice(start, start := start + batch.num_rows)
                if wanted is not None:
                    if not wanted[inside].any():
                        continue
                    batch = batch.filter(pa.array(wanted[inside]))
                columns = [column.to_pylist() for column in batch.columns]
                yield [self.kind(*cells) for cells in zip(*columns, strict=True)]

    def places(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """Where some rows came from, in the order asked for."""
        wanted = np.zeros(len(self), np.bool_)
        wanted[rows] = True
        found = [row.where for batch in self.batches(wanted) for row in batch]
        rank = np.cumsum(wanted) - 1
        return [found[rank[row]] for row in rows]

    def _flush(self) -> None:
        if self._buffer:
            columns = zip(*self._buffer, strict=True)
            arrays = [pa.array(cells, field.type) for cells, field in zip(columns, self._schema, strict=True)]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._buffer.clear()


def _identities(row: Text | Pair | Ask) -> list[bytes]:
    """What stands for a row where margins and places are not compared; of a pair also for the pair turned round."""
    prompt = normal(row.prompt)
    if isinstance(row, Pair):
        chosen, rejected = normal(row.chosen), normal(row.rejected)
        return [_digest(prompt, chosen, rejected), _digest(prompt, rejected, chosen)]
    return [_digest(prompt, normal(row.response)) if isinstance(row, Text) else _digest(prompt)]


def _digest(*texts: str) -> bytes:
    """16 bytes that stand for some texts, and for where one ends and the next begins."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.digest()


def first_like(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """For each row of numbers, [rows, n], the number of the first row that is the same; its own where there is none."""
    rows = len(digests)
    if rows == 0:
        return np.zeros(0, np.int64)
    order = np.lexsort(digests.T[::-1])
    ordered = digests[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    first = np.empty(rows, np.int64)
    first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first

"""Near copies across the split: MinHash over character shingles, found by locality-sensitive hashing (Broder 1997).

Memory is a hundred bytes a text, whatever its length: texts and their places wait on disk, and those that may be near
copies are read back and compared.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlhf_tasks.data.texts import normal

SHINGLE = 5
BANDS, BAND_HASHES = 12, 5
SIMILAR = 0.8
"""Share of shingles in common from which on two texts are near copies; 99 % of those at 0.8 meet in some band."""

BATCH_CHARACTERS = 500_000
COMPARED = 4
"""Training texts that a held-out one is compared with in a band: boilerplate must not take quadratic time."""

_random = np.random.default_rng(0)
_FACTORS = _random.integers(0, 2**63, BANDS * BAND_HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, BANDS * BAND_HASHES, np.uint64)
_POWERS = _random.integers(0, 2**63, SHINGLE, np.uint64) * np.uint64(2) + np.uint64(1)


class NearCopy(NamedTuple):
    """A held-out text and a training text that share most of their shingles, by where they stand."""

    heldout: str
    train: str
    similarity: float


class NearTexts:
    """Texts of both sides; `copies` says which held-out ones have a near copy among the others."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._ends, self._sides = array("q", [0]), bytearray()
        self._keys: list[npt.NDArray[np.uint64]] = []
        self._waiting: list[str] = []
        self._characters = 0

    def add(self, where: str, text: str, heldout: bool) -> None:
        """Take a text; case and white space do not count."""
        text = normal(text).lower()
        content = f"{where}\0{text}".encode()
        self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))
        self._sides.append(heldout)
        self._waiting.append(text)
        self._characters += len(text)
        if self._characters > BATCH_CHARACTERS:
            self._flush()

    def copies(self, wanted: npt.NDArray[np.bool_]) -> list[NearCopy]:
        """Every held-out text that has a near copy in training, with the best that was found.

        Args:
            wanted: which texts count, `[texts]`, in the order in which they were given.
        """
        self._flush()
        self._file.flush()
        sides, found = np.frombuffer(self._sides, np.bool_), dict[int, NearCopy]()
        for band in range(BANDS):
            keys = np.concatenate([batch[:, band] for batch in self._keys] or [np.zeros(0, np.uint64)])
            for rows in _mixed_groups(keys, sides, wanted):
                train = [int(row) for row in rows if not sides[row]][:COMPARED]
                for row in (int(row) for row in rows if sides[row] and int(row) not in found):
                    (where, text), others = self._read(row), map(self._read, train)
                    best, other = max((similarity(text, other), place) for place, other in others)
                    if best >= SIMILAR:
                        found[row] = NearCopy(where, other, best)
        return [found[row] for row in sorted(found)]

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _flush(self) -> None:
        if self._waiting:
            self._keys.append(band_keys(self._waiting))
        self._waiting, self._characters = [], 0

    def _read(self, row: int) -> tuple[str, str]:
        """Where a text stands, and the text."""
        start, end = self._ends[row], self._ends[row + 1]
        content = os.pread(self._file.fileno(), end - start, start).decode()
        where, _, text = content.partition("\0")
        return where, text


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two texts' shingles, 0 to 1."""
    a, b = (
        {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}  # a shorter text is one shingle
        for text in (one, other)
    )
    return len(a & b) / len(a | b)


def band_keys(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """A key a band for each text, `[texts, BANDS]`: near copies share one of them, other texts hardly ever."""
    padded = [text.ljust(SHINGLE, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    windows = np.lib.stride_tricks.sliding_window_view(codes, SHINGLE)
    hashes = windows @ _POWERS
    hashes ^= hashes >> np.uint64(29)
    ends = np.cumsum(lengths)
    inside = np.ones(len(hashes), np.bool_)  # a window over the end of a text is no shingle
    for back in range(1, SHINGLE):
        inside[ends[:-1] - back] = False
    hashes = hashes[inside]
    starts = np.concatenate([[0], np.cumsum(lengths - SHINGLE + 1)[:-1]])
    keys = np.zeros((len(texts), BANDS), np.uint64)
    for number, (factor, offset) in enumerate(zip(_FACTORS, _OFFSETS, strict=True)):
        least = np.minimum.reduceat((hashes * factor + offset) >> np.uint64(32), starts)
        band = number // BAND_HASHES
        keys[:, band] = (keys[:, band] ^ least) * _POWERS[number % BAND_HASHES]
    return keys


def _mixed_groups(
    keys: npt.NDArray[np.uint64], sides: npt.NDArray[np.bool_], wanted: npt.NDArray[np.bool_]
) -> Iterator[npt.NDArray[np.int64]]:
    """The rows of every group with one key that has rows of both sides, as far as rows are wanted."""
    rows = np.flatnonzero(wanted)
    if len(rows) == 0:
        return
    order = rows[np.argsort(keys[rows], kind="stable")]
    starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
    held = np.add.reduceat(sides[order].astype(np.int64), starts)
    sizes = np.diff(np.append(starts, len(order)))
    for group in np.flatnonzero((held > 0) & (held < sizes)):
        yield order[starts[group] : starts[group] + sizes[group]]

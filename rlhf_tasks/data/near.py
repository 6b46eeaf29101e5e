"""Near copies across the split: MinHash over character shingles, found by locality-sensitive hashing (Broder 1997).

Texts, their places and their signatures wait on disk, so that memory is some bytes a text, whatever its length. Those
that look like near copies by their signatures are read back and compared.
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

BATCH_CHARACTERS = 100_000
LOOKED_AT, COMPARED = 64, 4
"""Training texts of a band by whose signatures a held-out one goes, and those of them that it is compared with:
boilerplate must not take quadratic time."""
LIKELY = 0.65
"""Share of hashes in common from which on two texts are compared; 99 % of near copies have it."""

ROW = np.dtype([("keys", np.uint32, BANDS), ("signature", np.uint8, BANDS * BAND_HASHES)])
"""What is kept of a text: a key a band, of which near copies share one or more and other texts few; and a byte of each
of its hashes, of which two texts have about as many in common as shingles."""

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

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._texts, self._rows = (folder / "texts").open("w+b"), (folder / "rows").open("w+b")
        self._ends, self._sides = array("q", [0]), bytearray()
        self._waiting: list[str] = []
        self._characters = 0

    def add(self, where: str, text: str, heldout: bool) -> None:
        """Take a text; case and white space do not count."""
        text = normal(text).lower()
        content = f"{where}\0{text}".encode()
        self._texts.write(content)
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
        self._texts.flush()
        self._rows.flush()
        sides, found = np.frombuffer(self._sides, np.bool_), dict[int, NearCopy]()
        known = np.memmap(self._rows, ROW, "r") if len(sides) else np.zeros(0, ROW)
        for band in range(BANDS):
            for rows in _mixed_groups(known["keys"][:, band], sides, wanted):
                train = rows[~sides[rows]][:LOOKED_AT]
                signatures = known["signature"][train]
                for row in (int(row) for row in rows[sides[rows]] if int(row) not in found):
                    alike = (signatures == known["signature"][row]).mean(axis=1)
                    likely = [int(train[i]) for i in np.argsort(-alike)[:COMPARED] if alike[i] >= LIKELY]
                    if likely and (copy := self._best(row, likely)).similarity >= SIMILAR:
                        found[row] = copy
        return [found[row] for row in sorted(found)]

    def close(self) -> None:
        """Let go of the files."""
        self._texts.close()
        self._rows.close()

    def _flush(self) -> None:
        if self._waiting:
            self._rows.write(signed(self._waiting).tobytes())
        self._waiting, self._characters = [], 0

    def _best(self, row: int, others: Sequence[int]) -> NearCopy:
        (where, text), known = self._read(row), map(self._read, others)
        score, place = max((similarity(text, other), place) for place, other in known)
        return NearCopy(where, place, score)

    def _read(self, row: int) -> tuple[str, str]:
        """Where a text stands, and the text."""
        start, end = self._ends[row], self._ends[row + 1]
        where, _, text = os.pread(self._texts.fileno(), end - start, start).decode().partition("\0")
        return where, text


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two texts' shingles, 0 to 1."""
    a, b = (
        {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}  # a shorter text is one shingle
        for text in (one, other)
    )
    return len(a & b) / len(a | b)


def signed(texts: Sequence[str]) -> npt.NDArray[np.void]:
    """What is kept of some texts, `ROW`, `[texts]`."""
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
    rows, keys = np.zeros(len(texts), ROW), np.zeros((len(texts), BANDS), np.uint64)
    for number, (factor, offset) in enumerate(zip(_FACTORS, _OFFSETS, strict=True)):
        least = np.minimum.reduceat((hashes * factor + offset) >> np.uint64(32), starts)
        band = number // BAND_HASHES
        keys[:, band] = (keys[:, band] ^ least) * _POWERS[number % BAND_HASHES]
        rows["signature"][:, number] = least & np.uint64(255)
    rows["keys"] = keys >> np.uint64(32)
    return rows


def _mixed_groups(
    keys: npt.NDArray[np.uint32], sides: npt.NDArray[np.bool_], wanted: npt.NDArray[np.bool_]
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

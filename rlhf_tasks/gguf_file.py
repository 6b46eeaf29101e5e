"""GGUF files of others: looked at to the last byte count before anything is made of them.

Their own readers believe the counts in them, and would fill the memory for a file that is cut or made up.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_tasks.errors import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_DIMENSIONS = 4
ALIGNMENT = 32
STRING, ARRAY = 8, 9
#: bytes of a value, by the number of its type
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_gguf(path: Path) -> int:
    """See that a file holds all that it says it does. Returns how many weights that is.

    Raises:
        UserError: it is no GGUF file, is cut, or counts what cannot be in it; or the package that reads it is missing.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        raise UserError(f"`model.base: {path}`: to read a GGUF file, `pip install gguf`") from None
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).weights(sizes)
    except (OSError, ValueError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"`model.base: {path}`: not a whole GGUF file ({reason}); expected version 2 or 3: copy or fetch it again"
        ) from None


@contextmanager
def alone(path: Path) -> Iterator[tuple[Path, str]]:
    """A folder in which nothing but this file is, and its name there.

    Loaders also read what lies beside a file, which is in no key.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield Path(folder), "model.gguf"


class _Reader:
    """Goes through a file once; what would lie behind its end is a `ValueError`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place, self.alignment = data, 0, ALIGNMENT

    def weights(self, sizes: dict[int, tuple[int, int]]) -> int:
        """The number of weights in all tensors, each of which lies within the file."""
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("<I")) not in VERSIONS:
            raise ValueError(f"version {version}")
        tensors, fields = self._count(24), self._count(12)
        for _ in range(fields):
            name, kind = self._string(), self._number("<I")
            if name == b"general.alignment" and kind == 4:
                self.alignment = max(1, struct.unpack_from("<I", self.data, self.place)[0])
            self._skip_value(kind)
        found = [self._tensor(sizes) for _ in range(tensors)]
        start = math.ceil(self.place / self.alignment) * self.alignment
        end = max((start + offset + size for offset, size, _ in found), default=start)
        if end > len(self.data):
            raise ValueError(f"its tensors end at byte {end:,}, the file at {len(self.data):,}")
        return sum(elements for _, _, elements in found)

    def _tensor(self, sizes: dict[int, tuple[int, int]]) -> tuple[int, int, int]:
        """Offset, bytes and weights of the next tensor."""
        name, rank = self._string().decode(errors="replace"), self._number("<I")
        if rank > MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name[:60]} has {rank} dimensions")
        elements = math.prod(self._number("<Q") for _ in range(rank))
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in sizes:
            raise ValueError(f"the tensor {name[:60]} is of the unknown type {kind}")
        block, size = sizes[kind]
        return offset, math.ceil(elements / block) * size, elements

    def _skip_value(self, kind: int) -> None:
        if kind in SCALARS:
            self._take(SCALARS[kind])
        elif kind == STRING:
            self._string()
        elif kind == ARRAY:
            of = self._number("<I")
            if of == STRING:
                for _ in range(self._count(8)):
                    self._string()
            elif of in SCALARS:
                self._take(self._count(SCALARS[of]) * SCALARS[of])
            else:
                raise ValueError(f"a list of values of the unknown type {of}")
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def _string(self) -> bytes:
        return self._take(self._count(1))

    def _count(self, size: int) -> int:
        """A count of things that take at least `size` bytes each."""
        count = self._number("<Q")
        if count * size > len(self.data) - self.place:
            raise ValueError(f"it counts {count:,} at byte {self.place:,} of {len(self.data):,}")
        return count

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.place:
            raise ValueError(f"it ends at byte {len(self.data):,}, in the middle of a value")
        self.place += size
        return self.data[self.place - size : self.place]

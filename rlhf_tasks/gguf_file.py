"""GGUF files of others: looked at to the last byte count before anything is made of them.

Their own readers believe the counts in them, and would fill the memory for a file that is cut or made up.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_tasks.errors import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_DIMENSIONS = 4
LAYER = re.compile(r"(?:^|\.)blk\.(\d+)\.")
ALIGNMENT = 32
STRING, ARRAY = 8, 9
TOKENS, KINDS, CONTROL = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", 3
#: whole numbers and bytes of a value, by the number of its type
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 7: "<B", 10: "<Q", 11: "<q"}
SCALARS = {kind: struct.calcsize(form) for kind, form in NUMBERS.items()} | {6: 4, 12: 8}


@dataclass(frozen=True)
class Gguf:
    """What a file says of itself.

    Attributes:
        weights: the number of weights in all tensors.
        numbers: its metadata that are single whole numbers, yes and no included, by their names.
        tokens: the vocabulary.
        control: the tokens of it that are markup, no text.
    """

    weights: int
    numbers: Mapping[str, int]
    tokens: Sequence[str]
    control: Sequence[str]

    def token_id(self, use: str) -> int | None:
        """The id of the token for a use: `bos`, `eos`, `eot`, `unknown`, `padding`."""
        return self.numbers.get(f"tokenizer.ggml.{use}_token_id")

    def token(self, use: str) -> str | None:
        """The token for a use."""
        number = self.token_id(use)
        return None if number is None or number >= len(self.tokens) else self.tokens[number]

    @property
    def positions(self) -> int | None:
        """The most tokens that the model was made for."""
        return self._of_model("context_length")

    @property
    def layers(self) -> int | None:
        """How many layers the model has."""
        return self._of_model("block_count")

    def _of_model(self, name: str) -> int | None:
        """A number that stands under the name of the architecture, whatever that is."""
        return next((n for key, n in self.numbers.items() if key.endswith(f".{name}")), None)


def read_gguf(path: Path) -> Gguf:
    """See that a file holds all that it says it does, and what it says.

    Raises:
        UserError: it is no GGUF file, is cut, or holds other things than it counts; or the package that reads it is
            missing.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError:
        raise UserError(f"`model.base: {path}`: to read a GGUF file, `pip install gguf`") from None
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(
                    f"`model.base: {path}`: no GGUF file, which begins with those letters; expected one, or the folder "
                    "that holds a model's config.json, safetensors and tokenizer"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).read(sizes)
    except UserError:
        raise
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
        self.data, self.place = data, 0

    def read(self, sizes: dict[int, tuple[int, int]]) -> Gguf:
        """All of the header; every tensor lies within the file.

        Args:
            sizes: weights and bytes of a block, by the number of a tensor's type.
        """
        self._take(len(MAGIC))
        if (version := self._number("<I")) not in VERSIONS:
            raise ValueError(f"version {version}")
        tensors, fields = self._count(24), self._count(12)
        numbers: dict[str, int] = {}
        lists: dict[str, list[Any]] = {TOKENS: [], KINDS: []}
        for _ in range(fields):
            name, kind = self._string().decode(errors="replace"), self._number("<I")
            if kind in NUMBERS:
                numbers[name] = self._number(NUMBERS[kind])
            elif kind == ARRAY and name in lists:
                lists[name] = self._list()
            else:
                self._skip_value(kind)
        found = [self._tensor(sizes) for _ in range(tensors)]
        alignment = max(1, numbers.get("general.alignment", ALIGNMENT))
        start = math.ceil(self.place / alignment) * alignment
        self._check_layers(numbers, [name for name, *_ in found])
        end = max((start + offset + size for _, offset, size, _ in found), default=start)
        if end > len(self.data):
            raise ValueError(f"its tensors end at byte {end:,}, the file at {len(self.data):,}")
        control = [token for token, kind in zip(lists[TOKENS], lists[KINDS], strict=False) if kind == CONTROL]
        return Gguf(sum(elements for *_, elements in found), numbers, lists[TOKENS], control)

    def _check_layers(self, numbers: Mapping[str, int], tensors: Sequence[str]) -> None:
        """See that the tensors are those of as many layers as it counts: its readers take no notice of others."""
        layers = max((n for name, n in numbers.items() if name.endswith(".block_count")), default=0)
        if (parts := numbers.get("split.count", 1)) > 1:
            raise ValueError(f"it is one of {parts} files of a model: `llama-gguf-split --merge` makes one of them")
        if layers > len(tensors):
            raise ValueError(f"it says {layers:,} layers and holds {len(tensors):,} tensors")
        held = {int(found[1]) for name in tensors if (found := LAYER.search(name))}
        if held != set(range(layers)):
            raise ValueError(f"it says {layers:,} layers and holds the tensors of {len(held):,}")

    def _tensor(self, sizes: dict[int, tuple[int, int]]) -> tuple[str, int, int, int]:
        """Name, offset, bytes and weights of the next tensor."""
        name, rank = self._string().decode(errors="replace"), self._number("<I")
        if rank > MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name[:60]} has {rank} dimensions")
        elements = math.prod(self._number("<Q") for _ in range(rank))
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in sizes:
            raise ValueError(f"the tensor {name[:60]} is of the unknown type {kind}")
        block, size = sizes[kind]
        return name, offset, math.ceil(elements / block) * size, elements

    def _skip_value(self, kind: int) -> None:
        if kind in SCALARS:
            self._take(SCALARS[kind])
        elif kind == STRING:
            self._string()
        elif kind == ARRAY:
            self._list()
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def _list(self) -> list[Any]:
        """The texts or whole numbers of a list; others are passed over."""
        of = self._number("<I")
        if of == STRING:
            return [self._string().decode(errors="replace") for _ in range(self._count(8))]
        if of not in SCALARS:
            raise ValueError(f"a list of values of the unknown type {of}")
        count = self._count(SCALARS[of])
        packed = self._take(count * SCALARS[of])
        return list(struct.unpack(f"<{count}{NUMBERS[of][1]}", packed)) if of in NUMBERS else []

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

"""Run code on tensors without data, and count what it would need: memory, floating-point operations, bytes moved.

PyTorch's fake tensors have shapes, types and lifetimes but no storage, so the pipeline's own functions can be run at
any size, on any machine, in a second, and every tensor that they would hold is seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
GAPS = 1.25  # measured with glibc: 1.2 to 1.35 times the tensors of a training step


@dataclass(frozen=True)
class Need:
    """What a piece of work needs.

    Attributes:
        peak: bytes of tensors at the worst moment, those that were there before included.
        held: bytes of those that were there before.
        flops: floating-point operations of matrix products and attention, two for a multiplication with its addition.
        moved: bytes that all other operations read and write.
        operations: how many operations there are.
    """

    peak: int = 0
    flops: float = 0.0
    moved: float = 0.0
    operations: float = 0.0
    held: int = 0

    @property
    def memory(self) -> float:
        """Bytes that the process takes for it: tensors that come and go leave gaps."""
        return self.held + GAPS * (self.peak - self.held)

    def __add__(self, other: Need) -> Need:
        """One after the other."""
        larger = max(self, other, key=lambda need: need.memory)
        return Need(
            larger.peak,
            self.flops + other.flops,
            self.moved + other.moved,
            self.operations + other.operations,
            larger.held,
        )

    def times(self, count: float) -> Need:
        """The same work `count` times over."""
        return Need(self.peak, self.flops * count, self.moved * count, self.operations * count, self.held)


@contextmanager
def without_data() -> Iterator[Meter]:
    """Inside, tensors have no data: models of any size are made at once, and the meter counts what is done."""
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        yield meter


class Meter(TorchDispatchMode):
    """Counts of what is run inside it. `held` is the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self._sizes: dict[int, int] = {}
        self._start()

    @contextmanager
    def measure(self) -> Iterator[list[Need]]:
        """Count what is done inside. Yields a list that afterwards holds it."""
        self._start()
        found: list[Need] = []
        yield found
        found.append(Need(self._peak, self._flops, self._moved, self._operations, self._before))

    def _start(self) -> None:
        self._peak, self._flops, self._moved, self._operations = self.held, 0.0, 0.0, 0
        self._before = self.held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (
            func is aten._local_scalar_dense.default
        ):  # `.item()`: any answer will do, but masks are taken to hide something
            return False if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._hold(tensor)
        if func.is_view or not outputs:
            return result
        self._operations += 1
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self._flops += formula(*args, **(kwargs or {}), out_val=result)
        else:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._moved += sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *outputs])
        return result

    def _hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage until nobody has it any more."""
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name not in self._sizes:
            self._sizes[name] = storage.nbytes()
            self.held += self._sizes[name]
            self._peak = max(self._peak, self.held)
            weakref.finalize(storage, self._drop, name)

    def _drop(self, name: int) -> None:
        self.held -= self._sizes.pop(name)

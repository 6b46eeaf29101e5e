"""Memory for gradients that stays, from step to step and from model to model.

PyTorch makes a gradient anew at every step. The system gives fresh memory page by page as it is first touched, and that
takes longer than working the gradients out: on two cores, SmolLM2-135M's weight gradients ran at a fifth of the speed
of the same products into memory that was there. So gradients are added to what is lent here. The largest one, the
embeddings', would still be made whole on the way; its two sources, look-up and tied head, add to it in place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding

from rlhf_tasks.trunk import learning

_Kind = tuple[torch.Size, torch.dtype, torch.device]


class GradientMemory:
    """Room for one model's gradients at a time."""

    def __init__(self) -> None:
        self._free: defaultdict[_Kind, list[Tensor]] = defaultdict(list)

    @contextmanager
    def lent_to(self, model: Any) -> Iterator[None]:
        """Inside, all weights of the model that learn have a gradient, which begins at 0; outside they have none."""
        for module in model.modules():
            if isinstance(module, Embedding):
                look_up_in_place(module)
        weights = learning(model).values()
        for weight in weights:
            free = self._free[_kind(weight)]
            weight.grad = free.pop().zero_() if free else torch.zeros_like(weight)
        try:
            yield
        finally:
            for weight in weights:
                if weight.grad is not None:
                    self._free[_kind(weight)].append(weight.grad)
                    weight.grad = None


def _kind(weight: Tensor) -> _Kind:
    return weight.shape, weight.dtype, weight.device


def look_up_in_place(embeddings: Embedding) -> None:
    """Have plain embeddings, or a kind of them that does more after the look-up, add to their gradient in place."""
    own = type(embeddings)
    unusual = embeddings.max_norm is not None or embeddings.scale_grad_by_freq or embeddings.sparse
    if not issubclass(own, _InPlace) and not unusual:
        embeddings.__class__ = type(own.__name__, (_InPlace,) if own is Embedding else (own, _InPlace), {})


class _InPlace(Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return _LookUp.apply(self.weight, input, self.padding_idx)


class _LookUp(torch.autograd.Function):
    """Rows of a table: weight `[V, d]`, ids of any shape."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, unlearned: int | None) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.unlearned = unlearned
        return weight.index_select(0, ids.flatten()).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        weight, ids = ctx.saved_tensors
        rows, ids = gradient.flatten(0, -2), ids.flatten()
        if ctx.unlearned is not None:
            rows = rows.masked_fill((ids == ctx.unlearned)[:, None], 0)
        if weight.grad is None:
            return torch.zeros_like(weight).index_add_(0, ids, rows), None, None
        weight.grad.index_add_(0, ids, rows)
        return None, None, None

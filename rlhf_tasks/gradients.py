"""Memory for gradients that stays, from step to step and from model to model.

PyTorch makes a gradient anew at every step, in memory that the system gives page by page as it is first touched, and
adds it to what there is in a pass of its own. Here gradients have their memory before they are worked out, and the
products that make them (of linear maps, of the head in head.py) and the embeddings' look-up add to it directly. What
lies there at first is of another step: it is overwritten by the first product, so nobody needs to clear it before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Parameter

from rlhf_tasks.trunk import learning

ALIGNMENT = 16  # elements, so that products begin where vector registers like it
RUN = 2**14  # elements whose squares are added up at once: float32 loses what is added to a sum of far more
STALE = "gradient_is_stale"  # an attribute of a weight: what its gradient's memory holds is no part of the gradient


class GradientMemory:
    """Room for the gradients of one model at a time, one behind the other in one tensor.

    Weights that nothing uses have a gradient too, of 0: AdamW keeps moments of them, and decays them.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0)
        self._used = torch.empty(0)
        self._weights: list[Parameter] = []

    @contextmanager
    def lent_to(self, model: Any) -> Iterator[None]:
        """Inside, the weights of the model that learn have a gradient, outside they have none.

        It begins at 0, but may be read only after `norm`.
        """
        add_in_place(model)
        self._weights = list(learning(model).values())
        sizes = [-(-weight.numel() // ALIGNMENT) * ALIGNMENT for weight in self._weights]
        self._used = self._at_least(-(-sum(sizes) // RUN) * RUN, self._weights[0])
        self._used[sum(sizes) :] = 0
        hooks = []
        for weight, part in zip(self._weights, self._used[: sum(sizes)].split(sizes), strict=True):
            assert weight.is_contiguous()  # AdamW's fused step takes weight, gradient and moments as laid out alike
            part[weight.numel() :] = 0
            weight.grad = part[: weight.numel()].view_as(weight)
            setattr(weight, STALE, True)
            hooks.append(weight.register_hook(lambda _, weight=weight: _clear(weight)))  # before PyTorch adds to it
        try:
            yield
        finally:
            for weight, hook in zip(self._weights, hooks, strict=True):
                hook.remove()
                weight.grad = None
            self._weights = []

    def _at_least(self, size: int, like: Tensor) -> Tensor:
        if self._room.numel() < size or (self._room.dtype, self._room.device) != (like.dtype, like.device):
            self._room = self._used = torch.empty(0)  # before there is the next
            self._room = like.new_empty(size)
        return self._room[:size]

    def norm(self) -> Tensor:
        """The Euclidean norm of all gradients of the model together, a scalar."""
        for weight in self._weights:
            _clear(weight)
        return torch.linalg.vector_norm(torch.linalg.vector_norm(self._used.view(-1, RUN), dim=1))


def add_product(weight: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """Add a product to a weight's gradient, in place if it has memory; else the product is given back."""
    if weight.grad is None:
        return left @ right
    weight.grad.addmm_(left, right, beta=0 if _begin(weight) else 1)
    return None


def _begin(weight: Tensor) -> bool:
    """Whether what the gradient's memory holds is stale; from now on it is not."""
    stale = getattr(weight, STALE, False)
    if stale:
        setattr(weight, STALE, False)
    return stale


def _clear(weight: Tensor) -> None:
    if _begin(weight):
        assert weight.grad is not None
        weight.grad.zero_()


def add_in_place(model: Any) -> None:
    """Have a model's linear maps and embeddings, also kinds of them that do more, add to their gradient in place."""
    for module in model.modules():
        own = type(module)
        for plain, ours in ((Linear, _Linear), (Embedding, _Embedding)):
            if isinstance(module, plain) and not isinstance(module, ours):
                module.__class__ = type(own.__name__, (ours,) if own is plain else (own, ours), {})


class _Linear(Linear):
    def forward(self, input: Tensor) -> Tensor:
        if self.weight.grad is None or not torch.is_grad_enabled():
            return super().forward(input)
        return _Map.apply(input, self.weight, self.bias)


class _Embedding(Embedding):
    def forward(self, input: Tensor) -> Tensor:
        unusual = self.max_norm is not None or self.scale_grad_by_freq or self.sparse
        if self.weight.grad is None or not torch.is_grad_enabled() or unusual:
            return super().forward(input)
        return _LookUp.apply(self.weight, input, self.padding_idx)


class _Map(torch.autograd.Function):
    """Inputs `[..., n]`, weight `[m, n]`, bias `[m]`; the latter two have a gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias)
        return torch.nn.functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        inputs, weight, bias = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        add_product(weight, rows.T, inputs.flatten(0, -2))
        if bias is not None:
            _clear(bias)
            bias.grad += rows.sum(0)
        return gradient @ weight if ctx.needs_input_grad[0] else None, None, None


class _LookUp(torch.autograd.Function):
    """Rows of a table: weight `[V, d]`, which has a gradient; ids of any shape."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, unlearned: int | None) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.unlearned = unlearned
        return weight.index_select(0, ids.flatten()).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        weight, ids = ctx.saved_tensors
        rows, ids = gradient.flatten(0, -2), ids.flatten()
        if ctx.unlearned is not None:
            rows = rows.masked_fill((ids == ctx.unlearned)[:, None], 0)
        _clear(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None

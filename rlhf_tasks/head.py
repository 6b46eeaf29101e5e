"""The Actor's last step, from states to the log-probabilities of tokens, with never more logits than a piece of them.

At a vocabulary of 50,000 the logits of a few hundred tokens take more memory than the model's states by far, and every
pass over them takes longer than the product that made them. So they are made for some tokens at a time, used, and
forgotten; what a token's loss needs, log-probability and entropy, and their gradients are worked out in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_tasks.gradients import add_product

LEAST = -1e4  # e to that is 0, and 0 times it is 0, which 0 times -inf is not
FEW, RUN = range(4, 16), 1024
PIECE_ELEMENTS = 2**23  # logits at a time: 32 MB in float32


@dataclass(frozen=True)
class Head:
    """How states `[n, d]` become logits `[n, V]`: a linear map, and in some models a soft cap (Gemma 2)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    @classmethod
    def of(cls, actor: Any) -> Head:
        linear = actor.get_output_embeddings()
        return cls(linear.weight, linear.bias, getattr(actor.config, "final_logit_softcapping", None))

    def logits(self, states: Tensor) -> Tensor:
        """`[n, d] -> [n, V]`."""
        if (
            len(states) in FEW and self.bias is None
        ):  # for so few, products with short runs of a large matrix are faster
            runs = self.weight.split(RUN)
            logits = torch.cat([torch.nn.functional.linear(states, run) for run in runs], dim=1)
        else:
            logits = torch.nn.functional.linear(states, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def pieces(self, count: int) -> Iterator[slice]:
        """`count` tokens in runs whose logits fit."""
        step = max(1, PIECE_ELEMENTS // self.weight.shape[0])
        return (slice(start, start + step) for start in range(0, count, step))


def measures(
    head: Head, states: Tensor, tokens: Tensor, temperature: float, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, both `[n]`, for states `[n, d]`; no gradient.

    Entropies that are not asked for are 0.
    """
    with torch.no_grad():
        found = [
            _Measures.apply(
                head.weight, states[piece], head.bias, tokens[piece], temperature, head.softcap, with_entropy
            )
            for piece in head.pieces(len(tokens))
        ]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def learn(
    head: Head,
    states: Tensor,
    tokens: Tensor,
    temperature: float,
    loss_of: Callable[[slice, Tensor, Tensor], Tensor],
    *,
    with_entropy: bool = False,
) -> None:
    """Add a loss's gradient to all that made the states, and to the head: that of the head's part piece by piece.

    Args:
        loss_of: of some of the tokens, told which, their log-probabilities and their entropies (0 unless asked for);
            the whole loss is the sum over the pieces.
    """
    leaves = states.detach().requires_grad_()
    for piece in head.pieces(len(tokens)):
        logprobs, entropies = _Measures.apply(
            head.weight, leaves[piece], head.bias, tokens[piece], temperature, head.softcap, with_entropy
        )
        loss_of(piece, logprobs, entropies).backward()
    states.backward(leaves.grad)


class _Measures(torch.autograd.Function):
    """With z the logits over the temperature, p = softmax(z), a the token, H = -Σ p log p:

    log p_a = z_a - log Σ exp z      ∂ log p_a / ∂z = 1[a] - p      ∂H / ∂z = -p (log p + H)

    What is kept of the logits is exp(z - max z), and where the entropy is asked for also z - max z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        states: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        softcap: float | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logits = Head(weight, bias, softcap).logits(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ctx.slope = 1 - (logits / softcap) ** 2 if softcap else None
        if temperature != 1:
            logits /= temperature
        chosen, top = logits.gather(1, tokens[:, None])[:, 0], logits.amax(1)
        shifted = logits.sub_(top[:, None])  # in place, as all that follows: nothing needs the logits any more
        if with_entropy:
            exps = shifted.clamp_(min=LEAST).exp()
            total = exps.sum(1)
            entropy = total.log() - torch.linalg.vecdot(exps, shifted) / total
        else:
            exps = shifted.exp_()
            total = exps.sum(1)
            entropy = torch.zeros_like(total)
        ctx.save_for_backward(weight, states, tokens, total, entropy)
        ctx.exps, ctx.shifted, ctx.with_entropy = exps, shifted, with_entropy
        ctx.has_bias, ctx.temperature = bias is not None, temperature
        return chosen - top - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, for_logprobs: Tensor, for_entropy: Tensor) -> tuple[Tensor | None, ...]:
        weight, states, tokens, total, entropy = ctx.saved_tensors
        exps, shifted, ctx.exps, ctx.shifted = ctx.exps, ctx.shifted, None, None
        if ctx.with_entropy:
            outer = shifted.add_((entropy - total.log())[:, None])  # log p + H
            exps.mul_(outer.mul_(for_entropy[:, None]).add_(for_logprobs[:, None]))
            gradient = exps.div_(-total[:, None])
        else:
            gradient = exps.mul_((-for_logprobs / total)[:, None])
        gradient.scatter_add_(1, tokens[:, None], for_logprobs[:, None])
        if ctx.temperature != 1:
            gradient /= ctx.temperature
        if ctx.slope is not None:
            gradient *= ctx.slope
        gradient = gradient.to(states.dtype)
        for_bias = gradient.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        for_weight = add_product(weight, gradient.T, states) if ctx.needs_input_grad[0] else None
        return for_weight, gradient @ weight, for_bias, None, None, None, None

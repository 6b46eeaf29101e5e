"""A frozen trunk: with `trainable_layers: k` only a model's top k layers and its head learn.

What lies below them is SFT's in all four models. They share it in memory, and what it makes of a text is worked out
once, when the Actor writes that text: `Line.trunk` carries it to everyone who reads the text later, in every epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter

from rlhf_tasks.data.batching import Line
from rlhf_tasks.errors import UserError
from rlhf_tasks.forward import hidden_and_trunk_states, hidden_states, make_trunk
from rlhf_tasks.limits import check_layer_count

FROZEN = "frozen_names"  # an attribute of a model
PROBE = [1, 2, 3]
SAME = 1e-3  # of the states' spread


def freeze_trunk(model: Any, trainable_layers: int, where: str) -> Any:
    """Take all below a model's top layers out of training, its embeddings included, and returns the model.

    A head that is tied to the embeddings stays as it is, too.

    Args:
        where: the setting that asks for it, for messages.

    Raises:
        UserError: the model has not more layers than are to learn, or its layers are not a plain chain.
    """
    try:
        layers = _layers(model)
        check_layer_count(where, trainable_layers, len(layers))
        make_trunk(layers[: len(layers) - trainable_layers])
        above = _above_the_cut(model)
    except UserError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"{where}: {model.config.model_type} models cannot be cut between layers: {reason}") from None
    names = {name for name, weight in model.named_parameters() if id(weight) not in above}
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    setattr(model, FROZEN, frozenset(names))
    return model


def frozen_names(model: Any) -> frozenset[str]:
    """The names of the trunk's weights; none where all of the model may learn."""
    found: frozenset[str] = getattr(model, FROZEN, frozenset())
    return found


def share_trunk(model: Any, owner: Any) -> None:
    """Have a model use the owner's trunk in place of its own, which must be the same."""
    for name in frozen_names(owner):
        module_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module_name), leaf, owner.get_parameter(name))
    if frozen_names(owner):
        model.tie_weights()


def same_trunk(model: Any, owner: Any) -> bool:
    """Whether a model has the owner's trunk, bit for bit."""
    return all(torch.equal(model.get_parameter(name), owner.get_parameter(name)) for name in frozen_names(owner))


def learning(model: Any) -> dict[str, Parameter]:
    """The weights that learn, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _layers(model: Any) -> ModuleList:
    """The layers of a model of transformers, whatever they are called there."""
    count = model.config.num_hidden_layers
    found = [m for m in model.base_model.modules() if isinstance(m, ModuleList) and len(m) == count]
    return found[0]


def _above_the_cut(model: Any) -> set[int]:
    """The weights, by identity, that what the trunk makes of a text goes through; the embeddings are none of them."""
    device = next(model.parameters()).device
    line = Line.of([PROBE], device)
    with torch.no_grad():
        whole, trunk = hidden_and_trunk_states(model, line)
    assert trunk is not None
    with torch.enable_grad():
        known = Line(line.ids, line.lengths, line.starts, trunk.detach())
        states = hidden_states(model, known)
        head = _head(model)
        output = states.sum() if head is None else head(states).sum()
        weights = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(output, weights, allow_unused=True)
    _check(whole, states)
    embeddings = model.get_input_embeddings().weight
    return {id(w) for w, g in zip(weights, found, strict=True) if g is not None and w is not embeddings}


def _head(model: Any) -> Module | None:
    return model.get_output_embeddings() or getattr(model, "score", None)


def _check(whole: Tensor, states: Tensor) -> None:
    """See that the top layers need no more than the trunk's states."""
    if not isinstance(whole, torch._subclasses.FakeTensor) and not (states - whole).abs().max() <= SAME * whole.std():
        raise ValueError("its top layers need more than what the layer below them gives")

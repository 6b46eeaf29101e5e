"""A score that is a Python function: any importable callable that params.yaml names, beside the reward model's score.

It gets the prompts and the responses as texts, a list each, and returns a finite number for every pair.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_tasks.errors import UserError

if TYPE_CHECKING:
    from rlhf_tasks import config

#: B token lists of prompts, B of responses -> scores `[B]`, float32
Score = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor]


def load_reward_function(settings: config.RewardFunction, tokenizer: Any) -> Score | None:
    """The named function over tokens instead of texts; None where none is named.

    Raises:
        UserError: it cannot be imported; later, when it is called: it did not return a finite number a response.
    """
    if settings.name is None:
        return None
    function = _import(settings.name)

    def score(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        texts = [
            tokenizer.batch_decode(list(map(list, rows)), skip_special_tokens=True) for rows in (prompts, responses)
        ]
        return _checked(settings.name, function(*texts), len(responses))

    return score


def _import(name: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a console script starts without it
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"reward_function.name: {name!r} cannot be imported from {here} ({error}); expected `module:function`"
        ) from error
    if not callable(function):
        raise UserError(f"reward_function.name: {name!r} is {type(function).__name__}, expected a function")
    return function


def _checked(name: str | None, scores: Any, count: int) -> Tensor:
    try:
        found = torch.as_tensor(scores, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.shape != (count,) or not found.isfinite().all():
        shown = f"{found.tolist()}"[:80] if found.numel() else repr(scores)[:80]
        raise UserError(f"reward_function {name!r}: returned {shown}, expected {count} finite numbers, one a response")
    return found

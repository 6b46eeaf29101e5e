"""A score that is a Python function: any importable callable that params.yaml names, beside the reward model's score.

It gets the prompts and the responses as texts, a list each, and returns a finite number for every pair.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
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
        UserError: it cannot be imported; later, when it is called: it raised, or returned no finite number a response.
    """
    if settings.name is None:
        return None
    name, function = settings.name, _import(settings.name)

    def score(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        texts = [
            tokenizer.batch_decode(list(map(list, rows)), skip_special_tokens=True) for rows in (prompts, responses)
        ]
        try:
            with torch.no_grad():  # a user's model is not trained by ours
                found = function(*texts)
        except Exception as error:  # whatever a user's code raises
            raise UserError(f"reward_function.name: {name!r} raised {_told(error)}") from error
        return _checked(name, found, len(responses))

    return score


class _Words:
    """Stands in for a tokenizer where only texts are wanted: a row is its own text."""

    def batch_decode(self, rows: list[list[str]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(row) for row in rows]


def try_reward_function(settings: config.RewardFunction) -> list[float] | None:
    """Its scores of two texts, twice the same; None where none is named. Needs no model, so it comes before hours do.

    Raises:
        UserError: it cannot be imported, raised, returned something else than numbers, or other ones the second time.
    """
    score = load_reward_function(settings, _Words())
    if score is None:
        return None
    prompts: Any = [["The", "film", "is"], ["A", "film"]]
    responses: Any = [["good", "!"], ["that", "is", "bad"]]
    first, again = (score(prompts, responses).tolist() for _ in range(2))
    if first != again:
        raise UserError(
            f"reward_function.name: {settings.name!r} gives other scores for the same texts, so no run could be made "
            "again; let it depend on them alone"
        )
    return [float(number) for number in first]


def _import(name: str) -> Callable[[list[str], list[str]], Sequence[float]]:
    module, _, attribute = name.partition(":")
    here = Path.cwd()
    if str(here) not in sys.path:  # a console script starts without it
        sys.path.insert(0, str(here))
    _forget_modules_of(here)
    importlib.invalidate_caches()
    wanted = here.joinpath(*module.split("."))
    files = [path for path in (wanted.with_suffix(".py"), wanted / "__init__.py") if path.exists()]
    try:
        found = importlib.import_module(module)
        file = getattr(found, "__file__", None)
        origin = Path(file) if file else None
        if files and not (origin and any(origin.samefile(file) for file in files)):
            raise UserError(
                f"reward_function.name: Python's own {module!r} ({origin or 'built in'}) is found before {files[0]}; "
                "give that file another name"
            )
        function = getattr(found, attribute)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward_function.name: {name!r} cannot be imported from {here}: {_told(error)}") from error
    if not callable(function):
        raise UserError(f"reward_function.name: {name!r} is {type(function).__name__}, expected a function")
    return function


def _forget_modules_of(folder: Path) -> None:
    """Have the user's modules read again: the key is of what is on disk now, not of what was loaded before."""
    foreign = [Path(path) for path in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())]
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        installed = any(file.is_relative_to(path) for path in foreign)
        mine = file.is_relative_to(folder) and not installed and "site-packages" not in file.parts
        if mine and name.partition(".")[0] not in ("rlhf_tasks", "flows", "__main__"):
            del sys.modules[name]


def _told(error: Exception) -> str:
    """An exception of a user's code in one line, with the place in that code."""
    ours = (__file__, "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    inside = [frame for frame in frames if not Path(frame.filename).is_relative_to(os.path.dirname(importlib.__file__))]
    place = f" ({inside[-1].filename}:{inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def _checked(name: str, scores: Any, count: int) -> Tensor:
    try:
        found = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.shape != (count,) or not found.isfinite().all():
        shown = f"{found.tolist()}"[:80] if found.numel() else repr(scores)[:80]
        raise UserError(
            f"reward_function.name: {name!r} returned {shown}, expected {count} finite numbers, one a response"
        )
    return found

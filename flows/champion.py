"""`rlhf promote` and `rlhf rollback`: a person moves `@champion`, and says why."""

from __future__ import annotations

from pathlib import Path

from flows.console import console
from rlhf_tasks import champion
from rlhf_tasks.config import load_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.tracking import Tracker, answered, is_recorded


def promote(root: Path, version: int, why: str) -> None:
    """Make a version of the project's Actor champion, and say so."""
    name, uri = _registry(root)
    with answered(uri):
        before = champion.promote(name, version, why, uri)
    _say(name, before, version)


def roll_back(root: Path, why: str) -> None:
    """Make the version champion that was it before, and say so."""
    name, uri = _registry(root)
    with answered(uri):
        before, version = champion.roll_back(name, why, uri)
    _say(name, before, version)


def _registry(root: Path) -> tuple[str, str]:
    """The registered model of params.yaml, and the server that has it."""
    name = load_params(root / "params.yaml").register_.name
    if not is_recorded(root):
        raise UserError(
            f"{name}: {root} has no mlflow.db, so nothing is registered; `rlhf run`, or set MLFLOW_TRACKING_URI"
        )
    return name, Tracker(root).uri


def _say(name: str, before: int | None, version: int | None) -> None:
    was = f"before, it was version {before}" if before else "there was none before"
    console.print(f"{name} version {version} is @champion; {was}", soft_wrap=True)

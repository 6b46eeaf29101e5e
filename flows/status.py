"""`rlhf status`: what is done and what is not, without running anything."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from rich.table import Table
from rich.text import Text

from flows.console import console
from rlhf_tasks import engine, versioning
from rlhf_tasks.config import Params
from rlhf_tasks.errors import UserError
from rlhf_tasks.report import headline
from rlhf_tasks.stages import STAGES, Stage


def say_status(root: Path, params: Params) -> None:
    """Print a line for every stage."""
    logging.getLogger("rlhf_tasks").setLevel(logging.ERROR)
    workspace = engine.Workspace(root, params)
    table = Table(show_edge=False, pad_edge=False)
    for column in ("stage", "state", "result", ""):
        table.add_column(column, overflow="fold")
    waiting = ""
    for stage in STAGES.values():
        state, digest, text = _state(workspace, stage)
        if state != "done" and not waiting and _vouched(workspace, stage):
            state, text = "done", "pulled: in dvc.lock and in the workspace"
        if waiting:  # its inputs are about to change
            state, digest, text = "waits", "", f"for {waiting}"
        elif state != "done":
            waiting = stage.name
        table.add_row(stage.name, state, digest[:12], Text(text))
    console.print(table)
    if waiting:
        console.print(f"\n`rlhf run` goes on with {waiting}.")


def _vouched(workspace: engine.Workspace, stage: Stage) -> bool:
    """Whether `rlhf run` would take the workspace's outs over, because dvc.lock vouches for them."""
    try:
        return engine.adoptable(workspace, stage) and stage.name not in _outdated(workspace.root)
    except UserError:  # no DVC here
        return False


@cache
def _outdated(root: Path) -> set[str]:
    return versioning.outdated_stages(root)


def _state(workspace: engine.Workspace, stage: Stage) -> tuple[str, str, str]:
    """`done` and what came out, or `to do` and how far it is."""
    try:
        job = engine.plan(workspace, stage)
    except UserError as error:
        return "to do", "", str(error)
    entry = workspace.store.find(job.key)
    if entry and (engine.exported(workspace, entry) or entry.has_payload()):
        return "done", entry.digest, headline(stage.name, entry.manifest["metrics"])
    if stage.name == "ppo":
        chain = engine.known_iterations(workspace)
        kept = max((i for i, entry in enumerate(chain, start=1) if entry.has_payload()), default=0)
        if kept:
            return "to do", "", f"{kept} of {workspace.params.ppo.iterations} iterations are done"
    if workspace.store.partial(job.key).exists():
        return "to do", "", "begun"
    return "to do", "", engine.why(workspace, job)

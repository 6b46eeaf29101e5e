"""`rlhf status` and `rlhf why`: what is done, what is not, and why, without running anything."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from flows.console import console
from rlhf_tasks.config import Params, as_yaml
from rlhf_tasks.explain import Change, Standing, standings, when
from rlhf_tasks.report import headline
from rlhf_tasks.workspace import Workspace


def say_status(root: Path, params: Params) -> None:
    """Print a line for every stage."""
    found = _standings(root, params)
    table = Table(show_edge=False, pad_edge=False)
    for column in ("stage", "state", "result", ""):
        table.add_column(column, overflow="fold")
    for standing in found:
        table.add_row(standing.stage.name, *_state(standing))
    console.print(table)
    if waiting := next((s.stage.name for s in found if not s.done), None):
        console.print(f"\n`rlhf run` goes on with {waiting}; `rlhf why {waiting}` says what changed.")


def say_why(root: Path, params: Params, name: str) -> None:
    """Print what a stage, and those before it that have to run first, have to run for; without a name, every stage."""
    found = _standings(root, params)
    if not name:
        for standing in found:
            _say(standing)
        return
    wanted = next(i for i, standing in enumerate(found) if standing.stage.name == name)
    if found[wanted].done:
        _say(found[wanted])
        return
    for standing in found[: wanted + 1]:
        if not standing.done and (standing.changes or not standing.waits_for or standing is found[wanted]):
            _say(standing)


def say_unneeded(root: Path, params: Params, *, delete: bool) -> None:
    """Print what the store holds that nothing needs, and delete it if told so."""
    from rlhf_tasks import gc

    workspace = Workspace(root, params)
    found = gc.unneeded(workspace)
    if not found:
        console.print("nothing: all that is stored is needed")
        return
    table = Table(show_edge=False, pad_edge=False)
    for column in ("what", "entries", "frees"):
        table.add_column(column)
    counted: dict[str, list[int]] = {}
    for item in found:
        counted.setdefault(item.what.split(" ")[0], []).append(item.frees)
    for what, frees in counted.items():
        table.add_row(what, str(len(frees)), _megabytes(sum(frees)))
    console.print(table)
    if delete:
        gone = gc.delete(workspace, found)
        busy = f"; {len(found) - len(gone)} are being worked on" if len(gone) < len(found) else ""
        console.print(f"deleted: {_megabytes(sum(item.frees for item in gone))}{busy}")
    else:
        total = _megabytes(sum(item.frees for item in found))
        console.print(f"`rlhf gc --yes` frees {total} of {workspace.store.root}", soft_wrap=True)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _standings(root: Path, params: Params) -> list[Standing]:
    logging.getLogger("rlhf_tasks").setLevel(logging.ERROR)
    return standings(Workspace(root, params))


def _state(standing: Standing) -> tuple[str, str, Text]:
    if standing.waits_for:
        return "waits", "", Text(f"for {standing.waits_for}")
    if standing.entry:
        text = headline(standing.stage.name, standing.entry.manifest["metrics"])
        return "done", standing.entry.digest[:12], Text(text)
    return "done" if standing.done else "to do", "", Text(standing.text)


def _say(standing: Standing) -> None:
    name = standing.stage.name
    if standing.done:
        made = f"{standing.entry.digest[:12]}, of {when(standing.entry)}" if standing.entry else standing.text
        console.print(f"{name}: done ({made}); nothing that it depends on has changed", soft_wrap=True)
        return
    waits = f"waits for {standing.waits_for}" if standing.waits_for else "to do"
    if not standing.changes:
        console.print(f"{name}: {waits}; {standing.text}" if standing.text else f"{name}: {waits}", soft_wrap=True)
        return
    last = f"its result {standing.last.digest[:12]}, of {when(standing.last)}, is" if standing.last else "it was"
    console.print(f"{name}: {waits}; {last} of something else:", soft_wrap=True)
    table = Table(show_edge=False, pad_edge=False, box=None)
    for column in ("", "what", "before", "now"):
        table.add_column(column, overflow="fold")
    for change in standing.changes:
        table.add_row(change.part, Text(change.name), *map(Text, _values(change)))
    console.print(table)


def _values(change: Change) -> tuple[str, str]:
    return tuple(_shown(change.part, value) for value in (change.before, change.now))  # type: ignore[return-value]


def _shown(part: str, value: Any) -> str:
    if value is None:
        return "none"
    return str(value)[:12] if part in ("inputs", "code") else as_yaml(value)

"""Starting a flow from the command line: the server it needs, what Prefect must not print, how it ended."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

from flows.console import console, quiet_prefect
from flows.server import close_dead_flow_runs, owner_tag, server
from rlhf_tasks.stages import stages_between
from rlhf_tasks.workspace import state_folder


class Stopped(Exception):
    """The run was interrupted, by Ctrl-C or a signal to end."""


def run_here(
    root: Path, start: str, until: str, params: dict[str, Any] | None = None, *, refresh: bool = False
) -> None:
    """Run the pipeline's flow in this checkout, and wait for it.

    Args:
        params: written into params.yaml first, by dotted key.

    Raises:
        UserError: what a user can mend.
        Stopped: Ctrl-C or SIGTERM.
    """
    stages_between(start, until)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    new = "PREFECT_API_URL" not in os.environ and not Path(os.environ["PREFECT_HOME"], "prefect.db").exists()
    console.print(
        "[dim]setting up Prefect's database: once, about 20 s[/dim]" if new else "[dim]starting: some seconds[/dim]"
    )
    try:
        _run_on_a_server(root, start, until, params or None, refresh)
    except KeyboardInterrupt:  # before the flow began
        raise Stopped from None


def _run_on_a_server(root: Path, start: str, until: str, params: dict[str, Any] | None, refresh: bool) -> None:
    with server(state_folder(root), meanwhile=lambda: importlib.import_module("flows.pipeline")):
        from prefect import tags

        from flows.pipeline import rlhf_pipeline
        from flows.record import INTERRUPTS

        close_dead_flow_runs()
        quiet_prefect()
        with tags(owner_tag()):
            try:
                rlhf_pipeline(start, until, params, refresh=refresh)
            except INTERRUPTS:
                raise Stopped from None

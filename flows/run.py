"""Starting a flow from the command line: the server it needs, what Prefect must not print, how it ended."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from flows.console import console, quiet_user_errors
from flows.server import close_dead_flow_runs, owner_tag, server
from rlhf_tasks import versioning
from rlhf_tasks.config import load_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.stages import stages_between


class Stopped(Exception):
    """The run was interrupted, by Ctrl-C or a signal to end."""


def run_here(root: Path, start: str, until: str) -> None:
    """Run the pipeline's flow in this checkout, and wait for it.

    Raises:
        UserError: what a user can mend.
        Stopped: Ctrl-C or SIGTERM.
    """
    stages_between(start, until)
    _check_pipeline_file(root)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if "PREFECT_API_URL" not in os.environ and not Path(os.environ["PREFECT_HOME"], "prefect.db").exists():
        console.print("[dim]setting up Prefect's database: once, about 20 s[/dim]")
    with server(root):
        from prefect import tags

        from flows.pipeline import rlhf_pipeline
        from flows.record import INTERRUPTS

        close_dead_flow_runs()
        name = "rlhf-pipeline" if start != until else f"rlhf-{start}"
        with quiet_user_errors(), tags(owner_tag()):
            try:
                rlhf_pipeline.with_options(name=name)(start, until)
            except INTERRUPTS:
                raise Stopped from None


def _check_pipeline_file(root: Path) -> None:
    """Keep dvc.yaml true: its deps follow params.yaml and the code.

    Raises:
        UserError: DVC is running this stage from a dvc.yaml that is out of date.
    """
    if not versioning.update_pipeline(root, load_params(root / "params.yaml")):
        return
    if versioning.inside_stage():
        raise UserError(
            "dvc.yaml did not list what params.yaml and the code say now; it has been brought up to date, "
            "so run the same `dvc` command again"
        )
    console.print("dvc.yaml: brought up to date with params.yaml and the code")

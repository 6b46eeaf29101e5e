"""What Prefect calls when a run did not end well."""

from __future__ import annotations

import logging
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.logging.loggers import flow_run_logger


def say_where_to_look(flow: Any, flow_run: Any, state: Any) -> None:
    """Say, in the run's log and as an artifact, how it ended, what is kept, and how to go on."""
    deployed = flow_run.deployment_id is not None
    again = f"prefect flow-run retry {flow_run.id}" if deployed else "rlhf run"
    text = (
        f"{flow_run.name}: {state.name}. {state.message or ''}\n\n"
        f"What is finished is kept. To go on from there, once the cause is mended: `{again}`. "
        f"What each stage waits for: `rlhf status`. The curves up to here: the MLflow run with the tag "
        f"`prefect.flow_run_id = {flow_run.id}`."
    )
    # The command line says it in a sentence of its own.
    flow_run_logger(flow_run, flow).log(logging.ERROR if deployed else logging.INFO, text)
    create_markdown_artifact(text, key="rlhf-failure", description="Where to look")

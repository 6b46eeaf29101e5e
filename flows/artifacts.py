"""What Prefect's UI shows of a run beside its states: progress, the result's tables, samples, where it came from."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.console import Bar
from rlhf_tasks.report import Report

log = logging.getLogger("rlhf_tasks.flows")

SECONDS_BETWEEN_UPDATES = 5.0


class Progress:
    """A stage's progress, on the terminal and as an artifact of the flow run."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._bar = Bar(stage)
        self._artifact: Any = None
        self._shown, self._at = 0.0, 0.0

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def __call__(self, done: int, total: int, values: dict[str, float]) -> None:
        self._bar(done, total, values)
        percent = 100.0 * done / max(1, total)
        if percent == self._shown or (time.monotonic() - self._at < SECONDS_BETWEEN_UPDATES and done < total):
            return
        text = f"{self.stage}: {done} of {total}"
        self._shown, self._at = percent, time.monotonic()
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(percent, key=f"{self.stage}-progress", description=text)
            else:
                update_progress_artifact(self._artifact, percent, description=text)
        except Exception as error:  # a picture of the work must not end it
            log.info("%s: its progress could not be shown: %s", self.stage, error)


def publish_report(report: Report) -> None:
    """The tables that a run ends with, each as an artifact."""
    for title, columns, rows in report.tables:
        # a table whose first column has no name would lose its heading
        names = [name or "measure" for name in columns]
        create_table_artifact([dict(zip(names, row, strict=True)) for row in rows], key=slug(title), description=title)


def publish_origin(facts: Mapping[str, str]) -> None:
    """Where a run's record is and what it came from: the way from Prefect to MLflow, git and DVC."""
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    create_markdown_artifact(
        "\n".join(["| | |", "|---|---|", *lines]), key="rlhf-origin", description="Record and origin"
    )


def slug(title: str) -> str:
    """An artifact key, of lower-case letters and dashes, that is the same for every run."""
    return "rlhf-" + "-".join(re.findall(r"[a-z]+", title.lower()))

"""docs/metrics.md and what a run writes to MLflow are the same names."""

from __future__ import annotations

import re

from e2e.conftest import REPOSITORY, Project
from mlflow import MlflowClient


def documented_metrics(*, with_function: bool) -> set[str]:
    """The names in the tables' first columns; the last section's only where there is a reward function."""
    text, _, function = (REPOSITORY / "docs/metrics.md").read_text().partition("## With a `reward_function`")
    rows = [line for line in (function if with_function else text).splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_documented_and_emitted_metrics_are_the_same(finished: Project) -> None:
    documented = documented_metrics(with_function=False)
    client = MlflowClient(f"sqlite:///{finished.root}/mlflow.db")
    experiment = client.get_experiment_by_name("rlhf")
    assert experiment is not None
    emitted = {name for run in client.search_runs([experiment.experiment_id]) for name in run.data.metrics}
    # the numbers of both registered models are on them too, under their plain names
    curves = {name for name in documented if "/" not in name}
    emitted -= {name.partition("/")[2] for name in documented if name.startswith(("evaluate/", "reward/"))} - curves
    emitted = {name for name in emitted if not name.startswith("system/")}  # MLflow's own, and the machine's
    assert emitted == documented

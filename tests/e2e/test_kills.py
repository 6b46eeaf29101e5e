"""A run that is killed again and again, at seeded random moments, ends with the bits of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from e2e.conftest import Project, make_project
from mlflow import MlflowClient

KILLS = 6


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(finished: Project, tmp_path: Path, prefect_home: Path) -> None:
    project = make_project(tmp_path / "killed", prefect_home)
    moments = random.Random(0)
    for _ in range(KILLS):
        run = project.start("rlhf", "run")
        try:
            run.wait(timeout=moments.uniform(4, 40))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    done = project.rlhf("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.lock() == finished.lock()
    assert project.dvc("status").stdout.strip() == "Data and pipelines are up to date."
    client = MlflowClient(f"sqlite:///{project.root}/mlflow.db")
    runs = client.search_runs(["1"])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    last = next(run for run in runs if run.info.run_name == "ppo" and run.info.status == "FINISHED")
    curve = client.get_metric_history(last.info.run_id, "objective/score")
    assert [point.step for point in curve] == [1, 2, 3]

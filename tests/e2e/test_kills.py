"""A run that is killed again and again, at seeded random moments, ends with the bits of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from e2e.conftest import Project, make_project
from e2e.servers import wait_until
from e2e.test_doors import STAGES, server_lives
from mlflow import MlflowClient

KILLS = 20
FAULTS = Path(__file__).with_name("faulty.py")
POINTS = (
    "middle_of_an_sft_epoch",
    "middle_of_writing_a_state",
    "between_writing_and_recording",
    "middle_of_dvc_commit",
    "between_version_and_alias",
)


def entries(project: Project) -> dict[str, int]:
    """What is whole in the store, and when it was written."""
    found = (project.root / ".rlhf/store").glob("*/manifest.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def check_is_as_undisturbed(project: Project, finished: Project) -> None:
    """Every bit of every out, DVC's view, and MLflow: dead runs marked, one complete curve in the last."""
    trained = [name for name in STAGES if name != "register"]  # whose gate is another in one of the tests
    assert {name: project.lock()[name] for name in trained} == {name: finished.lock()[name] for name in trained}
    assert project.dvc("status").stdout.strip() == "Data and pipelines are up to date."
    client = MlflowClient(f"sqlite:///{project.root}/mlflow.db")
    runs = client.search_runs(["1"])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    last = next(run for run in runs if run.info.run_name == "ppo" and run.info.status == "FINISHED")
    curve = client.get_metric_history(last.info.run_id, "objective/score")
    assert [point.step for point in curve] == [1, 2, 3]
    assert len(client.search_model_versions("name = 'rlhf-actor'")) == 1
    assert int(client.get_model_version_by_alias("rlhf-actor", "challenger").version) == 1


def test_killed_at_five_points_a_run_ends_with_the_same_bits(
    finished: Project, tmp_path: Path, prefect_home: Path
) -> None:
    """One pipeline, killed with its server at one point after another; what was finished is never done again."""
    project = make_project(tmp_path / "killed", prefect_home)
    project.set(register__gate__min_gain=-100, register__gate__max_kl=1000)
    kept: dict[str, int] = {}
    for point in POINTS:
        run = project.start(sys.executable, str(FAULTS), point, "run")
        output, errors = run.communicate(timeout=300)
        assert run.returncode == -signal.SIGKILL, point + output + errors
        assert entries(project).items() >= kept.items(), point
        kept = entries(project)
        if point == POINTS[0]:
            (state,) = (project.root / ".rlhf/store/partial").glob("*/step-*")
            assert state.name == "step-00000003"
    done = project.rlhf("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert entries(project) == kept  # all that was left to do was to move the alias
    check_is_as_undisturbed(project, finished)
    client = MlflowClient(f"sqlite:///{project.root}/mlflow.db")
    assert int(client.get_model_version_by_alias("rlhf-actor", "champion").version) == 1


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(finished: Project, tmp_path: Path, prefect_home: Path) -> None:
    project = make_project(tmp_path / "killed", prefect_home)
    moments = random.Random(0)
    for _ in range(KILLS):
        run = project.start("rlhf", "run")
        try:
            run.wait(timeout=moments.uniform(4, 30))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    done = project.rlhf("run")
    assert done.returncode == 0, done.stdout + done.stderr
    check_is_as_undisturbed(project, finished)


def in_sft(project: Project) -> bool:
    """Whether SFT has taken its first step."""
    return any(path.stat().st_size for path in (project.root / ".rlhf/store/partial").glob("*/series.jsonl"))


def in_ppo(project: Project) -> bool:
    """Whether PPO's first state is whole."""
    return any((project.root / ".rlhf/store").glob("*/payload/critic_optimizer.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("door", "places"), [(("rlhf", "run"), (in_sft, in_ppo)), (("dvc", "repro"), (in_ppo,))])
def test_ctrl_c_ends_at_once_and_the_run_goes_on_to_the_same_bits(
    finished: Project,
    tmp_path: Path,
    prefect_home: Path,
    door: tuple[str, str],
    places: tuple[Callable[[Project], bool], ...],
) -> None:
    """With the project's own server: Ctrl-C reaches every process of the terminal."""
    project = make_project(tmp_path / "stopped", prefect_home)
    for has_begun in places:
        run = project.start(*door)
        wait_until(partial(has_begun, project), 300, run.communicate)
        kept, started = entries(project), time.monotonic()
        os.killpg(run.pid, signal.SIGINT)
        output, errors = run.communicate(timeout=60)
        assert time.monotonic() - started < 30
        assert run.returncode in ((130,) if door[0] == "rlhf" else (1, 130, 255, -signal.SIGINT)), output + errors
        assert "rlhf: stopped; what is finished is kept" in errors
        assert "Traceback" not in output + errors
        assert not server_lives(project, 10)
        assert entries(project).items() >= kept.items()
        client = MlflowClient(f"sqlite:///{project.root}/mlflow.db")
        assert client.search_runs(["1"], max_results=1)[0].info.status == "KILLED"  # the youngest
    done = project.run(*door)
    assert done.returncode == 0, done.stdout + done.stderr
    assert entries(project).items() >= kept.items()
    check_is_as_undisturbed(project, finished)

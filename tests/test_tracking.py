"""MLflow's record, written to a real SQLite database."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf_tasks import tracking
from rlhf_tasks.errors import UserError
from rlhf_tasks.tracking import Tracker

DIES = """
import sys
from pathlib import Path
from rlhf_tasks.tracking import Tracker

tracker = Tracker(Path(sys.argv[1]))
parent = tracker.start_pipeline({"seed": 0}, {}, "dies")
print(parent, tracker.start_stage(parent, "sft"), flush=True)
sys.stdin.read()
"""


pytestmark = pytest.mark.usefixtures("own_mlflow")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def killed(root: Path) -> list[str]:
    """The runs of two processes that opened an empty project at once, began two runs each and were killed."""
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    runs, printed = [], []
    for process in processes:
        assert process.stdout is not None
        runs.extend(process.stdout.readline().split())
        process.kill()
        printed.append(process.communicate()[1])
    assert printed == ["", ""], "creating the database prints nothing"
    return runs


@pytest.fixture(scope="module")
def tracker(root: Path, killed: list[str]) -> Tracker:
    return Tracker(root)


@pytest.fixture
def run(tracker: Tracker) -> str:
    return tracker.start_pipeline({"seed": 0}, {"git.commit": "abc"}, "try")


def history(tracker: Tracker, run: str, name: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in tracker.client.get_metric_history(run, name)]


def series(steps: int, names: int = 1) -> list[dict[str, object]]:
    return [
        {"step": i, "time_ms": 1_700_000_000_000 + i, "values": {f"objective/m{j}": i + j / 10 for j in range(names)}}
        for i in range(steps)
    ]


def test_server_and_experiment_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.experiment_name() == "rlhf"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    assert tracking.tracking_uri(tmp_path) == "http://127.0.0.1:5000"
    assert tracking.experiment_name() == "other"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("127.0.0.1:5000", "expected http://"),
        ("gopher://somewhere", "expected http://"),
        ("postgresql://user:hidden@127.0.0.1/db", "postgresql://127.0.0.1/db does not answer"),
        ("sqlite:////proc/mlflow.db", "/proc cannot be written to"),
    ],
)
def test_an_address_that_is_none_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, said: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(tracking.Unreachable) as caught:
        Tracker(tmp_path)
    assert said in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_runs_of_killed_processes_are_marked(tracker: Tracker, killed: list[str], run: str) -> None:
    reused = tracker.start_pipeline({}, {}, "an older process with this pid")
    tracker.set_tags(reused, {tracking.PID_STARTED: "1"})
    elsewhere = tracker.start_pipeline({}, {}, "another host")
    tracker.set_tags(elsewhere, {tracking.HOST: "elsewhere", tracking.PID_STARTED: "1"})

    assert len(killed) == 4
    assert set(tracker.close_dead_runs()) == {*killed, reused}
    assert tracker.close_dead_runs() == []
    status = [tracker.client.get_run(name).info.status for name in (*killed, run, elsewhere)]
    assert status == ["KILLED"] * 4 + ["RUNNING"] * 2
    tracker.finish(elsewhere, "FAILED")


def test_a_process_is_known_by_when_it_started() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = tracking.process_started(process.pid)
        assert started is not None
        assert int(started) >= int(tracking.process_started(os.getpid()) or 0)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert tracking.process_started(process.pid) is None, "a zombie is dead"
    assert tracking.process_started(process.pid) is None


def test_stages_are_children_and_a_run_can_go_on(tracker: Tracker, run: str) -> None:
    child = tracker.start_stage(run, "sft", {"key": "k"}, start_ms=1_700_000_000_000)
    found = tracker.client.get_run(child)
    assert found.data.tags["mlflow.parentRunId"] == run
    assert (found.data.tags["rlhf.stage"], found.data.tags["key"]) == ("sft", "k")
    assert (found.info.run_name, found.info.start_time) == ("sft", 1_700_000_000_000)

    tracker.finish(child, "FAILED", end_ms=1_700_000_000_500)
    info = tracker.client.get_run(child).info
    assert (info.status, info.end_time) == ("FAILED", 1_700_000_000_500)

    tracker.finish(run, "FINISHED")
    tracker.set_tags(run, {tracking.PID: "1", tracking.PID_STARTED: "-1"})
    tracker.resume(run)
    parent = tracker.client.get_run(run)
    assert parent.info.status == "RUNNING"
    assert parent.data.tags[tracking.PID] == str(os.getpid())
    assert parent.data.tags[tracking.HOST] == socket.gethostname()
    assert tracker.close_dead_runs() == []


def test_replay_changes_nothing_and_keeps_times(tracker: Tracker, run: str) -> None:
    rows = series(40, names=60)
    for row in rows[:3]:
        tracker.log_series(run, [row])
    tracker.log_series(run, rows)
    once = {name: history(tracker, run, name) for name in ("objective/m0", "objective/m59")}
    tracker.log_series(run, rows)
    assert once == {name: history(tracker, run, name) for name in once}
    assert once["objective/m59"] == [(i, 1_700_000_000_000 + i, i + 5.9) for i in range(40)]
    assert tracker.client.get_run(run).data.metrics["objective/m0"] == 39


def test_final_numbers_are_logged_once(tracker: Tracker, run: str) -> None:
    tracker.log_series(run, series(2))
    for _ in range(2):
        tracker.log_metrics(run, {"accuracy": 0.75, "perf/seconds": 3})
    assert [(step, value) for step, _, value in history(tracker, run, "accuracy")] == [(0, 0.75)]
    assert tracker.client.get_run(run).data.metrics == {"accuracy": 0.75, "perf/seconds": 3, "objective/m0": 1}


def test_what_is_no_number_is_left_out(tracker: Tracker, run: str, caplog: pytest.LogCaptureFixture) -> None:
    values = {"policy/a": math.nan, "policy/b": math.inf, "policy/c(x)": 1.0}
    with caplog.at_level(logging.WARNING, "rlhf_tasks"):
        tracker.log_series(run, [{"step": 0, "time_ms": 1, "values": values}])
    assert tracker.client.get_run(run).data.metrics == {"policy/c_x_": 1.0}
    assert "2 values" in caplog.text
    assert "policy/a, policy/b" in caplog.text


def test_parameters_are_cut_and_never_change(tracker: Tracker, run: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker.log_params(run, {f"data.sources.{i}.path": None for i in range(150)} | {"long": "x" * 7000})
    with caplog.at_level(logging.WARNING, "rlhf_tasks"):
        tracker.log_params(run, {"seed": 1, "long": "x" * 7000, "new": 0.05})
    found = tracker.client.get_run(run).data.params
    assert len(found) == 153
    assert found["data.sources.149.path"] == "None"
    assert (found["seed"], found["new"], found["long"]) == ("0", "0.05", "x" * 6000)
    assert caplog.messages == [f"MLflow run {run} keeps its first value of: seed"]


def test_data_sets_are_inputs(tracker: Tracker, run: str, tmp_path: Path) -> None:
    for _ in range(2):
        tracker.log_dataset(run, "prompts", "d" * 64, "training", tmp_path / "prompts")
    inputs = tracker.client.get_run(run).inputs
    assert inputs is not None
    [found] = inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("prompts", "d" * 36)
    assert json.loads(found.dataset.profile or "") == {"digest": "d" * 64}
    assert json.loads(found.dataset.source) == {"uri": str(tmp_path / "prompts")}
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "training"}


def test_tables_and_files_lie_in_the_project(tracker: Tracker, root: Path, run: str, tmp_path: Path) -> None:
    (tmp_path / "note.md").write_text("# note")
    tracker.log_artifact(run, tmp_path / "note.md")
    tracker.log_artifact(run, tmp_path, "all")
    for answer in ("worse", "better"):
        tracker.log_table(run, "samples.json", ["prompt", "actor"], [["It is", answer]])
    folder = root / "mlartifacts" / run / "artifacts"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == [
        "all/note.md",
        "note.md",
        "samples.json",
    ]
    assert json.loads((folder / "samples.json").read_text())["data"] == [["It is", "better"]]
    tags = tracker.client.get_run(run).data.tags
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]


def test_threads_share_a_tracker(tracker: Tracker, run: str) -> None:
    children = [tracker.start_stage(run, f"thread {i}") for i in range(4)]
    threads = [threading.Thread(target=tracker.log_series, args=(child, series(20))) for child in children]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(history(tracker, child, "objective/m0")) for child in children] == [20] * 4


def test_a_deleted_experiment_is_said(tracker: Tracker, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    other = Tracker(root)
    assert other.experiment_id != tracker.experiment_id
    other.client.delete_experiment(other.experiment_id)
    with pytest.raises(UserError, match=r"gone.*mlflow experiments restore"):
        Tracker(root)

"""What a Prefect user does: deploy, run, watch, cancel, retry, limit, with a real server and a real worker."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.conftest import REPOSITORY, Project
from e2e.servers import running, wait_until
from e2e.test_doors import STAGES, states
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun

LONG = {"sft.epochs": 300}
ENDED = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")


class Deployed:
    """A project whose deployments a worker serves."""

    def __init__(self, project: Project, client: SyncPrefectClient) -> None:
        self.project, self.client = project, client

    def run(self, deployment: str = "pipeline", **parameters: Any) -> FlowRun:
        """Start a deployment through Prefect's command line, and return its run."""
        given = [word for name, value in parameters.items() for word in ("-p", f"{name}={json.dumps(value)}")]
        started = self.project.run("prefect", "deployment", "run", f"rlhf-pipeline/{deployment}", *given)
        assert started.returncode == 0, started.stdout + started.stderr
        found = re.search(r"UUID: ([0-9a-f-]{36})", started.stdout)
        assert found, started.stdout
        return self.client.read_flow_run(found[1])

    def wait_for(self, run: FlowRun, *names: str, seconds: float = 180) -> FlowRun:
        def look() -> FlowRun | None:
            now = self.client.read_flow_run(run.id)
            return now if now.state and now.state.name in names else None

        return wait_until(look, seconds, lambda: f"{self.client.read_flow_run(run.id).state}\n{self.logs(run)}")

    def logs(self, run: FlowRun) -> str:
        wanted = LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
        return "\n".join(log.message for log in self.client.read_logs(wanted, limit=200))

    def task_states(self, run: FlowRun) -> dict[str, str]:
        wanted = FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
        runs = self.client.read_task_runs(flow_run_filter=wanted, task_run_filter=TaskRunFilter())
        return {task.name: task.state_name or "" for task in runs}

    def artifacts(self, run: FlowRun) -> dict[str, Any]:
        wanted = ArtifactFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
        return {artifact.key or "": artifact.data for artifact in self.client.read_artifacts(artifact_filter=wanted)}

    def began_sft(self) -> bool:
        return bool(list((self.project.root / ".rlhf/store/partial").glob("*/series.jsonl")))


@pytest.fixture
def deployed(copy_of: Project, prefect_url: str, tmp_path: Path) -> Iterator[Deployed]:
    pool = copy_of.run("prefect", "work-pool", "create", "rlhf", "--type", "process", "--overwrite")
    assert pool.returncode == 0, pool.stdout + pool.stderr
    deploy = copy_of.run("prefect", "--no-prompt", "deploy", "--all")
    assert deploy.returncode == 0, deploy.stdout + deploy.stderr
    worker = ("prefect", "worker", "start", "--pool", "rlhf")
    log = tmp_path / "worker.log"
    with (
        running(*worker, log=log, cwd=copy_of.root, environment=copy_of.environment),
        SyncPrefectClient(prefect_url) as client,
    ):
        yield Deployed(copy_of, client)


def test_prefect_yaml_deploys_the_pipeline_and_each_stage() -> None:
    document = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    found = {entry["name"]: entry for entry in document["deployments"]}
    assert list(found) == ["pipeline", *STAGES]
    for name, entry in found.items():
        ends = ("prepare", "register") if name == "pipeline" else (name, name)
        assert (entry["parameters"]["start"], entry["parameters"]["until"]) == ends
        assert entry["tags"]
        assert entry["description"]
        assert [schedule["active"] for schedule in entry["schedules"]] == [False]


def test_a_deployment_with_a_changed_parameter(deployed: Deployed) -> None:
    run = deployed.wait_for(deployed.run(params={"ppo.kl.coef": 0.2}), *ENDED)
    assert run.state_name == "Completed", deployed.logs(run)
    assert run.name == "prepare to register ppo.kl.coef=0.2"
    states = deployed.task_states(run)
    assert {name: states[name] for name in STAGES[:3]} == dict.fromkeys(STAGES[:3], "Cached")
    assert {states[name] for name in ("ppo-001", "ppo-003", "ppo", "evaluate", "register")} == {"Completed"}
    assert "sft: cached" in deployed.logs(run)
    assert "ppo: done" in deployed.logs(run)

    artifacts = deployed.artifacts(run)
    assert artifacts["ppo-progress"] == 100
    assert "reward score" in artifacts["rlhf-sft-against-actor-on-held-out-prompts"]
    assert "prompt" in artifacts["rlhf-held-out-prompts-both-answers"]
    client = MlflowClient(f"sqlite:///{deployed.project.root}/mlflow.db")
    found = client.search_runs(["1"], f"tags.`prefect.flow_run_id` = '{run.id}' and tags.`rlhf.session` != ''")
    assert [one.info.run_id in artifacts["rlhf-origin"] for one in found] == [True]

    # the other door, beside it, on the same parameters
    other = deployed.project.dvc("repro")
    assert other.stdout.count("didn't change, skipping") == len(STAGES), other.stdout


@pytest.mark.slow
def test_a_failed_run_says_where_to_look_and_a_retry_goes_on(deployed: Deployed) -> None:
    raw = deployed.project.root / "data/raw/movie_reviews.jsonl.gz"
    away = raw.with_name("away")
    raw.rename(away)
    run = deployed.wait_for(deployed.run(params={"ppo.kl.coef": 0.3}), *ENDED)
    assert run.state_name == "Failed"
    assert run.state is not None
    assert "movie_reviews.jsonl.gz: not found" in (run.state.message or "")
    remedy = f"prefect flow-run retry {run.id}"  # said by a hook, after the state is set
    wait_until(lambda: remedy in deployed.logs(run), 30, lambda: deployed.logs(run))
    wait_until(lambda: remedy in deployed.artifacts(run).get("rlhf-failure", ""), 10, "no artifact says where to look")
    away.rename(raw)
    retried = deployed.project.run("prefect", "flow-run", "retry", str(run.id))
    assert retried.returncode == 0, retried.stdout + retried.stderr
    again = deployed.wait_for(run, "Completed")
    assert again.run_count == 2
    assert deployed.project.dvc("status").stdout.strip() == "Data and pipelines are up to date."


@pytest.mark.slow
def test_a_cancelled_run_leaves_nothing_broken(deployed: Deployed) -> None:
    lock = deployed.project.lock()
    run = deployed.run("sft", params=LONG)
    wait_until(deployed.began_sft, 120, lambda: deployed.logs(run))
    cancelled = deployed.project.run("prefect", "flow-run", "cancel", str(run.id))
    assert cancelled.returncode == 0, cancelled.stdout + cancelled.stderr
    deployed.wait_for(run, "Cancelled")
    client = MlflowClient(f"sqlite:///{deployed.project.root}/mlflow.db")
    wait_until(lambda: "RUNNING" not in {r.info.status for r in client.search_runs(["1"])}, 30, "a run stays RUNNING")
    newest = client.search_runs(["1"], "tags.`rlhf.stage` = 'sft'", max_results=1)[0]
    assert newest.info.status == "KILLED"
    assert deployed.project.lock() == lock
    back = deployed.run(params={"sft.epochs": 1})
    deployed.wait_for(back, "Completed")
    assert deployed.project.lock() == lock
    assert {deployed.task_states(back)[name] for name in STAGES} == {"Cached"}


@pytest.mark.slow
def test_time_is_up(deployed: Deployed) -> None:
    run = deployed.wait_for(deployed.run("sft", params=LONG, timeout_minutes=0.3), *ENDED)
    assert run.state_name == "Failed"
    assert run.state is not None
    assert "stopped after `timeout_minutes: 0.3`" in (run.state.message or "")
    kept = list((deployed.project.root / ".rlhf/store/partial").glob("*"))
    assert kept, "what a retry goes on from"


@contextmanager
def limit_of_one(project: Project) -> Iterator[None]:
    """The global concurrency limit `rlhf-cpu`, with one slot."""
    created = project.run("prefect", "gcl", "create", "rlhf-cpu", "--limit", "1")
    assert created.returncode == 0, created.stdout + created.stderr
    try:
        yield
    finally:
        project.run("prefect", "--no-prompt", "gcl", "delete", "rlhf-cpu")


@pytest.mark.slow
def test_a_concurrency_limit_of_the_device_is_honoured(deployed: Deployed) -> None:
    with limit_of_one(deployed.project):
        taken = deployed.client.increment_concurrency_slots(["rlhf-cpu"], 1, "concurrency")
        assert taken.status_code == 200
        run = deployed.run("sft", params={"seed": 1})
        wait_until(lambda: "waiting for a slot" in deployed.logs(run), 60, lambda: deployed.logs(run))
        time.sleep(5)
        assert not deployed.began_sft()
        assert deployed.client.read_flow_run(run.id).state_name == "Running"
        deployed.client.release_concurrency_slots(["rlhf-cpu"], 1, 1.0)
        deployed.wait_for(run, "Completed")
        limit = deployed.client.read_global_concurrency_limit_by_name("rlhf-cpu")
        assert limit.active_slots == 0


@pytest.mark.slow
def test_a_killed_run_frees_its_slot(copy_of: Project) -> None:
    """Its lease is renewed no more, so the next run has it a minute later; Ctrl-C ends the waiting."""
    with limit_of_one(copy_of):
        killed = copy_of.start("rlhf", "run", "--set", "sft.epochs=300")
        partial = copy_of.root / ".rlhf/store/partial"
        wait_until(lambda: list(partial.glob("*/series.jsonl")), 120, "the first run does not train")
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()

        impatient = copy_of.start("rlhf", "run", "--set", "sft.epochs=1", "--set", "seed=1")
        assert impatient.stdout is not None
        assert any("waiting for a slot" in line for line in impatient.stdout)
        os.killpg(impatient.pid, signal.SIGINT)
        output, errors = impatient.communicate(timeout=60)
        assert impatient.returncode == 130, output + errors
        assert "Traceback" not in output + errors

        patient = copy_of.rlhf("run")
        assert states(patient.stdout)["ppo"] == "done", patient.stdout + patient.stderr

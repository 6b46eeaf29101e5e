"""What an MLflow user finds: curves, links, a served model; a server elsewhere, and one that is not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import openai
import pytest
from e2e.conftest import Project
from e2e.servers import free_port, running, wait_until
from e2e.test_doors import STAGES, manifests, states
from mlflow import MlflowClient

from rlhf_tasks.digests import digest_file

CACHED = dict.fromkeys(STAGES, "cached")


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A tracking server with an artifact store of its own; yields its URL."""
    folder.mkdir()
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    store = ("--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "store"))
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    log, health = folder / "log", f"{url}/health"
    with running(*command, *store, log=log, health=health, cwd=folder, environment=environment) as process:
        yield url, process


def invoke(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@contextmanager
def served_by_mlflow(project: Project, model: str, log: Path) -> Iterator[str]:
    """`mlflow models serve`; yields its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = ("mlflow", "models", "serve", "-m", model, "--env-manager", "local", "--host", "127.0.0.1")
    with running(*command, "--port", str(port), log=log, health=f"{url}/health", environment=project.environment):
        yield url


def test_runs_can_be_compared_and_lead_everywhere(finished: Project) -> None:
    client = MlflowClient(f"sqlite:///{finished.root}/mlflow.db")
    runs = client.search_runs(["1"])
    assert len(runs) == 1 + len(STAGES), "a run a pipeline and a run a stage, no more"
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    stages = {run.info.run_name: run for run in runs if run is not parent}
    # what one compares pipelines by is on the parent, what one compares stages by on theirs
    assert parent.data.metrics["evaluate/kl_sequence"] == finished.metrics("evaluate")["kl_sequence"]
    assert parent.data.metrics["objective/score"] == stages["ppo"].data.metrics["objective/score"]
    assert stages["ppo"].data.params["ppo.kl.coef"] == parent.data.params["ppo.kl.coef"] == "0.05"
    assert "sft.epochs" not in stages["ppo"].data.params
    for name in ("sft", "ppo"):
        assert stages[name].data.metrics["system/cpu_utilization_percentage"] >= 0
    tags = parent.data.tags
    assert {"mlflow.source.git.commit", "rlhf.git_dirty", "rlhf.dvc_lock", "prefect.flow_run_id"} <= set(tags)
    assert tags["prefect.flow_run_name"] == "prepare to register"
    assert tags["rlhf.dvc_lock"] == digest_file(finished.root / "dvc.lock")
    datasets = {entry.dataset.name: entry.dataset for entry in stages["sft"].inputs.dataset_inputs}
    assert json.loads(datasets["data/prepared/sft"].profile)["digest"].startswith(datasets["data/prepared/sft"].digest)
    models = {model.name: model for model in client.search_logged_models(["1"])}
    assert models.keys() == {"rlhf-actor", "rlhf-reward"}
    model = models["rlhf-actor"]
    linked = {metric.key: metric.value for metric in model.metrics}
    assert linked["kl_sequence"] == finished.metrics("evaluate")["kl_sequence"]


@pytest.mark.slow
def test_a_server_elsewhere_and_a_served_champion(copy_of: Project, tmp_path: Path) -> None:
    """By environment alone: another server, its own artifact store, another experiment; then `mlflow models serve`."""
    copy_of.set(register__gate__min_gain=-10.0)
    with mlflow_server(tmp_path / "server") as (url, _):
        copy_of.environment |= {"MLFLOW_TRACKING_URI": url, "MLFLOW_EXPERIMENT_NAME": "second"}
        done = copy_of.rlhf("run")
        assert states(done.stdout) == CACHED | {"register": "done"}, done.stdout + done.stderr
        client = MlflowClient(url)
        experiment = client.get_experiment_by_name("second")
        assert experiment is not None
        (ppo,) = client.search_runs([experiment.experiment_id], "tags.`rlhf.stage` = 'ppo'")
        assert [point.step for point in client.get_metric_history(ppo.info.run_id, "objective/kl")] == [1, 2, 3]
        assert list((tmp_path / "server/store").rglob("model.safetensors"))
        assert client.get_model_version_by_alias("rlhf-actor", "champion").version == "1"

        with served_by_mlflow(copy_of, "models:/rlhf-actor@champion", tmp_path / "serve.log") as served:
            long = invoke(served, inputs=["This film is", "The plot"])
            assert len(long["predictions"]) == 2
            assert all(isinstance(text, str) and "This film is" not in text for text in long["predictions"])
            short = invoke(served, inputs=["This film is"], params={"max_new_tokens": 1})
            assert len(short["predictions"][0]) < max(len(text) for text in long["predictions"])
        with served_by_mlflow(copy_of, "models:/rlhf-reward/1", tmp_path / "reward.log") as served:
            row = {"prompt": "This film is", "response": " good."}
            [score] = invoke(served, dataframe_records=[row])["predictions"]
            assert score.keys() == {"score", "normalised"}
            with pytest.raises(urllib.error.HTTPError, match="400"):
                invoke(served, dataframe_records=[row | {"response": "x" * 9999}])

        # the server of its own, which gets the files from there
        url = f"http://127.0.0.1:{(port := free_port())}"
        command = ("rlhf", "serve", "--port", str(port))
        log, health = tmp_path / "rlhf.log", f"{url}/health"
        with running(*command, log=log, health=health, cwd=copy_of.root, environment=copy_of.environment):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            answer = client.completions.create(model="rlhf-actor@champion", prompt="This film is", temperature=0)
            assert answer.usage is not None
            assert 0 < answer.usage.completion_tokens <= 8


def test_a_server_that_is_down(copy_of: Project) -> None:
    """Stop before anything runs, or train unrecorded; what is missing is recorded by the next run."""
    before = manifests(copy_of)
    down = f"http://user:hidden@127.0.0.1:{free_port()}"
    at_home = dict(copy_of.environment)
    copy_of.environment |= {"MLFLOW_TRACKING_URI": down}
    copy_of.set(ppo__kl__coef=0.2)
    stopped = copy_of.rlhf("run")
    assert stopped.returncode == 2, stopped.stderr
    assert "does not answer (connection refused)" in stopped.stderr
    assert "tracking.when_down" in stopped.stderr
    assert manifests(copy_of) == before

    going_on = copy_of.rlhf("run", "--set", "tracking.when_down=continue")
    assert going_on.returncode == 0, going_on.stderr
    assert states(going_on.stdout)["ppo"] == "done"
    assert "nothing is recorded or registered" in going_on.stderr + going_on.stdout
    for output in (stopped, going_on):
        assert "Traceback" not in output.stderr + output.stdout
        assert "hidden" not in output.stderr + output.stdout

    copy_of.environment = at_home
    recorded = copy_of.rlhf("run")
    assert states(recorded.stdout) == CACHED, recorded.stderr
    client = MlflowClient(f"sqlite:///{copy_of.root}/mlflow.db")
    version = client.get_model_version_by_alias("rlhf-actor", "challenger")
    assert version.tags["actor_digest"] == copy_of.metrics("register")["actor_digest"]


@pytest.mark.slow
def test_a_server_that_is_down_under_dvc(copy_of: Project) -> None:
    """The setting holds behind `dvc repro` too."""
    copy_of.environment |= {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}
    copy_of.set(ppo__kl__coef=0.2)
    lock = copy_of.lock()
    stopped = copy_of.dvc("repro", "ppo")
    assert stopped.returncode != 0
    assert "does not answer (connection refused)" in stopped.stderr
    assert copy_of.lock() == lock
    copy_of.set(tracking__when_down="continue")
    going_on = copy_of.dvc("repro", "ppo")
    assert going_on.returncode == 0, going_on.stdout + going_on.stderr
    assert copy_of.lock()["ppo"] != lock["ppo"]
    assert copy_of.lock()["sft"] == lock["sft"]


@pytest.mark.slow
def test_a_server_that_goes_away_while_training(copy_of: Project, tmp_path: Path) -> None:
    copy_of.set(sft__epochs=40)
    with mlflow_server(tmp_path / "server") as (url, server):
        copy_of.environment |= {"MLFLOW_TRACKING_URI": url}
        run = copy_of.start("rlhf", "run")
        partial = copy_of.root / ".rlhf/store/partial"
        wait_until(lambda: list(partial.glob("*/series.jsonl")), 120, lambda: run.communicate())
        os.killpg(server.pid, signal.SIGKILL)
        output, errors = run.communicate(timeout=300)
    assert run.returncode == 2, output + errors
    assert "all stages are done and in dvc.lock, but not all is recorded" in errors
    assert "Traceback" not in output + errors
    assert copy_of.dvc("status").stdout.strip() == "Data and pipelines are up to date."
    with mlflow_server(tmp_path / "another") as (url, server):
        copy_of.environment |= {"MLFLOW_TRACKING_URI": url}
        again = copy_of.rlhf("run")
        assert states(again.stdout) == CACHED, again.stderr
        (sft,) = MlflowClient(url).search_runs(["1"], "tags.`rlhf.stage` = 'sft'")
        steps = [point.step for point in MlflowClient(url).get_metric_history(sft.info.run_id, "loss")]
        assert steps == sorted(set(steps))
        assert len(steps) > 40


def test_something_else_listens_there(copy_of: Project) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    other = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    Thread(target=other.serve_forever, daemon=True).start()
    copy_of.environment |= {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{other.server_port}"}
    started = time.monotonic()
    done = copy_of.rlhf("run")
    other.shutdown()
    assert (done.returncode, "knows no MLflow API" in done.stderr) == (2, True), done.stderr
    assert time.monotonic() - started < 90


@pytest.mark.parametrize("kind", ["a prompt", "a model whose version 1 this pipeline did not register"])
def test_a_name_that_is_taken_is_refused_before_anything_runs(copy_of: Project, kind: str) -> None:
    uri = f"sqlite:///{copy_of.root}/mlflow.db"
    client = MlflowClient(uri)
    if kind == "a prompt":
        client.register_prompt("taken", "Continue: {{ text }}")
    else:
        client.create_registered_model("taken")
        client.create_model_version("taken", str(copy_of.root / "checkpoints/sft"))
    before = manifests(copy_of)
    done = copy_of.rlhf("run", "--set", "register.name=taken", "--set", "ppo.kl.coef=0.9")
    assert done.returncode == 2
    assert f"register.name: 'taken' is {kind} in the MLflow registry" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert manifests(copy_of) == before

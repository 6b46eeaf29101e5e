"""The whole pipeline through both doors, with the real Prefect, DVC and MLflow."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
from e2e.conftest import Project, make_project
from e2e.servers import wait_until
from mlflow import MlflowClient

STAGES = ["prepare", "sft", "reward", "ppo", "evaluate", "register"]
ALARMING = ("Traceback", "database is locked", "Warning", "deprecat", "telemetry", "ERROR", "CRITICAL")


def states(output: str) -> dict[str, str]:
    """What `rlhf run` said of every stage: done or cached."""
    lines = [line.split() for line in output.splitlines()]
    return {words[1]: words[2] for words in lines if len(words) > 2 and words[1] in STAGES and words[0] in "✓="}


def manifests(project: Project) -> dict[str, int]:
    """When each entry of the store was written."""
    return {str(p): p.stat().st_mtime_ns for p in (project.root / ".rlhf/store").glob("*/manifest.json")}


def test_a_first_run_makes_everything_and_says_nothing_alarming(finished: Project) -> None:
    output = (finished.root / "first-run.txt").read_text()
    assert states(output) == dict.fromkeys(STAGES, "done")
    assert not [word for word in ALARMING if word in output], output
    for text in ("Reward model on held-out pairs", "SFT against Actor on 24 held-out prompts", "VADER", "both answers"):
        assert text in output
    assert finished.dvc("status").stdout.strip() == "Data and pipelines are up to date."
    assert {"score_gain_low", "judge_gain_low", "kl_sequence", "sft_eos_rate", "actor_distinct_bigrams"} <= set(
        finished.metrics("evaluate")
    )
    assert {"accuracy", "accuracy_low", "accuracy_high"} <= set(finished.metrics("reward"))
    samples = [json.loads(line) for line in (finished.root / "samples/evaluate.jsonl").read_text().splitlines()]
    assert len(samples) == 24
    assert {"prompt", "sft", "actor", "sft_score", "actor_score", "kl"} <= set(samples[0])


def test_then_neither_door_trains_anything(copy_of: Project) -> None:
    before = manifests(copy_of)
    repro = copy_of.dvc("repro")
    assert repro.returncode == 0
    assert repro.stdout.count("didn't change, skipping") == len(STAGES)
    again = copy_of.rlhf("run")
    assert states(again.stdout) == dict.fromkeys(STAGES, "cached"), again.stdout + again.stderr
    assert manifests(copy_of) == before


def test_status_is_quick_and_true(copy_of: Project) -> None:
    started = time.monotonic()
    status = copy_of.rlhf("status")
    assert time.monotonic() - started < 10
    assert status.stdout.count(" done ") == len(STAGES)
    copy_of.set(ppo__kl__coef=0.2)
    status = copy_of.rlhf("status").stdout
    assert status.count(" done ") == 3
    assert "changed: ppo.kl.coef 0.05 -> 0.2" in " ".join(status.replace("│", " ").split())
    assert "`rlhf run` goes on with ppo" in status


def test_a_changed_coefficient_reruns_ppo_and_what_follows(copy_of: Project) -> None:
    before = copy_of.lock()
    done = copy_of.rlhf("run", "--set", "ppo.kl.coef=0.5")
    expected = {**dict.fromkeys(STAGES[:3], "cached"), **dict.fromkeys(STAGES[3:], "done")}
    assert states(done.stdout) == expected, done.stdout + done.stderr
    after = copy_of.lock()
    assert [stage for stage in STAGES if before[stage] == after[stage]] == STAGES[:3]
    assert copy_of.dvc("status").stdout.strip() == "Data and pipelines are up to date."
    # back again: everything is still in the store
    done = copy_of.rlhf("run", "--set", "ppo.kl.coef=0.05")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached")
    assert copy_of.lock() == before


@pytest.mark.slow
def test_more_iterations_run_only_the_new_ones(copy_of: Project) -> None:
    def iterations() -> set[str]:
        found = (json.loads(Path(path).read_text()) for path in manifests(copy_of))
        return {m["key"] for m in found if m["identity"]["stage"] == "ppo-iteration"}

    before = iterations()
    done = copy_of.rlhf("run", "--set", "ppo.iterations=5", "--until", "ppo")
    assert done.returncode == 0, done.stderr
    assert before < iterations()
    assert len(iterations()) == len(before) + 2


@pytest.mark.slow
def test_the_other_door_on_a_clean_clone_gives_equal_digests(
    finished: Project, tmp_path: Path, prefect_home: Path
) -> None:
    project = make_project(tmp_path / "clone", prefect_home)
    done = project.dvc("repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.lock() == finished.lock()
    assert not (project.root / ".rlhf/server.json").exists() or not server_lives(project, 10)
    runs = MlflowClient(f"sqlite:///{project.root}/mlflow.db").search_runs(["1"])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1, "six stages of one `dvc repro` are one pipeline"
    assert len(runs) == 1 + len(STAGES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    again = project.rlhf("run")
    assert states(again.stdout) == dict.fromkeys(STAGES, "cached"), again.stdout + again.stderr


def server_lives(project: Project, patience: float) -> bool:
    """Whether the server named in server.json is still there after some seconds."""
    try:
        pid = json.loads((project.root / ".rlhf/server.json").read_text())["process"]["pid"]
    except FileNotFoundError:
        return False
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        if not Path(f"/proc/{pid}").exists():
            return False
        time.sleep(0.2)
    return True


def test_mlflow_has_the_run_the_curves_and_the_model(finished: Project) -> None:
    client = MlflowClient(f"sqlite:///{finished.root}/mlflow.db")
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("rlhf").experiment_id])}
    assert set(STAGES) < set(runs)
    ppo = runs["ppo"]
    for name in ("objective/score", "objective/kl", "advantage/mean", "advantage/std", "perf/rollout_seconds"):
        history = client.get_metric_history(ppo.info.run_id, name)
        assert [point.step for point in history] == [1, 2, 3], name
        assert len({point.timestamp for point in history}) == 3
    parent = client.get_run(ppo.data.tags["mlflow.parentRunId"])
    assert parent.data.params["ppo.kl.coef"] == "0.05"
    assert parent.info.status == "FINISHED"
    version = client.get_model_version_by_alias("rlhf-actor", "challenger")
    assert version.tags["actor_digest"] == finished.metrics("register")["actor_digest"]


def is_pickle(content: bytes) -> bool:
    """Whether bytes are a pickle of any protocol, from the first to the last: those before 2 have no mark."""
    try:
        operations = list(pickletools.genops(content))
    except Exception:  # whatever its readers raise at what is none
        return False
    return len(operations) > 1 and operations[-1][2] == len(content) - 1


def test_no_file_of_a_run_is_a_pickle(finished: Project) -> None:
    assert all(is_pickle(pickle.dumps([1, "a"], protocol)) for protocol in range(6))
    for path in finished.root.rglob("*"):
        if not path.is_file() or ".git/" in str(path):
            continue
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"), path
        assert not zipfile.is_zipfile(path), path  # torch.save makes one, with a pickle inside
        assert not is_pickle(path.read_bytes()), path
    records = [json.loads(path.read_text()) for path in (finished.root / ".rlhf/results").iterdir()]
    assert {record["metadata"]["serializer"]["type"] for record in records} == {"json"}


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("ppo.kl.coeff=0.1", "unknown key `ppo.kl.coeff`; did you mean `ppo.kl.coef`?"),
        ("ppo.clip=wide", "`ppo.clip`: found 'wide'"),
        ("data.sources=[{kind: ratings, path: nowhere.jsonl}]", "nowhere.jsonl: not found"),
        ("reward_function.name=nowhere:score", "'nowhere:score' cannot be imported"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(copy_of: Project, assignment: str, sentence: str) -> None:
    done = copy_of.rlhf("run", "--set", assignment)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stdout


def test_a_wrong_parameter_stops_within_a_second_or_two(copy_of: Project) -> None:
    started = time.monotonic()
    assert copy_of.rlhf("run", "--set", "ppo.iteration=3").returncode == 2
    assert time.monotonic() - started < 5  # 0.7 s on an idle machine


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(finished: Project, tmp_path: Path, prefect_home: Path) -> None:
    project = make_project(tmp_path / "killed", prefect_home)
    run = project.start("rlhf", "run")
    state = project.root / ".rlhf/store"
    limit = time.monotonic() + 240
    while len(list(state.glob("*/manifest.json"))) < 4:  # in the middle of ppo
        assert time.monotonic() < limit
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = project.rlhf("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {stage: states(done.stdout)[stage] for stage in STAGES[:3]} == dict.fromkeys(STAGES[:3], "cached")
    assert project.lock() == finished.lock()
    client = MlflowClient(f"sqlite:///{project.root}/mlflow.db")
    statuses = [run.info.status for run in client.search_runs(["1"])]
    assert "RUNNING" not in statuses
    assert "KILLED" in statuses


@pytest.mark.slow
def test_some_stages_only(copy_of: Project) -> None:
    done = copy_of.rlhf("run", "--from", "ppo", "--until", "evaluate", "--set", "ppo.gamma=0.99")
    assert states(done.stdout) == {"ppo": "done", "evaluate": "done"}, done.stdout + done.stderr
    wrong = copy_of.rlhf("run", "--from", "ppo", "--until", "sft")
    assert (wrong.returncode, "swap them" in wrong.stderr) == (2, True)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_noticed_and_made_again(copy_of: Project) -> None:
    before = copy_of.lock()
    weights = copy_of.root / "checkpoints/sft/model.safetensors"
    stored = (copy_of.root / ".rlhf/store").glob("*/payload/checkpoint/model.safetensors")
    twins = [path for path in stored if path.read_bytes() == weights.read_bytes()]
    assert twins
    for path in (weights, *twins):
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    done = copy_of.rlhf("run")
    assert states(done.stdout) == {stage: "done" if stage == "sft" else "cached" for stage in STAGES}, done.stderr
    assert "not what was written there; the stage sft is done again" in done.stderr + done.stdout
    assert copy_of.lock() == before


def test_a_store_that_is_gone_is_adopted_from_what_dvc_vouches_for(copy_of: Project) -> None:
    before = copy_of.lock()
    shutil.rmtree(copy_of.root / ".rlhf/store")
    done = copy_of.rlhf("run")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached"), done.stdout + done.stderr
    assert copy_of.lock() == before


@pytest.mark.slow
def test_another_library_version_is_not_the_same_environment(copy_of: Project) -> None:
    metadata = copy_of.root / "newer/torch-2.99.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n")
    copy_of.environment = copy_of.environment | {"PYTHONPATH": str(metadata.parent)}
    done = copy_of.rlhf("run", "--until", "sft")
    assert states(done.stdout) == {"prepare": "cached", "sft": "done"}, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("door", [("rlhf", "run", "--until", "sft"), ("dvc", "repro", "sft")])
def test_an_edit_while_a_stage_runs_is_never_recorded_as_read(copy_of: Project, door: tuple[str, ...]) -> None:
    copy_of.set(sft__epochs=80)
    before = (copy_of.root / "dvc.lock").read_text()
    run = copy_of.start(*door)
    limit = time.monotonic() + 120
    while not list((copy_of.root / ".rlhf/store/partial").glob("*/series.jsonl")):
        assert time.monotonic() < limit
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    copy_of.set(sft__learning_rate=0.009)
    output, errors = run.communicate(timeout=240)
    assert run.returncode != 0, output
    assert "sft: params.yaml, its inputs or its code changed while it ran" in errors + output
    assert (copy_of.root / "dvc.lock").read_text() == before


@pytest.mark.slow
def test_code_edited_while_a_run_goes_on_is_never_taken_for_the_old(copy_of: Project) -> None:
    """The edited module is imported late; its result must not lie under the key of the code that was there before."""
    path = copy_of.root / "rlhf_tasks/evaluate.py"
    before, old = manifests(copy_of), path.read_text()
    run = copy_of.start("rlhf", "run", "--set", "sft.epochs=30")
    partial = copy_of.root / ".rlhf/store/partial"
    wait_until(lambda: list(partial.glob("*/series.jsonl")), 120, lambda: run.communicate())
    assert 'interval("win_rate", ' in old
    path.write_text(old.replace('interval("win_rate", ', 'interval("win_rate", 7 + '))
    output, errors = run.communicate(timeout=240)
    assert run.returncode == 2, output
    assert "evaluate: its inputs or its code changed while it ran" in errors
    path.write_text(old)
    again = copy_of.rlhf("run")
    assert states(again.stdout)["evaluate"] == "done", again.stdout + again.stderr
    assert copy_of.metrics("evaluate")["win_rate"] <= 1
    assert set(before) <= set(manifests(copy_of))


def test_nobody_registers_an_actor_made_of_stale_stages(copy_of: Project) -> None:
    refused = copy_of.rlhf("run", "--from", "ppo", "--set", "sft.learning_rate=0.009")
    assert refused.returncode == 2
    assert "sft, reward would have to run first" in refused.stderr or "sft would have to run first" in refused.stderr

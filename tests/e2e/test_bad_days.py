"""Bad input and bad days: one sentence that says what to do, exit status 2, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import zc.lockfile
from e2e.conftest import Project, make_project
from e2e.test_doors import STAGES, manifests, states

RATED = {"text": "a fine film", "ratings": [3, 4]}


def write_ratings(path: Path, *rows: Any) -> None:
    """A file of ratings; a row that is bytes is written as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n", mtime=0))


def refused(project: Project, *arguments: str) -> str:
    """What `rlhf` says when it refuses, having left store, outs and dvc.lock alone."""
    before, lock = manifests(project), (project.root / "dvc.lock").read_bytes()
    done = project.rlhf("run", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert manifests(project) == before
    assert not list((project.root / ".rlhf/store/tmp").iterdir())
    assert (project.root / "dvc.lock").read_bytes() == lock
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([RATED, {"ratings": [1]}], ".gz:2: "),
        ([RATED, {"text": " ", "ratings": [1]}], ".gz:2: "),
        ([RATED, {"text": "too good", "ratings": [99]}], ".gz:2: "),
        ([RATED, b'{"text": "caf\xe9", "ratings": [1]}'], "UTF-8"),
        ([], "movie_reviews.jsonl.gz"),
    ],
    ids=["missing field", "empty text", "out of range", "not UTF-8", "empty data set"],
)
def test_data_that_cannot_be_used(copy_of: Project, rows: list[Any], sentence: str) -> None:
    path = copy_of.root / "data/raw/movie_reviews.jsonl.gz"
    write_ratings(path, *rows)
    said = refused(copy_of, "--until", "prepare")
    assert "data/raw/movie_reviews.jsonl.gz" in said
    assert sentence in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "model.base=no/such/folder"], "`model.base: no/such/folder`: no such folder or file"),
        (["--set", "reward.trainable_layers=1"], "reward.trainable_layers: found 1, but the model has 1 layers"),
        (["--set", "evaluate.prompts=9999"], "evaluate.prompts: found 9999, but the data has only "),
        (["--set", "sft.epochs=2", "--from", "ppo"], "--from ppo: sft would have to run first"),
    ],
)
def test_what_cannot_be_run_is_not_written(copy_of: Project, arguments: list[str], sentence: str) -> None:
    """Not in part either, whoever finds it: the command line, the flow, or what an earlier run has left."""
    before = {name: (copy_of.root / name).read_bytes() for name in ("params.yaml", "dvc.yaml")}
    assert sentence in refused(copy_of, "--set", "ppo.kl.coef=0.2", *arguments)
    assert {name: (copy_of.root / name).read_bytes() for name in before} == before


def test_too_few_heldout_prompts_are_told_before_anything_is_trained(copy_of: Project) -> None:
    """As soon as `prepare` has counted them."""
    done = copy_of.rlhf("run", "--set", "seed=3", "--set", "evaluate.prompts=9999")
    assert done.returncode == 2, done.stdout + done.stderr
    assert states(done.stdout) == {"prepare": "done"}
    assert "evaluate.prompts: found 9999, but the data has only " in done.stderr


def test_a_model_folder_without_a_tokenizer(copy_of: Project) -> None:
    base = copy_of.root / "base"
    shutil.copytree(copy_of.root / "checkpoints/sft", base)
    for file in base.glob("tokenizer*"):
        file.unlink()
    said = refused(copy_of, "--set", "model.base=base")
    assert "base" in said
    assert "tokenizer" in said


def test_dvc_is_busy(copy_of: Project) -> None:
    held = zc.lockfile.LockFile(str(copy_of.root / ".dvc/tmp/lock"))
    try:
        said = refused(copy_of)
    finally:
        held.close()
    assert "another DVC process" in said


@pytest.mark.slow
def test_the_usual_ports_are_in_use(copy_of: Project) -> None:
    """Prefect's 4200 and MLflow's 5000, also when Prefect was told so: the run's own server takes a free one."""
    del copy_of.environment["PREFECT_API_URL"]
    with ExitStack() as held:
        for port in (4200, 5000):
            with suppress(OSError):  # somebody else holds it, which is as good
                held.enter_context(socket.create_server(("127.0.0.1", port)))
        copy_of.environment |= {"PREFECT_SERVER_API_PORT": "4200"}
        done = copy_of.rlhf("run")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached"), done.stdout + done.stderr


def can_mount() -> bool:
    probe = ["unshare", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="a small file system can be mounted in a user namespace only")
def test_the_disk_is_full_and_then_it_is_not(finished: Project, prefect_url: str, tmp_path: Path) -> None:
    """It is full after the first PPO iterations; with more room the run goes on, to the bits of an undisturbed one."""
    project = make_project(tmp_path / "small", finished.root)
    project.environment = finished.environment | {"PREFECT_API_URL": prefect_url}
    script = """
        mkdir -p .rlhf/store && mount -t tmpfs -o size=1500k tmpfs .rlhf/store || exit 9
        rlhf run
        echo "ended with $?"
        mount -o remount,size=100m .rlhf/store && exec rlhf run
    """
    done = project.run("unshare", "--map-root-user", "--mount", "sh", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    full, again = done.stdout.split("ended with 2")
    assert states(full) == dict.fromkeys(["prepare", "sft", "reward"], "done")
    assert done.stderr.count("the disk is full") == 1
    assert states(again) == states(full.replace("done  ", "cached")) | dict.fromkeys(
        ["ppo", "evaluate", "register"], "done"
    )
    assert project.lock() == finished.lock()


@pytest.mark.slow
def test_a_limit_of_file_sizes_is_reached(copy_of: Project) -> None:
    """A model of 8 MB where no file may have more than 6. Once it may, the run goes on."""
    larger = [f"--set=model.scratch.{name}" for name in ("hidden_size=256", "intermediate_size=1024", "layers=2")]
    done = copy_of.run("bash", "-c", 'ulimit -f 6000 && exec rlhf run --until sft "$@"', "bash", *larger)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "a size limit is reached" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert states(done.stdout) == {"prepare": "done"}
    again = copy_of.rlhf("run", "--until", "sft")
    assert states(again.stdout) == {"prepare": "cached", "sft": "done"}, again.stderr

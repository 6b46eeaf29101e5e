"""Small real projects: a git repository with the code, DVC, a params.yaml that trains in seconds."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e.servers import prefect_server
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("flows", "rlhf_tasks", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "params.yaml")
CODE += ("prefect.toml", "prefect.yaml")
ROWS = 600
SMALL = {
    "runtime.threads": 1,
    "data.max_response_tokens": 24,
    "model.scratch": {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2},
    "generation.max_new_tokens": 8,
    "sft.epochs": 1,
    "reward.epochs": 1,
    "reward.statistics_samples": 32,
    "ppo.iterations": 3,
    "ppo.batch": 8,
    "ppo.minibatches": 2,
    "ppo.kl.coef": 0.05,
    "evaluate.prompts": 24,
    "evaluate.bootstrap": 100,
}


@dataclass
class Project:
    """A checkout, and how to run things in it as a user would."""

    root: Path
    environment: dict[str, str]

    def rlhf(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("rlhf", *arguments, **options)

    def dvc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("dvc", *arguments)

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=timeout
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def set(self, **parameters: Any) -> None:
        """Write parameters, `ppo__kl__coef` for `ppo.kl.coef`, into params.yaml."""
        write_params(self.root, {name.replace("__", "."): value for name, value in parameters.items()})

    def lock(self) -> dict[str, dict[str, str]]:
        """For each stage in dvc.lock, the md5 of its outs by path."""
        stages = YAML(typ="safe").load((self.root / "dvc.lock").read_text())["stages"]
        return {name: {out["path"]: out["md5"] for out in stage["outs"]} for name, stage in stages.items()}

    def metrics(self, stage: str) -> dict[str, Any]:
        return json.loads((self.root / f"metrics/{stage}.json").read_text())


def write_params(root: Path, values: dict[str, Any]) -> None:
    yaml, path = YAML(), root / "params.yaml"
    document = yaml.load(path.read_text())
    for name, value in values.items():
        node = document
        *parents, last = name.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    with path.open("w") as file:
        yaml.dump(document, file)


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True)


def commit(project: Project, *paths: str) -> None:
    """Add paths to git and commit them."""
    git(project.root, "add", *paths)
    git(project.root, "commit", "-qm", "a run")


def make_project(root: Path, home: Path) -> Project:
    """A git repository with this code and a share of the shipped ratings, as a user would clone it."""
    root.mkdir(parents=True)
    for name in CODE:
        source, target = REPOSITORY / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    (root / "data/raw").mkdir(parents=True)
    with gzip.open(REPOSITORY / "data/raw/movie_reviews.jsonl.gz", "rb") as all_rows:
        rows = [next(all_rows) for _ in range(ROWS)]
    (root / "data/raw/movie_reviews.jsonl.gz").write_bytes(gzip.compress(b"".join(rows), mtime=0))
    write_params(root, SMALL)
    binaries = Path(sys.executable).parent
    unwanted = ("MLFLOW_", "PREFECT_", "DVC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment |= {"PATH": f"{binaries}:{os.environ['PATH']}", "PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.1"}  # a stage here may take less than a second
    project = Project(root, environment)
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "start")):
        git(root, *command)
    return project


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Prefect database for all projects: making one takes 20 s."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Project:
    """A project in which `rlhf run` went through; tests must leave it as they found it."""
    project = make_project(tmp_path_factory.mktemp("finished") / "project", prefect_home)
    done = project.rlhf("run")
    assert done.returncode == 0, done.stdout + done.stderr
    (project.root / "first-run.txt").write_text(done.stdout + done.stderr)
    return project


@pytest.fixture(scope="session")
def prefect_url(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API of a Prefect server that the user runs; starting one for every command would take 6 s each."""
    folder = tmp_path_factory.mktemp("server")
    home = folder / "home"
    shutil.copytree(finished.environment["PREFECT_HOME"], home)  # a database that is there saves 15 s
    with prefect_server(home, folder / "log") as url:
        yield url


@pytest.fixture
def copy_of(finished: Project, prefect_url: str, tmp_path: Path) -> Project:
    """The finished project once more, to be changed; its runs go to a server that is there."""
    root = tmp_path / "copy"
    shutil.copytree(finished.root, root, symlinks=True)
    return Project(root, finished.environment | {"PREFECT_API_URL": prefect_url})

"""A pipeline that is killed a hundred times at random moments against one that is not: does a bit differ?

    python benchmarks/kills.py [KILLS]

Makes two clones of this repository's last commit with small models in a temporary folder. One runs undisturbed; in the
other `rlhf run` is killed with its whole process group (SIGKILL) after a random time and started again, until it ends;
then the clone is made anew, until there were as many kills as wanted. Prints a line for every pipeline that ended.
About 15 s a kill on two cores.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_tasks.config import set_params

REPOSITORY = Path(__file__).resolve().parent.parent
SECONDS = (3.0, 30.0)
SMALL = {
    "runtime.threads": 1,
    "data.max_response_tokens": 24,
    "model.scratch.vocab_size": 400,
    "model.scratch.hidden_size": 32,
    "model.scratch.intermediate_size": 64,
    "model.scratch.layers": 1,
    "model.scratch.heads": 2,
    "generation.max_new_tokens": 8,
    "sft.epochs": 1,
    "reward.epochs": 1,
    "reward.statistics_samples": 32,
    "ppo.iterations": 6,
    "ppo.batch": 16,
    "ppo.minibatches": 2,
    "evaluate.prompts": 100,
    "evaluate.bootstrap": 100,
}


def clone(folder: Path) -> Path:
    """A clone with small parameters, in which nothing has run."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(folder)], check=True)
    set_params(folder / "params.yaml", SMALL)
    return folder


def locked_stages(folder: Path) -> dict[str, Any]:
    """What dvc.lock says; nothing before the first stage is in it."""
    lock = folder / "dvc.lock"
    return YAML(typ="safe").load(lock.read_text())["stages"] if lock.exists() else {}


def digests(folder: Path) -> dict[str, str]:
    """Every out in dvc.lock, by path."""
    return {out["path"]: out["md5"] for stage in locked_stages(folder).values() for out in stage["outs"]}


def run_and_kill(folder: Path, environment: dict[str, str], seconds: float) -> bool:
    """Run the pipeline for so long at most. Returns whether it ended by itself."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(["rlhf", "run"], cwd=folder, env=environment, start_new_session=True, **quiet)
    try:
        if process.wait(timeout=seconds):
            raise SystemExit(f"{folder}: a run failed with status {process.returncode}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return True


def main() -> None:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    moments, kills, pipelines, where = random.Random(0), 0, 0, Counter[int]()
    with tempfile.TemporaryDirectory() as name:
        environment = os.environ | {"PREFECT_HOME": f"{name}/prefect", "OMP_NUM_THREADS": "1"}
        undisturbed = clone(Path(name, "undisturbed"))
        subprocess.run(["rlhf", "run"], cwd=undisturbed, env=environment, check=True, capture_output=True)
        expected = digests(undisturbed)
        while kills < wanted:
            folder, here = clone(Path(name, "killed")), 0
            while not run_and_kill(folder, environment, moments.uniform(*SECONDS)):
                here += 1
                where[len(locked_stages(folder))] += 1
            differing = [path for path, md5 in digests(folder).items() if md5 != expected[path]]
            kills, pipelines = kills + here, pipelines + 1
            print(
                f"pipeline {pipelines}: {here} kills, {kills} in all; outs that differ: {differing or 'none'}",
                flush=True,
            )
    print(dict(where))


if __name__ == "__main__":
    main()

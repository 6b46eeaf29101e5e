"""What saving PPO's state costs with a model of real size: its share of the iterations' time.

    python benchmarks/saving.py MODEL_FOLDER [ITERATIONS]

Makes a clone of this repository's last commit in a temporary folder, with a local Hugging Face folder as the base
model, few rows of SFT and `saving.iterations_per_task: auto`, runs `rlhf run --until ppo` in it, and prints what the
store's manifests say. With SmolLM2-135M an iteration's state is 3.2 GB; the temporary folder needs four of them.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from rlhf_tasks import chain
from rlhf_tasks.config import load_params, set_params
from rlhf_tasks.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parent.parent
ROWS = 300
SHARED = "data/raw/movie_reviews.jsonl.gz"
SETTINGS = {
    "saving.iterations_per_task": "auto",
    "generation.max_new_tokens": 48,
    "sft.epochs": 1,
    "sft.learning_rate": 1.0e-5,
    "reward.epochs": 1,
    "reward.learning_rate": 1.0e-5,
    "reward.statistics_samples": 32,
    "ppo.batch": 16,
    "ppo.minibatches": 2,
    "ppo.micro_batch_tokens": 1024,
    "ppo.actor_learning_rate": 1.0e-6,
    "ppo.critic_learning_rate": 1.0e-6,
}


def main() -> None:
    base, iterations = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 28
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name, "clone")
        subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
        (clone / "base").symlink_to(base)
        set_params(clone / "params.yaml", SETTINGS | {"model.base": "base", "ppo.iterations": iterations})
        with gzip.open(clone / SHARED, "rb") as rows:
            few = b"".join(islice(rows, ROWS))
        (clone / SHARED).write_bytes(gzip.compress(few))
        environment = os.environ | {"PREFECT_HOME": f"{name}/prefect"}
        subprocess.run(["rlhf", "run", "--until", "ppo"], cwd=clone, env=environment, check=True)
        report(clone)


def report(clone: Path) -> None:
    os.chdir(clone)
    perf = [entry.manifest["perf"] for entry in chain.known(Workspace(clone, load_params(clone / "params.yaml")))]
    saves = {i: p["save_seconds"] for i, p in enumerate(perf, start=1) if "save_seconds" in p}
    work, saving = sum(p["seconds"] for p in perf), sum(saves.values())
    print("saved after iterations", ", ".join(f"{i} ({seconds:.1f} s)" for i, seconds in saves.items()))
    print(f"{len(perf)} iterations: {work:.0f} s of work, {saving:.1f} s of saving, {saving / work:.1%}")


if __name__ == "__main__":
    main()

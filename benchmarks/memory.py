"""`rlhf plan` against what happens: the peak resident memory and the time of every stage, as planned and as measured.

    python benchmarks/memory.py [KEY=VALUE ...]

Makes a clone of this repository's last commit in a temporary folder, writes the parameters into its params.yaml, and
runs the stages one by one, each in a process of its own. Prints a line for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rlhf_tasks.config import parse_assignments, set_params

REPOSITORY = Path(__file__).resolve().parent.parent
GB = 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name, "clone")
        subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
        set_params(clone / "params.yaml", parse_assignments(sys.argv[1:]))
        environment = os.environ | {"PREFECT_HOME": f"{name}/prefect", "PYTHONPATH": str(clone)}
        run(clone, environment, "stage", "prepare")
        planned = plan(clone, environment)
        print(f"{'stage':9} {'planned GB':>11} {'measured GB':>12} {'ratio':>6}   {'planned s':>10} {'measured s':>11}")
        for stage, (memory, seconds) in planned.items():
            peak, took = run(clone, environment, "stage", stage)
            print(
                f"{stage:9} {memory / GB:11.2f} {peak / GB:12.2f} {memory / peak:6.2f}   {seconds:10.0f} {took:11.0f}",
                flush=True,
            )


def plan(clone: Path, environment: dict[str, str]) -> dict[str, tuple[float, float]]:
    """For each stage, the bytes and seconds that `rlhf plan` tells."""
    command = [sys.executable, "-m", "flows.cli", "plan", "--json"]
    document: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=clone, env=environment))
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for phase in document["phases"]:
        memory, seconds = found[phase["stage"]]
        found[phase["stage"]] = max(memory, phase["memory"]), seconds + phase["seconds"]
    return dict(found)


def run(clone: Path, environment: dict[str, str], *arguments: str) -> tuple[float, float]:
    """Run the command line. Returns the peak resident bytes of its process, and its seconds."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "flows.cli", *arguments], cwd=clone, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)}: ended with {status}")
    return usage.ru_maxrss * 1024, time.monotonic() - started


if __name__ == "__main__":
    main()

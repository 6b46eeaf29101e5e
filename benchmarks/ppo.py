"""The race: PPO iterations of this engine beside TRL's, on the same workload in one sitting.

    python -m benchmarks.ppo --workload benchmarks/workloads/smollm2-ragged.json --model FOLDER --peer --json OUT.json

Engine and peer take turns, each run in a process of its own, so whatever else the machine does meets both. The first
iteration of a run is a warm-up. Beside them stands what the machine can do, measured before every run: matrix products
(float32, 2048 x 2048) and bytes (a large copy).

The floor is the time that the work of an iteration takes at these rates, operations plus bytes. For a token of prompt
or response, N weights in the layers and V x d in the head, which only response tokens need: rollout and Ref
2 (N + V d), Reward and Critic 2 N each, an epoch of the update 6 (N + V d) for the Actor and 6 N for the Critic. Bytes:
28 a weight and optimizer step (AdamW in float32 reads and writes weight and two moments, and reads the gradient, which
was written), and the Actor's weights once for every step of decoding. With `--trainable-layers`, N is that of the
layers above the trunk but in the rollout, and a head that does not learn takes 4 V d of the update, not 6.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import Workload
from flows.environment import configure_libraries
from rlhf_tasks.machine import fastest

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".rlhf/peer"
PHASES = ("rollout", "evaluation", "experience", "optimization")
SQUARE, COPY_BYTES = 2048, 1 << 29
ADAMW_BYTES = 28  # of a weight and optimizer step
Run = dict[str, Any]


@dataclass(frozen=True)
class Rates:
    """What the machine does when it does nothing else: operations and bytes a second."""

    flops: float
    bandwidth: float


def main() -> None:
    given = arguments()
    workload = Workload.load(given.workload, given.model)
    configure_libraries()
    peer = peer_python() if given.peer else None
    engine = [sys.executable, "-m", "benchmarks.ppo_engine"]
    if given.trainable_layers:
        engine += ["--trainable-layers", str(given.trainable_layers)]
    rates, ours, theirs = [], [], []
    for number in range(1, given.runs + 1):
        rates.append(measure_rates(given.threads))
        ours.append(run(engine, given))
        say(f"run {number}: engine {seconds_of(ours[-1]):.2f} s, {ours[-1]['peak_gib']:.2f} GiB")
        if peer:
            theirs.append(run([str(peer), str(HERE / "ppo_peer.py")], given))
            say(f"run {number}: TRL    {seconds_of(theirs[-1]):.2f} s, {theirs[-1]['peak_gib']:.2f} GiB")
    told = {"threads": given.threads, "trainable_layers": given.trainable_layers}
    result = summary(workload, rates, ours, theirs) | told
    print(table(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--model", help="a Hugging Face folder, in place of the workload's")
    parser.add_argument("--peer", action="store_true", help="race TRL too; makes its virtual environment first")
    parser.add_argument("--runs", type=int, default=3, help="of each side, in turns")
    parser.add_argument("--iterations", type=int, default=4, help="of a run, the first of which is a warm-up")
    parser.add_argument("--trainable-layers", type=int, help="of the engine's models; TRL trains all of them")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="where the numbers go too")
    given = parser.parse_args()
    if given.iterations < 2 or given.runs < 1:
        parser.error("--iterations must be at least 2 (the first is a warm-up), --runs at least 1")
    return given


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peer_python() -> Path:
    """The Python of TRL's virtual environment, made if it is not there."""
    python, requirements, done = PEER / "bin/python", HERE / "peer_requirements.txt", PEER / "installed"
    if not done.exists() or done.read_text() != requirements.read_text():
        say(f"making TRL's virtual environment in {PEER}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(PEER)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(requirements)]
        subprocess.run(install, check=True)
        done.write_text(requirements.read_text())
    return python


def run(command: list[str], given: argparse.Namespace) -> Run:
    """One side's process. Returns what its last line says."""
    command = [*command, "--workload", str(given.workload), "--iterations", str(given.iterations)]
    command += ["--threads", str(given.threads), *(["--model", given.model] if given.model else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_rates(threads: int) -> Rates:
    """The machine's, now: the best of some tries."""
    torch.set_num_threads(threads)
    a, b = torch.rand(SQUARE, SQUARE), torch.rand(SQUARE, SQUARE)
    source, target = torch.rand(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
    flops = 2 * SQUARE**3 / fastest(lambda: torch.mm(a, b))
    return Rates(flops, 2 * COPY_BYTES / fastest(lambda: target.copy_(source)))


def timed(one: Run) -> list[dict[str, float]]:
    """A run's iterations without the warm-up."""
    found: list[dict[str, float]] = one["iterations"][1:]
    return found


def total(iteration: dict[str, float]) -> float:
    return iteration["total"] if "total" in iteration else sum(iteration[phase] for phase in PHASES)


def seconds_of(one: Run) -> float:
    """Median seconds of a run's iterations."""
    return statistics.median(map(total, timed(one)))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summary(workload: Workload, rates: list[Rates], ours: list[Run], theirs: list[Run]) -> dict[str, Any]:
    """All that is told, as it stands in the JSON file."""
    machine = Rates(*(statistics.median(getattr(r, name) for r in rates) for name in ("flops", "bandwidth")))
    iterations = [iteration for one in ours for iteration in timed(one)]
    work = operations(workload, ours[0]["sizes"], iterations)
    phases = {}
    for phase in PHASES:
        seconds = [iteration[phase] for iteration in iterations]
        tokens = sum(i["prompt_tokens"] + i["response_tokens"] for i in iterations)
        rate = work[phase] / statistics.mean(seconds)
        phases[phase] = {
            "seconds": spread(seconds),
            "tokens_per_second": tokens / sum(seconds),
            "share_of_matrix_rate": rate / machine.flops,
        }
    floor = floor_seconds(workload, ours[0]["sizes"], iterations, sum(work.values()), machine)
    mean = statistics.mean(map(total, iterations))
    result: dict[str, Any] = {
        "workload": workload.name,
        "machine": {"matrix_gflops": machine.flops / 1e9, "copy_gb_per_second": machine.bandwidth / 1e9},
        "engine": {
            "seconds": spread([*map(total, iterations)]),
            "phases": phases,
            "save_seconds": spread([one["save_s"] for one in ours]),
            "peak_gib": spread([one["peak_gib"] for one in ours]),
            "tokens": statistics.mean(i["prompt_tokens"] + i["response_tokens"] for i in iterations),
        },
        "floor": {"seconds": floor, "share_reached": floor / mean},
    }
    if theirs:
        pairs = list(zip(ours, theirs, strict=True))
        result["peer"] = {
            "name": "TRL 1.12",
            "seconds": spread([total(i) for one in theirs for i in timed(one)]),
            "peak_gib": spread([one["peak_gib"] for one in theirs]),
        }
        result["ratio"] = {
            "speed": spread([seconds_of(their) / seconds_of(our) for our, their in pairs]),
            "memory": spread([our["peak_gib"] / their["peak_gib"] for our, their in pairs]),
        }
    return result


def operations(workload: Workload, sizes: dict[str, int], iterations: list[dict[str, float]]) -> dict[str, float]:
    """Floating-point operations of a phase, mean over iterations, by the formula above."""
    tokens = statistics.mean(i["prompt_tokens"] + i["response_tokens"] for i in iterations)
    layers, top = sizes["layers"] * tokens, sizes["learning_layers"] * tokens
    head = sizes["head"] * statistics.mean(i["response_tokens"] for i in iterations)
    head_update = 6 if sizes["head_learns"] else 4
    return {
        "rollout": 2 * (layers + head),
        "evaluation": 2 * (top + head) + 4 * top,
        "experience": 0.0,
        "optimization": workload.epochs * (12 * top + head_update * head),
    }


def floor_seconds(
    workload: Workload, sizes: dict[str, int], iterations: list[dict[str, float]], flops: float, machine: Rates
) -> float:
    """What an iteration takes at the machine's own rates."""
    steps = statistics.mean(i["steps"] for i in iterations)
    moved = ADAMW_BYTES * sizes["learning"] * workload.optimizer_steps + steps * 4 * (sizes["layers"] + sizes["head"])
    return flops / machine.flops + moved / machine.bandwidth


def table(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    engine, machine = result["engine"], result["machine"]
    top = f", top {result['trainable_layers']} layers" if result["trainable_layers"] else ""
    lines = [
        f"**{result['workload']}**{top}, {result['threads']} threads, {machine['matrix_gflops']:.0f} GFLOP/s, "
        f"{machine['copy_gb_per_second']:.1f} GB/s, {engine['tokens']:.0f} tokens an iteration",
        "",
        "| phase | seconds | tokens/s | of the matrix rate |",
        "| --- | --- | --- | --- |",
    ]
    for name, phase in engine["phases"].items():
        seconds, share = text(phase["seconds"]), f"{phase['share_of_matrix_rate']:.0%}"
        lines.append(f"| {name} | {seconds} | {phase['tokens_per_second']:.0f} | {share} |")
    lines.append(f"| saving, when it is done | {text(engine['save_seconds'])} | | |")
    floor = result["floor"]
    lines += [
        "",
        "| | seconds an iteration | peak GiB |",
        "| --- | --- | --- |",
        f"| engine | {text(engine['seconds'])} | {text(engine['peak_gib'])} |",
        f"| floor | {floor['seconds']:.2f}, of which the engine reaches {floor['share_reached']:.0%} | |",
    ]
    if peer := result.get("peer"):
        ratio = result["ratio"]
        lines.append(f"| {peer['name']} | {text(peer['seconds'])} | {text(peer['peak_gib'])} |")
        lines.append(f"| ratio | {text(ratio['speed'])} times as fast | {text(ratio['memory'])} of its memory |")
    return "\n".join(lines)


def text(of: dict[str, float]) -> str:
    return f"{of['median']:.2f} ({of['least']:.2f} to {of['most']:.2f})"


if __name__ == "__main__":
    main()

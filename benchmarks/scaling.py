"""How the time and the memory of a PPO iteration grow: with batch, response length, vocabulary, model, and iterations.

    python -m benchmarks.scaling --tokenizer FOLDER

Every point is a randomly drawn Llama in a process of its own (benchmarks/ppo_engine.py), whose responses all have their
full length; the first iteration of each is left out. Writes benchmarks/numbers/scaling.json and docs/scaling.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 8}

import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
NUMBERS, DRAWING = HERE / "numbers/scaling.json", HERE.parent / "docs/scaling.svg"
PHASES = ("rollout", "evaluation", "experience", "optimization")
BASE: dict[str, Any] = {"batch": 32, "response_length": 32, "vocabulary": 49_152, "width": 256}
SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (16, 32, 64, 128, 256),
    "response_length": (16, 32, 64, 128, 256),
    "vocabulary": (49_152, 98_304, 147_456, 196_608),
    "width": (128, 256, 384, 512, 768),
}
ITERATIONS, LONG, MANY = 4, {"batch": 16, "response_length": 24, "width": 128}, 200
Point = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="a folder with the tokenizer of the prompts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for name, values in SWEEPS.items():
        found[name] = {}
        for value in values:
            iterations = measure(BASE | {name: value}, ITERATIONS, given)
            found[name][value] = point(iterations)
            print(name, value, {k: round(v, 3) for k, v in found[name][value].items()}, flush=True)
    found["iterations"] = measure(BASE | LONG, MANY, given)
    NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
    draw(json.loads(NUMBERS.read_text()))


def measure(shape: dict[str, Any], iterations: int, given: argparse.Namespace) -> list[Point]:
    """The iterations of a workload of that shape but the first."""
    width = shape["width"]
    workload = {
        "name": "scaling",
        "model": given.tokenizer,
        "prompts": str(HERE / "workloads/prompts.jsonl"),
        "batch": shape["batch"],
        "response_length": shape["response_length"],
        "minibatches": 4,
        "epochs": 1,
        "learning_rate": 1e-5,
        "seed": 0,
        "config": {
            "vocab_size": shape["vocabulary"],
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": 4,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "max_position_embeddings": 512,
        },
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(workload, file)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.ppo_engine", "--workload", file.name]
        command += ["--iterations", str(iterations), "--threads", str(given.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    found: list[Point] = json.loads(done.stdout.splitlines()[-1])["iterations"]
    return found[1:]


def point(iterations: list[Point]) -> Point:
    """Medians: seconds and tokens of an iteration, and the peak memory of all."""
    seconds = statistics.median(seconds_of(i) for i in iterations)
    tokens = statistics.median(tokens_of(i) for i in iterations)
    return {"seconds": seconds, "tokens": tokens, "peak_gib": iterations[-1]["peak_gib"]}


def seconds_of(iteration: Point) -> float:
    return sum(iteration[phase] for phase in PHASES)


def tokens_of(iteration: Point) -> float:
    return iteration["prompt_tokens"] + iteration["response_tokens"]


def draw(found: dict[str, Any]) -> None:
    """Seconds above, memory below; a column a sweep, and the long run's last."""
    figure, panels = plt.subplots(2, len(SWEEPS) + 1, figsize=(11, 4), layout="constrained")
    for (above, below), name in zip(panels.T, SWEEPS, strict=False):
        values, points = [int(value) for value in found[name]], list(found[name].values())
        for panel, key, unit in ((above, "seconds", "s an iteration"), (below, "peak_gib", "peak GiB")):
            panel.plot(values, [p[key] for p in points], "o-", color="tab:blue", markersize=3)
            panel.set_ylim(0)
            panel.set_ylabel(unit)
            panel.set_xlabel(name.replace("_", " "))
    above, below = panels[:, -1]
    run = found["iterations"]
    above.plot([1000 * seconds_of(i) / tokens_of(i) for i in run], color="tab:blue", linewidth=0.8)
    above.set_ylabel("ms a token")
    below.plot([i["peak_gib"] for i in run], color="tab:blue")
    below.set_ylabel("peak GiB")
    for panel in (above, below):
        panel.set_ylim(0)
        panel.set_xlabel("iteration")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(DRAWING, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""How training looks when it goes wrong, and after the remedy. Draws docs/troubles.svg, prints the final numbers.

    git clone . ../troubles && python benchmarks/troubles.py ../troubles

Makes the shipped run ill in that clone, in five ways, and then well again, 16 iterations each, with
`rlhf run --until evaluate`. What is finished is found again: a script that was stopped goes on. About 25 minutes on two
cores.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "troubles", "svg.fonttype": "none", "font.size": 8}

import matplotlib.pyplot as plt  # noqa: E402

CHART = Path(__file__).resolve().parent.parent / "docs/troubles.svg"
#: a reward function with a hole: nothing says that a word of praise may not come twice
PRAISE = '''WORDS = {"best", "brilliant", "beautiful", "funny", "great", "good", "love", "perfect"}


def count_praise(prompts: list[str], responses: list[str]) -> list[float]:
    """Words of praise in each answer."""
    return [float(sum(word.strip(".,!?") in WORDS for word in text.lower().split())) for text in responses]
'''
ITERATIONS = 16
Curves = dict[str, list[float]]


@dataclass(frozen=True)
class Trouble:
    """Settings that make a run ill, settings that make it well again, and the metrics that show it."""

    name: str
    ill: dict[str, Any]
    well: dict[str, Any]
    shown: tuple[str, str, str]


TROUBLES = [
    Trouble(
        "KL explodes",
        {"ppo.actor_learning_rate": 2e-3},
        {"ppo.actor_learning_rate": 2e-3, "ppo.target_kl": 0.01},
        ("objective/kl", "policy/approx_kl", "policy/clip_fraction"),
    ),
    Trouble(
        "reward hacking",
        {
            "reward_function.name": "praise:count_praise",
            "reward_function.instead": "true",
            "ppo.score.kind": "raw",
            "ppo.kl.coef": 0.02,
        },
        {"reward_function.name": "praise:count_praise", "reward_function.weight": 0.3},
        ("objective/shaped_score", "objective/score", "response/distinct_bigrams"),
    ),
    Trouble(
        "length creep",
        {"ppo.missing_eos.mode": "replace", "ppo.missing_eos.value": 1.0},
        {},
        ("response/length", "response/eos_rate", "objective/shaped_score"),
    ),
    Trouble(
        "the Critic lags",
        {"ppo.critic_start": "sft", "ppo.critic_learning_rate": 4e-6},
        {"ppo.critic_start": "sft", "ppo.critic_warmup": 4},
        ("advantage/explained_variance", "value/error", "objective/score"),
    ),
    Trouble(
        "entropy collapses",
        {"ppo.kl.coef": 0.0},
        {"ppo.kl.controller": "adaptive", "ppo.kl.coef": 0.03, "ppo.kl.target": 4.0, "ppo.kl.horizon": 250},
        ("objective/entropy", "response/distinct_bigrams", "objective/kl"),
    ),
]


def run(clone: Path, settings: dict[str, Any]) -> tuple[Curves, dict[str, float]]:
    """PPO's curves and the evaluation of a run with the shipped parameters but for `settings`, and fewer iterations."""
    subprocess.run(["git", "checkout", "-q", "params.yaml"], cwd=clone, check=True)
    settings = {"ppo.iterations": ITERATIONS} | settings
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    print("rlhf run", *changes, flush=True)
    subprocess.run(["rlhf", "run", "--until", "evaluate", *changes], cwd=clone, check=True, stdout=subprocess.DEVNULL)
    with (clone / "plots/ppo.csv").open() as rows:
        found = list(csv.DictReader(rows))
    curves = {name: [float(row[name] or "nan") for row in found] for name in found[0]}
    return curves, json.loads((clone / "metrics/evaluate.json").read_text())


def draw(runs: list[tuple[Trouble, dict[str, Curves]]]) -> None:
    """A row a trouble, a panel a metric."""
    figure, panels = plt.subplots(len(runs), 3, figsize=(9, 1.9 * len(runs)), sharex=True, layout="constrained")
    for row, (trouble, curves) in zip(panels, runs, strict=True):
        for panel, metric in zip(row, trouble.shown, strict=True):
            for label, colour in (("shipped", "0.6"), ("ill", "tab:red"), ("well again", "tab:green")):
                if label in curves:
                    panel.plot(curves[label]["step"], curves[label][metric], color=colour, label=label, lw=1.3)
            panel.set_title(metric, fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(trouble.name, fontweight="bold")
    panels[0][0].legend(frameon=False)
    for panel in panels[-1]:
        panel.set_xlabel("iteration")
    figure.savefig(CHART, metadata={"Date": None})


def main() -> None:
    clone = Path(sys.argv[1])
    (clone / "praise.py").write_text(PRAISE)
    shipped, healthy = run(clone, {})
    runs, finals = [], {"shipped": healthy}
    for trouble in TROUBLES:
        curves = {"shipped": shipped}
        for label, settings in (("ill", trouble.ill), ("well again", trouble.well)):
            if settings:
                curves[label], finals[f"{trouble.name}: {label}"] = run(clone, settings)
        runs.append((trouble, curves))
    draw(runs)
    columns = ("score_gain", "judge_gain", "kl_sequence", "length_ratio", "actor_eos_rate", "actor_distinct_bigrams")
    print("|  |", " | ".join(columns), "|")
    for name, final in finals.items():
        print(f"| {name} |", " | ".join(f"{final[column]:.2f}" for column in columns), "|")


if __name__ == "__main__":
    main()

"""The end of a run in words and tables, read from `metrics/*.json` and the samples alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_tasks.stages import STAGES

Table = tuple[str, list[str], list[list[str]]]

_SAMPLES = "Held-out prompts, both answers"


@dataclass(frozen=True)
class Report:
    """Tables of text, and the lines that follow them."""

    tables: list[Table]
    notes: list[str]

    def is_text(self, title: str) -> bool:
        """Whether a table holds prose rather than numbers."""
        return title == _SAMPLES


def make_report(root: Path, examples: int, until: str) -> Report:
    """What the stages up to `until` left; what lies in the workspace of a later one is of another model."""
    tables, notes = [], []
    reward, evaluation, register = (
        _read(root / f"metrics/{name}.json") if list(STAGES).index(name) <= list(STAGES).index(until) else {}
        for name in ("reward", "evaluate", "register")
    )
    if reward:
        tables.append(_reward_table(reward))
    if evaluation:
        tables.append(_evaluation_table(evaluation))
        tables += _best_of_tables(evaluation)
        tables.append(_samples_table(root / "samples/evaluate.jsonl", examples))
    if register:
        for rule, outcome in register["gate"].items():
            verdict = "passed" if outcome["passed"] else "FAILED"
            notes.append(f"gate: {rule} {verdict} (found {outcome['found']:.3f}, limit {outcome['limit']:.3f})")
    elif evaluation:
        notes.append("The gate is the next stage's: `rlhf run` goes on with register.")
    return Report(tables, notes)


def headline(stage: str, metrics: dict[str, float]) -> str:
    """The one or two numbers that say how a stage went."""
    if stage == "register" and "gate/passed" in metrics:
        return "the gate passed" if metrics["gate/passed"] else "the gate FAILED, so it is not promoted"
    forms = {
        "prepare": "{sft_train:.0f} SFT rows, {pairs_train:.0f} pairs, {prompts_train:.0f} prompts to train on",
        "sft": "held-out perplexity {heldout_perplexity:.1f} a token",
        "reward": "held-out accuracy {accuracy:.3f} [{accuracy_low:.3f}, {accuracy_high:.3f}]",
        "ppo": "score {objective/score:+.2f}, KL {objective/kl:.2f}, explained {advantage/explained_variance:.2f}",
        "evaluate": "gain {score_gain:+.2f} sd [{score_gain_low:+.2f}, {score_gain_high:+.2f}] at KL {kl_sequence:.2f}",
    }
    try:
        return forms.get(stage, "").format_map(metrics)
    except KeyError:
        return ""


def _reward_table(m: dict[str, Any]) -> Table:
    rows = [["all", f"{m['pairs']:.0f}", f"{m['accuracy']:.3f} [{m['accuracy_low']:.3f}, {m['accuracy_high']:.3f}]"]]
    by_gap = m["accuracy_by_gap"]
    if len(by_gap) > 1:  # pairs without margins have no gaps to tell apart
        rows += [[gap, str(part["pairs"]), f"{part['accuracy']:.3f}"] for gap, part in by_gap.items()]
    return ("Reward model on held-out pairs", ["rating gap", "pairs", "accuracy [95 % interval]"], rows)


def _evaluation_table(m: dict[str, Any]) -> Table:
    def gain(name: str) -> str:
        return f"{m[name]:+.3f} [{m[name + '_low']:+.3f}, {m[name + '_high']:+.3f}]"

    rows = [["reward score", f"{m['sft_score']:.3f}", f"{m['actor_score']:.3f}", gain("score_gain") + " sd"]]
    if "function_gain" in m:
        own = [f"{m[f'{name}_function']:.3f}" for name in ("sft", "actor")]
        rows.append(["reward function", *own, gain("function_gain")])
    if "judge_gain" in m:
        rows.append(["VADER of the whole text", f"{m['sft_judge']:.3f}", f"{m['actor_judge']:.3f}", gain("judge_gain")])
    for name, text, unit in (("score", "score", " sd"), ("judge", "VADER", "")):
        if f"equal_length_{name}_gain" in m:
            rows.append([f"{text}, both cut to one length", "", "", gain(f"equal_length_{name}_gain") + unit])
    rows += [
        ["KL to SFT, nats a response", "0", f"{m['kl_sequence']:.2f}", ""],
        ["response length, tokens", f"{m['sft_length']:.1f}", f"{m['actor_length']:.1f}", f"x {m['length_ratio']:.2f}"],
        ["EOS rate", f"{m['sft_eos_rate']:.2f}", f"{m['actor_eos_rate']:.2f}", ""],
        ["distinct bigrams", f"{m['sft_distinct_bigrams']:.3f}", f"{m['actor_distinct_bigrams']:.3f}", ""],
        ["win rate over SFT", "0.500", f"{m['win_rate']:.3f} [{m['win_rate_low']:.3f}, {m['win_rate_high']:.3f}]", ""],
    ]
    title = f"SFT against Actor on {m['prompts']:.0f} held-out prompts"
    return (title, ["", "SFT", "Actor", "gain [95 % interval]"], rows)


def _best_of_tables(m: dict[str, Any]) -> list[Table]:
    """The Actor's one answer beside the best of several of SFT's; none where only one was drawn."""
    rows = []
    for n in (n for n in range(2, 10**4) if f"best_of_{n}_score_gain" in m):
        rows.append([f"SFT, best of {n}", *_gained(m, f"best_of_{n}_"), f"at most {m[f'best_of_{n}_kl_bound']:.2f}"])
    if not rows:
        return []
    rows.append(["Actor, one answer", *_gained(m, ""), f"{m['kl_sequence']:.2f}"])
    return [("What drawing several answers does without training", ["", "score", "VADER", "length", "KL, nats"], rows)]


def _gained(m: dict[str, Any], of: str) -> list[str]:
    judge = f"{m[f'{of}judge_gain']:+.3f}" if f"{of}judge_gain" in m else ""
    return [f"{m[f'{of}score_gain']:+.3f} sd", judge, f"x {m[f'{of}length_ratio']:.2f}"]


def _samples_table(path: Path, examples: int) -> Table:
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(examples), file, strict=False)]
    return (_SAMPLES, ["prompt", "SFT", "Actor"], [[row["prompt"], row["sft"], row["actor"]] for row in rows])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}

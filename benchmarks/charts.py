"""The race in pictures and tables: benchmarks/numbers/*.json as docs/speed.svg, and between the marks in docs/speed.md.

python -m benchmarks.charts
"""

from __future__ import annotations

import json
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 8}

import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.ppo import HERE, PHASES, table  # noqa: E402

NUMBERS = ("smollm2-ragged", "smollm2-ragged-top6", "smollm2-dense", "tiny-widevocab")
DOCS = HERE.parent / "docs"
BEGIN, END = "<!-- numbers -->\n", "<!-- end of numbers -->\n"
COLOURS = {"rollout": "tab:blue", "evaluation": "tab:cyan", "experience": "tab:gray", "optimization": "tab:orange"}


def main() -> None:
    paths = [HERE / f"numbers/{name}.json" for name in NUMBERS]
    results = {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}
    draw(results)
    page = DOCS / "speed.md"
    before, rest = page.read_text().split(BEGIN)
    tables = "\n\n".join(table(result) for result in results.values())
    page.write_text(f"{before}{BEGIN}\n{tables}\n\n{END}{rest.split(END)[1]}")


def draw(results: dict[str, Any]) -> None:
    """Seconds an iteration by phase, and peak memory, beside the peer's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.5 + 0.8 * len(results)), sharey=True, layout="constrained")
    for place, result in enumerate(results.values()):
        engine, start = result["engine"], 0.0
        for phase in PHASES:
            seconds = engine["phases"][phase]["seconds"]["median"]
            left.barh(place - 0.2, seconds, 0.35, left=start, color=COLOURS[phase], label=phase if not place else None)
            start += seconds
        right.barh(place - 0.2, engine["peak_gib"]["median"], 0.35, color="tab:orange")
        if peer := result.get("peer"):
            left.barh(place + 0.2, peer["seconds"]["median"], 0.35, color="0.75", label="TRL" if not place else None)
            right.barh(place + 0.2, peer["peak_gib"]["median"], 0.35, color="0.75")
    left.set_yticks(range(len(results)), results)
    left.invert_yaxis()
    left.set_xlabel("seconds an iteration")
    right.set_xlabel("peak GiB")
    figure.legend(loc="outside upper left", ncols=len(PHASES) + 1, frameon=False)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

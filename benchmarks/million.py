"""How long a great number of preference pairs takes to prepare, and how much memory.

python benchmarks/million.py [PAIRS] [FOLDER]    1,000,000 pairs by default, in a temporary folder; about 5 GB of disk
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf_tasks.config import parse_params
from rlhf_tasks.data.prepare import run
from rlhf_tasks.data.tables import TokenColumn, read_table

WORDS = [
    a + b + c for a in ("ba", "ko", "shi", "lum") for b in ("ra", "tel", "no", "wi", "gu") for c in ("n", "st", "")
]


def write_pairs(path: Path, pairs: int) -> None:
    """Pairs of prompts of about 12 words and answers of about 25, the words drawn as seldom ones are in a language."""
    draw = random.Random(0)
    frequency = [1 / rank for rank in range(1, len(WORDS) + 1)]
    words = draw.choices(WORDS, frequency, k=1_000_000)

    def text(mean: int) -> str:
        start, length = draw.randrange(len(words) - 2 * mean), draw.randint(mean // 2, mean + mean // 2)
        return " ".join(words[start : start + length])

    with path.open("w", encoding="utf-8") as file:
        for number in range(pairs):
            row = {"prompt": f"{text(12)} {number}?", "chosen": f" {text(25)}", "rejected": f" {text(25)}"}
            file.write(json.dumps(row) + "\n")


def prepare(source: Path, out: Path) -> dict[str, float]:
    """Prepare the pairs, and read as much of them as a training does before its first step."""
    data = {"sources": [{"kind": "preference", "path": str(source)}], "template": "none"}
    params = parse_params({"data": data})
    started, calls = time.monotonic(), []
    counts = run(seed=0, data=params.data, model=params.model, out=out, progress=lambda **step: calls.append(step))
    assert calls[-1]["done"] == calls[-1]["total"]
    return {
        "seconds": time.monotonic() - started,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "pairs": counts["pairs_train"] + counts["pairs_heldout"],
        "steps_shown": len(calls),
    }


def open_pairs(out: Path) -> dict[str, float]:
    """Open the prepared pairs as the reward stage does, up to its first row."""
    started, before = time.monotonic(), _read_bytes()
    table = read_table(out / "pairs/train.arrow", ["input_ids_chosen", "input_ids_rejected", "margin"])
    chosen = TokenColumn(table, "input_ids_chosen")
    lengths = chosen.lengths()
    assert len(chosen[len(lengths) // 2]) == lengths[len(lengths) // 2]
    return {
        "seconds": time.monotonic() - started,
        "file_mb": (out / "pairs/train.arrow").stat().st_size / 2**20,
        "mapped_mb": (_read_bytes() - before) / 2**20,
    }


def _read_bytes() -> int:
    """Bytes of files that are in this process's memory."""
    status = Path("/proc/self/status").read_text().split("RssFile:")[1]
    return int(status.split()[0]) * 1024


def main() -> None:
    if sys.argv[1:2] in (["prepare"], ["open"]):
        paths = [Path(argument) for argument in sys.argv[2:]]
        print(json.dumps(prepare(*paths) if sys.argv[1] == "prepare" else open_pairs(*paths)))
        return
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        source, out = Path(folder) / "pairs.jsonl", Path(folder) / "out"
        write_pairs(source, pairs)
        print(json.dumps({"source_mb": source.stat().st_size / 2**20}))
        for arguments in (["prepare", source, out], ["open", out]):  # each in a process of its own, for its peak
            command = [sys.executable, __file__, *map(str, arguments)]
            print(arguments[0], subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    main()

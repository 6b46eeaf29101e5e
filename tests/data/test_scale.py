"""Memory does not grow with the length of the data."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from rlhf_tasks.config import Ratings
from rlhf_tasks.data.feedback import Feedback
from rlhf_tasks.data.formats import Preference

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 6000


def test_texts_wait_on_disk(tmp_path):
    """36 MB of pairs, of which a batch at a time is in memory, while they are gathered and when they are read again."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    feedback, most_arrow = Feedback("none", None, 0.2, tmp_path), 0
    for i in range(PAIRS):
        feedback.add(f"file:{i}", Preference(f"prompt {i}", f" {i} good" * 300, f" {i} bad" * 350, 0.0))
        most_arrow = max(most_arrow, pa.total_allocated_bytes() - before)
    feedback.finish(0, Ratings())
    rows = 0
    for side in ("train", "heldout"):
        for batch in feedback.pairs.batches(feedback.wanted("pairs", side)):
            rows += len(batch)
            most_arrow = max(most_arrow, pa.total_allocated_bytes() - before)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == PAIRS
    assert (tmp_path / "pairs").stat().st_size > 25e6
    assert most < 18e6
    assert most_arrow < 18e6


@pytest.mark.slow
def test_the_opening_of_prepared_data_does_not_read_it(tmp_path):
    """100,000 pairs, a tenth of what `benchmarks/million.py` makes: what it costs at that size is in docs/data.md."""
    line = [sys.executable, str(ROOT / "benchmarks" / "million.py"), "100000", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines()[1:])
    prepared, opened = json.loads(found["prepare"]), json.loads(found["open"])
    assert prepared["pairs"] == 100_000
    assert prepared["peak_mb"] < 800
    assert prepared["steps_shown"] > 100
    assert opened["mapped_mb"] < opened["file_mb"] * 0.75, "what trains does not read it all before its first step"

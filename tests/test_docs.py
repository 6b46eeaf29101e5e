"""Pages whose examples run, print what they say."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_page_of_one_iteration_runs_as_it_stands() -> None:
    with torch.random.fork_rng():
        found = doctest.testfile(str(DOCS / "one-iteration.md"), module_relative=False)
    torch.set_printoptions(profile="default")
    assert found.attempted > 40
    assert found.failed == 0

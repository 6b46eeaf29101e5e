"""Which pairs are shown: those of a file, and answers that are drawn for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_tasks.data.formats import Compared
from rlhf_tasks.data.prompts import Instruction
from rlhf_tasks.errors import UserError
from rlhf_tasks.to_label import draw_pairs, read_pairs

SAMPLE = {"prompt": "a", "sft": " b", "sft_score": 1, "actor": " c", "actor_score": 2.5, "kl": 0.1}


def rows(path: Path, *found: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_rows_of_either_shape_are_pairs(tmp_path: Path) -> None:
    """A sample's prompt is the one that was asked, not the text that a template made of it."""
    asked = {"asked": {"instruction": "Add", "input": "1 1"}, "prompt": "### Instruction:\nAdd ..."}
    found = read_pairs(rows(tmp_path / "p.jsonl", SAMPLE, SAMPLE | asked, {"prompt": "a", "answers": ["b", "c"]}))
    assert list(found.pairs.values()) == [
        Compared("a", (" b", " c"), (1.0, 2.5), ("sft", "actor")),
        Compared(Instruction("Add", "1 1"), (" b", " c"), (1.0, 2.5), ("sft", "actor")),
        Compared("a", ("b", "c"), None, None),
    ]
    assert list(found.pairs) == [pair.pair for pair in found.pairs.values()]


def test_what_cannot_be_compared_is_left_out(tmp_path: Path) -> None:
    useless = [SAMPLE | {"sft": " c "}, SAMPLE | {"actor": "\n"}, {"prompt": "a", "answers": ["", "b"]}]
    turned = SAMPLE | {"sft": " c", "actor": " b"}
    found = read_pairs(rows(tmp_path / "p.jsonl", *useless, SAMPLE, turned))
    assert [len(found.pairs), found.left_out] == [1, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, r"p.jsonl:1: no `answers`"),
        (SAMPLE | {"prompt": 3}, r"p.jsonl:1: `prompt` is 3"),
        (SAMPLE | {"asked": [1], "prompt": None}, r"p.jsonl:1: no `prompt`"),
        (SAMPLE | {"sft_score": "x"}, r'p.jsonl:1: `scores\[1\]` is "x"'),
        (SAMPLE | {"sft": " c"}, r"p.jsonl: found 1 rows, expected one at least with two different answers"),
        ([], r"p.jsonl:1: found a list"),
    ],
)
def test_a_wrong_row_is_told(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pairs(rows(tmp_path / "p.jsonl", row))


def test_a_missing_file_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate.jsonl: not found; `rlhf run --until evaluate` makes"):
        read_pairs(tmp_path / "evaluate.jsonl")


def test_answers_are_drawn_to_training_prompts(finished: Any, tmp_path: Path) -> None:
    root, params = finished.workspace.root, finished.workspace.params
    steps = list[dict[str, int]]()
    for count in (6, 9):
        draw_pairs(params, root, count, tmp_path / f"new/{count}.jsonl", lambda **step: steps.append(step))
    few, more = ([json.loads(row) for row in (tmp_path / f"new/{n}.jsonl").read_text().splitlines()] for n in (6, 9))
    assert [len(few), len(more)] == [6, 9]
    assert [(row["asked"], row["sft"], row["actor"]) for row in more[:6]] == [
        (row["asked"], row["sft"], row["actor"]) for row in few
    ]
    assert not any("judge" in name for name in few[0])
    assert len({json.dumps(row["asked"]) for row in more}) == 9
    assert steps[-1] == {"done": 2, "total": 2}
    pairs = read_pairs(tmp_path / "new/9.jsonl").pairs.values()
    assert pairs
    assert all(pair.scores for pair in pairs)
    evaluated = read_pairs(root / "samples/evaluate.jsonl").pairs.values()
    assert {pair.prompt for pair in pairs}.isdisjoint(pair.prompt for pair in evaluated)


def test_before_ppo_nothing_is_drawn(sketch: Any) -> None:
    (sketch.root / "checkpoints/actor/file").unlink()
    (sketch.root / "checkpoints/actor").rmdir()
    with pytest.raises(UserError, match=r"checkpoints/actor: not found; `rlhf run --until ppo` makes it, then draw ag"):
        draw_pairs(sketch.params, sketch.root, 1, sketch.root / "out.jsonl", lambda **step: None)

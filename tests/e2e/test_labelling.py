"""Feedback comes back in: people label what the pipeline's models answered, and it learns from that."""

from __future__ import annotations

import json
import signal

import pytest
from e2e.conftest import Project
from e2e.test_doors import STAGES, states
from label_server import LabelServer, labelling
from ruamel.yaml import YAML

from rlhf_tasks.data.judgements import standing
from rlhf_tasks.label_file import LabelFile


def label_all(server: LabelServer, liked: str) -> int:
    """Prefer the answer with more of a letter, pair after pair; how many there were."""
    state = server.ask("/state?rater=ada")
    while pair := state["pair"]:
        first, second = (answer.count(liked) for answer in pair["answers"])
        choice = "tie" if first == second else "first" if first > second else "second"
        state = server.ask("/judge", {"rater": "ada", "pair": pair["id"], "choice": choice})
    return state["done"]


@pytest.mark.slow
def test_labels_of_drawn_answers_retrain_the_reward_model_and_what_depends_on_it(copy_of: Project) -> None:
    """The server is killed in the end. SFT, whose data labels do not feed, is not trained again, by either door."""
    with labelling(copy_of.root, "--draw", "40", "--port", "0") as server:
        assert "samples/label.jsonl" in server.said
        judged = label_all(server, "e")
        server.end(signal.SIGKILL)
    assert judged > 20
    kept = standing(LabelFile(copy_of.root / "data/labels.jsonl").judged())
    assert len(kept) == judged
    sources = YAML(typ="safe").load((copy_of.root / "params.yaml").read_text())["data"]["sources"]
    copy_of.set(data__sources=[*sources, {"kind": "labels", "path": "data/labels.jsonl"}])

    before, pairs = copy_of.lock(), copy_of.metrics("prepare")["pairs_train"]
    done = copy_of.rlhf("run")
    again = dict.fromkeys(("prepare", "reward", "ppo", "evaluate", "register"), "done")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached") | again, done.stdout + done.stderr
    decided = sum(one.chosen is not None for one in kept)
    assert 0 < copy_of.metrics("prepare")["pairs_train"] - pairs <= decided
    after = copy_of.lock()
    changed = {path for stage in after for path, md5 in after[stage].items() if before[stage].get(path) != md5}
    assert "data/prepared/pairs" in changed
    assert "checkpoints/reward" in changed
    assert changed.isdisjoint(
        {"data/prepared/sft", "data/prepared/prompts", "data/prepared/tokenizer", "checkpoints/sft"}
    )
    assert copy_of.dvc("status").stdout.strip() == "Data and pipelines are up to date."

    with labelling(copy_of.root, "--port", "0") as server:  # samples of the new Actor
        state = server.ask("/state?rater=ada")
        server.ask("/judge", {"rater": "ada", "pair": state["pair"]["id"], "choice": "skip"})
    assert "data/labels.jsonl" in copy_of.dvc("status").stdout
    why = copy_of.rlhf("why", "prepare").stdout
    assert "data/labels.jsonl" in why
    run = copy_of.rlhf("run")
    skipped = dict.fromkeys(STAGES, "cached") | {"prepare": "done"}
    assert states(run.stdout) == skipped, "a skip is a line, and no pair"
    lineage = json.loads((copy_of.root / "lineage/prepare.json").read_text())
    assert "data/labels.jsonl" in lineage["inputs"]

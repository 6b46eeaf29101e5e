"""SFT against Actor: a fair comparison finds nothing where there is nothing, and its intervals hold what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_tasks import evaluate
from rlhf_tasks.errors import UserError
from rlhf_tasks.evaluate import Answers, compare, heldout_prompts, sequence_kl, vader
from rlhf_tasks.intervals import interval
from rlhf_tasks.ppo.experience import Episodes


def run(finished: Any, out: Path, *, actor: str = "checkpoints/actor", **settings: Any) -> dict[str, float]:
    root, params = finished.workspace.root, finished.workspace.params
    out.mkdir()
    return evaluate.run(
        seed=0,
        runtime=params.runtime,
        generation=params.generation,
        reward_function=params.reward_function,
        evaluate=params.evaluate.model_copy(update=settings),
        prompts=root / "data/prepared/prompts",
        sft=root / "checkpoints/sft",
        reward=root / "checkpoints/reward",
        actor=root / actor,
        out=out,
        partial=out,
        progress=lambda **values: None,
    )


# Intervals -----------------------------------------------------------------------------------------------------------


def test_nineteen_of_twenty_intervals_hold_the_mean() -> None:
    """300 samples of 100 exponential numbers with mean 2: between 90 and 98 % of the intervals hold it."""
    random = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        found = interval("x", random.exponential(2.0, 100), 300, seed)
        assert found["x_low"] <= found["x"] <= found["x_high"]
        held += found["x_low"] <= 2.0 <= found["x_high"]
    assert 0.90 <= held / 300 <= 0.98


def test_an_interval_is_as_wide_as_its_standard_error_says() -> None:
    values = np.random.default_rng(1).normal(5.0, 3.0, 900)
    found = interval("gain", values, 4000, 0)
    assert found["gain"] == pytest.approx(values.mean())
    assert found["gain_high"] - found["gain_low"] == pytest.approx(2 * 1.96 * 3.0 / 30, rel=0.1)
    assert interval("gain", values, 4000, 0) == found
    assert interval("gain", values, 4000, 1) != found


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert interval("x", np.full(5, 0.25), 100, 0) == {"x": 0.25, "x_low": 0.25, "x_high": 0.25}


# The comparison ------------------------------------------------------------------------------------------------------


def answers(scores: list[float], judged: list[float] | None, responses: list[list[int]], ended: list[bool]) -> Answers:
    lengths = np.array([len(response) for response in responses], dtype=float)
    rows = Episodes([[5]] * len(responses), responses, ended)
    return Answers(rows, [""] * len(responses), np.array(scores), None if judged is None else np.array(judged), lengths)


def test_a_comparison_is_paired_by_prompt() -> None:
    sft = answers([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [[7, 8], [7], [9, 9, 9]], [True, True, False])
    actor = answers([2.0, 2.0, 2.5], [0.4, 0.5, 0.6], [[7, 8], [7, 8], [1]], [True, True, True])
    found = compare(sft, actor, np.array([1.0, 2.0, 6.0]), score_std=0.5, resamples=200, seed=0)
    expected = {
        "prompts": 3,
        "sft_score": 2.0,
        "actor_score": 13 / 6,
        "score_gain": (2 + 0 - 1) / 3,
        "win_rate": 0.5,  # one better, one worse, one the same
        "judge_gain": 0.3,
        "judge_gain_low": 0.3,
        "judge_gain_high": 0.3,
        "kl_sequence": 3.0,
        "sft_length": 2.0,
        "actor_length": 5 / 3,
        "length_ratio": 5 / 6,
        "sft_eos_rate": 2 / 3,
        "actor_eos_rate": 1.0,
        "sft_distinct_bigrams": 2 / 3,
        "actor_distinct_bigrams": 0.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_without_a_judge_nothing_is_judged() -> None:
    side = answers([1.0], None, [[7, 1]], [True])
    found = compare(side, side, np.zeros(1), 1.0, 100, 0)
    assert not [name for name in found if "judge" in name]


def test_a_model_against_itself_gains_nothing(finished: Any, tmp_path: Path) -> None:
    metrics = run(finished, tmp_path / "out", actor="checkpoints/sft")
    for name in ("score_gain", "judge_gain", "kl_sequence"):
        assert [metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]] == [0, 0, 0]
    assert metrics["win_rate"] == 0.5
    assert metrics["length_ratio"] == 1.0
    for name in ("score", "judge", "length", "eos_rate", "distinct_bigrams"):
        assert metrics[f"sft_{name}"] == metrics[f"actor_{name}"]


def test_the_stage_leaves_metrics_and_every_sample(finished: Any, tmp_path: Path) -> None:
    metrics = run(finished, tmp_path / "out")
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["kl_sequence"] != 0
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(rows) == metrics["prompts"] == 16
    assert len({row["prompt"] for row in rows}) == 16
    assert sum(row["actor_score"] for row in rows) / 16 == pytest.approx(metrics["actor_score"], abs=1e-5)
    assert sum(row["sft_judge"] for row in rows) / 16 == pytest.approx(metrics["sft_judge"], abs=1e-5)
    assert sum(row["kl"] for row in rows) / 16 == pytest.approx(metrics["kl_sequence"], abs=1e-5)
    assert all(row["asked"]["prompt"].endswith(row["prompt"]) for row in rows)  # 16 tokens of it are read
    for row in rows:  # VADER reads the whole text, opening and continuation
        assert row["actor_judge"] == vader(row["prompt"] + row["actor"])
    assert run(finished, tmp_path / "again") == metrics


def test_gains_at_equal_length_are_of_texts_cut_alike(finished: Any, tmp_path: Path) -> None:
    """An Actor that says what SFT says and goes on has gained nothing; ends that are cut off count no more."""
    short = Episodes([[5], [6]], [[7, 1], [8, 9, 9]], [True, False])
    long = Episodes([[5], [6]], [[7, 1], [8, 9, 9, 9, 1]], [True, True])
    one, other = evaluate.cut_to_equal_length(short, long)
    assert one == other == Episodes([[5], [6]], [[7], [8, 9, 9]], [False, False])
    assert evaluate.cut_to_equal_length(long, short) == (one, one)
    metrics = run(finished, tmp_path / "out")
    assert metrics["equal_length_score_gain_low"] <= metrics["equal_length_score_gain"]
    assert metrics["equal_length_score_gain"] != metrics["score_gain"]
    same = run(finished, tmp_path / "same", actor="checkpoints/sft")
    assert same["equal_length_score_gain"] == same["equal_length_judge_gain"] == 0


def test_a_judge_may_be_switched_off(finished: Any, tmp_path: Path) -> None:
    metrics = run(finished, tmp_path / "out", judge=None, prompts=4)
    assert not [name for name in metrics if "judge" in name]
    assert "sft_judge" not in (tmp_path / "out/samples.jsonl").read_text()


@torch.no_grad()
def test_the_kl_is_summed_over_each_responses_own_tokens(four: Any, rollout: Episodes) -> None:
    found = sequence_kl(four.actor, four.ref, rollout, temperature=0.7)
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids = torch.tensor([[*prompt, *response]])
        actor, ref = (
            (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7)
            .log_softmax(-1)
            .gather(1, torch.tensor(response)[:, None])
            .sum()
            for model in (four.actor, four.ref)
        )
        assert found[row] == pytest.approx((actor - ref).item(), abs=1e-3)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_different_ones_in_the_seeds_order(finished: Any) -> None:
    folder = finished.workspace.root / "data/prepared/prompts"
    first, again, other = (heldout_prompts(folder, 20, seed).encoded for seed in (0, 0, 1))
    assert first == again != other
    assert len({tuple(prompt) for prompt in first}) == 20


def test_too_few_held_out_prompts_are_told(finished: Any, tmp_path: Path) -> None:
    have = int(finished.entries["prepare"].manifest["metrics"]["prompts_heldout"])
    with pytest.raises(UserError, match=rf"evaluate\.prompts: found {have + 1}, .* only {have} held-out prompts"):
        run(finished, tmp_path / "out", prompts=have + 1)
    assert len(heldout_prompts(finished.workspace.root / "data/prepared/prompts", have, 0).encoded) == have


# The judge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "compound"),
    [
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is smart, handsome, and funny!", 0.8439),
        ("VADER is not smart, handsome, nor funny.", -0.7424),
        ("The book was good.", 0.4404),
        ("Today SUX!", -0.5461),
        ("A film about a train.", 0.0),
        ("", 0.0),
    ],
)
def test_vader_says_of_known_texts_what_its_authors_print(text: str, compound: float) -> None:
    assert vader(text) == compound

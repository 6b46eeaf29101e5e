"""The reward model: its loss against a peer's numbers, and what is said of it on held-out pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from rlhf_tasks import config, reward
from rlhf_tasks.data.encoder import SCHEMAS
from rlhf_tasks.data.tables import write_table
from rlhf_tasks.models import load_actor, load_score_statistics, load_scorer
from rlhf_tasks.reward import Pairs, calibration_error, evaluate_pairs, pairwise_loss, score_texts, wilson_interval

CPU = torch.device("cpu")
GOLDEN = json.loads((Path(__file__).parent / "golden/reward_model_loss.json").read_text())["cases"]


# The loss ------------------------------------------------------------------------------------------------------------


def tensor(array: dict[str, Any]) -> Tensor:
    return torch.tensor([float(x) for x in array["data"]], dtype=torch.float64).reshape(array["shape"])


@pytest.mark.parametrize("case", [case for case in GOLDEN if case["status"] != "peer_bug"], ids=lambda case: case["id"])
def test_loss_and_gradients_are_the_peers(case: dict[str, Any]) -> None:
    given, expected = ({k: tensor(v) for k, v in case[side].items()} for side in ("inputs", "outputs"))
    chosen, rejected = (given[f"rewards_{side}"].requires_grad_() for side in ("chosen", "rejected"))
    loss = pairwise_loss(chosen, rejected, given.get("margin"), case["params"]["center_rewards_coefficient"] or 0.0)
    loss.backward()
    for actual, name in ((loss, "loss"), (chosen.grad, "grad_chosen"), (rejected.grad, "grad_rejected")):
        torch.testing.assert_close(actual, expected[name], rtol=1e-9, atol=1e-9)


def test_the_peers_numbers_hold_margins_centering_and_tails() -> None:
    kept = [case for case in GOLDEN if case["status"] != "peer_bug"]
    assert len(kept) >= 9
    assert any(case["params"]["with_margin"] for case in kept)
    assert any(case["params"]["center_rewards_coefficient"] for case in kept)
    assert any(abs(x) > 40 for case in kept for x in case["inputs"]["rewards_chosen"]["data"])


def test_a_margin_asks_for_that_much_more() -> None:
    chosen, rejected, margin = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])
    expected = (math.log(2) + math.log(1 + math.e)) / 2
    assert pairwise_loss(chosen, rejected, margin).item() == pytest.approx(expected)
    assert pairwise_loss(chosen - margin, rejected).item() == pytest.approx(expected)


@pytest.mark.parametrize("shapes", [((4, 1), (4, 1), (4,)), ((4,), (4,), (4, 1)), ((4,), (3,), None)])
def test_shapes_that_would_broadcast_are_refused(shapes: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="expected one shape"):
        pairwise_loss(*(torch.zeros(shape) if shape else None for shape in shapes))


def test_far_apart_scores_give_no_infinity() -> None:
    loss = pairwise_loss(torch.tensor([-500.0]), torch.tensor([500.0]))
    assert loss.item() == 1000


# Statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes: int, count: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3; and the mirror image."""
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=6e-5)
    assert wilson_interval(count - successes, count) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def calibrated(count: int = 200_000) -> Tensor:
    """Gaps of chosen - rejected where the better by r is chosen with probability σ(r)."""
    random = torch.Generator().manual_seed(0)
    gap = 2 * torch.randn(count, generator=random)
    chosen = torch.rand(count, generator=random) < torch.sigmoid(gap)
    return torch.where(chosen, gap, -gap)


def test_a_calibrated_model_has_no_calibration_error() -> None:
    assert calibration_error(calibrated()) < 0.01


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_model_too_unsure_or_too_sure_has_some(factor: float) -> None:
    assert calibration_error(factor * calibrated()) > 0.1


@pytest.mark.parametrize(
    ("gaps", "error"), [([20.0] * 4, 0.0), ([-20.0] * 4, 1.0), ([20.0, -20.0], 0.5), ([1e-7], 0.5)]
)
def test_calibration_error_of_a_few(gaps: list[float], error: float) -> None:
    assert calibration_error(torch.tensor(gaps)) == pytest.approx(error, abs=1e-4)


# Pairs ---------------------------------------------------------------------------------------------------------------

TEXTS = [[9, 30, 44, 1], [9, 30, 50, 51, 52, 1], [17, 18, 1], [9, 80, 81, 1], [9, 120, 1], [33, 34, 35, 36, 37, 38, 1]]


def pairs_file(folder: Path, rows: Sequence[tuple[list[int], list[int], float]]) -> Path:
    cells = [
        {
            "prompt": "", "chosen": "", "rejected": "", "margin": margin,
            "input_ids_chosen": chosen, "attention_mask_chosen": [1] * len(chosen),
            "input_ids_rejected": rejected, "attention_mask_rejected": [1] * len(rejected),
        }
        for chosen, rejected, margin in rows
    ]  # fmt: skip
    assert isinstance(SCHEMAS["pairs"], pa.Schema)
    write_table(folder / "pairs.arrow", cells, SCHEMAS["pairs"])
    return folder / "pairs.arrow"


@torch.no_grad()
def test_a_text_has_one_score_whatever_stands_beside_it(tiny_scorer: Path) -> None:
    scorer = load_scorer(tiny_scorer, CPU)
    together = score_texts(scorer, TEXTS, CPU)
    alone = [scorer(input_ids=torch.tensor([text])).logits.item() for text in TEXTS]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)


def test_held_out_pairs_are_told_as_they_are(tiny_scorer: Path, tmp_path: Path) -> None:
    """Pairs whose outcome is known, because each is chosen by the model's own scores, or against them."""
    scorer = load_scorer(tiny_scorer, CPU)
    with torch.no_grad():
        score = score_texts(scorer, TEXTS, CPU).tolist()
    meetings = [(0, 1, 0.5), (1, 2, 1.0), (2, 3, 1.5), (3, 4, 3.9), (4, 5, 4.0), (5, 0, 7.0)]
    rows, right, longer = [], [], []
    for n, (i, j, margin) in enumerate(meetings):
        better, worse = (i, j) if (score[i] > score[j]) == (n % 3 != 0) else (j, i)  # every third against the model
        rows.append((TEXTS[better], TEXTS[worse], margin))
        right.append(n % 3 != 0)
        longer.append(len(TEXTS[better]) - len(TEXTS[worse]))
    metrics, by_gap = evaluate_pairs(scorer, Pairs(pairs_file(tmp_path, rows)), CPU)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == pytest.approx(wilson_interval(4, 6))
    assert metrics["pairs"] == 6
    assert metrics["chosen_longer_share"] == pytest.approx(sum(x > 0 for x in longer) / 6)
    unequal = [(r, x) for r, x in zip(right, longer, strict=True) if x]
    assert metrics["scored_longer_higher_share"] == pytest.approx(sum(r == (x > 0) for r, x in unequal) / len(unequal))
    by_hand = {"0 to 1": [0], "1 to 2": [1, 2], "3 to 4": [3], "4 and more": [4, 5]}
    assert by_gap == {
        name: {"pairs": len(members), "accuracy": pytest.approx(sum(right[m] for m in members) / len(members))}
        for name, members in by_hand.items()
    }


def test_pairs_of_equal_lengths_say_nothing_of_length(tiny_scorer: Path, tmp_path: Path) -> None:
    """As where every answer was cut to data.max_response_tokens: no metric may become NaN, which no JSON holds."""
    path = pairs_file(tmp_path, [(TEXTS[0], TEXTS[3], 1.0), (TEXTS[2], TEXTS[4], 2.0)])
    metrics, _ = evaluate_pairs(load_scorer(tiny_scorer, CPU), Pairs(path), CPU)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["chosen_longer_share"] == 0


# The stage -----------------------------------------------------------------------------------------------------------


def train(finished: Any, out: Path, **settings: Any) -> dict[str, float]:
    root, params = finished.workspace.root, finished.workspace.params
    out.mkdir()
    return reward.run(
        seed=0,
        runtime=params.runtime,
        generation=params.generation,
        reward=params.reward.model_copy(update=settings),
        pairs=root / "data/prepared/pairs",
        prompts=root / "data/prepared/prompts",
        sft=root / "checkpoints/sft",
        out=out,
        partial=out / "partial",
        progress=lambda **values: None,
    )


def test_the_stage_leaves_a_model_its_statistics_and_its_metrics(finished: Any, tmp_path: Path) -> None:
    metrics = train(finished, tmp_path / "out", epochs=2)
    checkpoint = tmp_path / "out/checkpoint"
    assert load_score_statistics(checkpoint) == (metrics["score_mean"], metrics["score_std"])
    assert metrics["score_std"] > 0
    written = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {name: written[name] for name in metrics} == metrics
    assert sum(part["pairs"] for part in written["accuracy_by_gap"].values()) == metrics["pairs"]
    scores, _ = evaluate_pairs(
        load_scorer(checkpoint, CPU), Pairs(finished.workspace.root / "data/prepared/pairs/heldout.arrow"), CPU
    )
    assert scores["loss"] == pytest.approx(metrics["loss"], abs=1e-5)


def test_the_head_has_a_rate_of_its_own(finished: Any, tmp_path: Path) -> None:
    train(finished, tmp_path / "out", learning_rate=1e-12, weight_decay=0.0, head_learning_rate=0.1)
    trained = load_scorer(tmp_path / "out/checkpoint", CPU)
    sft = load_actor(finished.workspace.root / "checkpoints/sft", CPU)
    for name, weight in sft.model.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], weight, atol=1e-6, rtol=0)
    assert trained.score.weight.abs().max() > 0.2


def test_a_margin_reaches_the_loss(finished: Any, tmp_path: Path) -> None:
    losses: list[list[float]] = []
    for scale in (0.0, 1.0):
        losses.append([])
        root, params = finished.workspace.root, finished.workspace.params
        (tmp_path / str(scale)).mkdir()
        reward.run(
            seed=0, runtime=params.runtime, generation=config.Generation(max_new_tokens=2),
            reward=config.Reward(epochs=1, margin_scale=scale, statistics_samples=2),
            pairs=root / "data/prepared/pairs", prompts=root / "data/prepared/prompts", sft=root / "checkpoints/sft",
            out=tmp_path / str(scale), partial=tmp_path / "partial",
            progress=lambda **values: losses[-1].append(values["loss"]),
        )  # fmt: skip
    assert losses[0][0] == pytest.approx(math.log(2), abs=0.05)
    assert losses[1][0] > losses[0][0] + 0.5  # margins are 1 and more here

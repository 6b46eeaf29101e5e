"""The reward stage: a scalar model of which answer people prefer, trained on pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_tasks.data.batching import Line, TokenRow
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.errors import UserError
from rlhf_tasks.forward import hidden_states
from rlhf_tasks.limits import check_room, positions
from rlhf_tasks.models import (
    SCORE_STATISTICS,
    load_actor,
    load_tokenizer,
    new_scorer,
    save_model,
    set_up_torch,
    stop_ids,
)
from rlhf_tasks.ppo.rollout import Sampling, sample_responses
from rlhf_tasks.seeds import permutation
from rlhf_tasks.training import Progress, adamw, fit, length_batches
from rlhf_tasks.trunk import freeze_trunk, learning

if TYPE_CHECKING:
    from rlhf_tasks import config

SCORING_BATCH_TOKENS = 16384
CALIBRATION_BINS = 10


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center: float = 0.0) -> Tensor:
    """Mean over N pairs of `-log σ(chosen - rejected - margin) + center · (chosen + rejected)²`; all `[N]`.

    Bradley-Terry with the margin of Touvron et al. 2023 (Llama 2, eq. 2) and the centering of Eisenstein et al. 2023.

    Raises:
        ValueError: the shapes differ; broadcasting `[N, 1]` against `[N]` would compare every pair with every other.
    """
    shapes = [x.shape for x in (chosen, rejected, margin) if isinstance(x, Tensor)]
    if len(set(shapes)) > 1:
        raise ValueError(f"chosen, rejected and margin have shapes {[list(s) for s in shapes]}, expected one shape [N]")
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -logsigmoid(gap)
    if center:
        loss = loss + center * (chosen + rejected) ** 2
    return loss.mean()


def run(
    *,
    seed: int,
    runtime: config.Runtime,
    generation: config.Generation,
    reward: config.Reward,
    pairs: Path,
    prompts: Path,
    sft: Path,
    out: Path,
    partial: Path,
    progress: Progress,
) -> dict[str, float]:
    """Train from the SFT checkpoint on pairs; leave `checkpoint/` (with score statistics) and `metrics.json` in `out`.

    Returns:
        Held-out accuracy with its 95 % interval, loss, calibration error, length bias and score statistics.
    """
    device = set_up_torch(runtime)
    tokenizer = load_tokenizer(sft)
    model = new_scorer(sft, tokenizer, seed, "reward", device)
    if reward.trainable_layers:
        freeze_trunk(model, reward.trainable_layers, "reward.trainable_layers")
    questions = TokenColumn(read_table(prompts / "train.arrow", ["input_ids"]), "input_ids")
    check_room(int(questions.lengths().max()), generation.max_new_tokens, positions(model.config))
    train, heldout = (Pairs(pairs / f"{split}.arrow") for split in ("train", "heldout"))

    def learn(batch: list[int]) -> dict[str, float]:
        chosen, rejected = train.scores(model, batch, device)
        margin = train.margins[batch].to(device) * reward.margin_scale
        loss = pairwise_loss(chosen, rejected, margin, reward.center)
        loss.backward()
        return {"loss": loss.item(), "accuracy": (chosen > rejected).float().mean().item()}

    fit(
        model, _optimizer(model, reward), learn, train.lengths, reward,
        seed_names=(seed, "reward"), partial=partial, progress=progress,
    )  # fmt: skip
    save_model(model, out / "checkpoint", tokenizer)
    metrics, by_gap = evaluate_pairs(model, heldout, device)
    statistics = score_statistics(model, sft, prompts, generation, reward.statistics_samples, seed, device)
    (out / "checkpoint" / SCORE_STATISTICS).write_text(json.dumps(statistics, indent=1))
    metrics |= {"score_mean": statistics["mean"], "score_std": statistics["std"]}
    (out / "metrics.json").write_text(json.dumps(metrics | {"accuracy_by_gap": by_gap}, indent=1))
    return metrics


class Pairs:
    """The encoded preference pairs of one split."""

    def __init__(self, path: Path) -> None:
        table = read_table(path, ["input_ids_chosen", "input_ids_rejected", "margin"])
        self.chosen, self.rejected = (TokenColumn(table, f"input_ids_{side}") for side in ("chosen", "rejected"))
        self.margins = torch.from_numpy(table["margin"].to_numpy().copy()).float()
        #: tokens of a row, both its texts
        self.lengths: list[int] = (self.chosen.lengths() + self.rejected.lengths()).tolist()

    def scores(self, model: Any, rows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Scores of the rows' chosen and rejected texts, each `[N]`."""
        texts = [self.chosen[i] for i in rows] + [self.rejected[i] for i in rows]
        both = score_texts(model, texts, device)
        return both[: len(rows)], both[len(rows) :]


def score_texts(model: Any, texts: Sequence[TokenRow], device: torch.device) -> Tensor:
    """The Reward's score of encoded texts: the head's output at each one's last token, `[N]`."""
    line = Line.of(texts, device)
    return model.score(hidden_states(model, line)[line.ends]).squeeze(-1)


@torch.no_grad()
def evaluate_pairs(model: Any, pairs: Pairs, device: torch.device) -> tuple[dict[str, float], dict[str, Any]]:
    """How often and how surely the model agrees with people on pairs, over all and by rating gap."""
    count = len(pairs.lengths)
    chosen, rejected = torch.zeros(count), torch.zeros(count)
    for batch in length_batches(pairs.lengths, SCORING_BATCH_TOKENS):
        chosen[batch], rejected[batch] = (scores.cpu() for scores in pairs.scores(model, batch, device))
    gap, right = chosen - rejected, (chosen > rejected).float()
    low, high = wilson_interval(right.sum().item(), count)
    longer = torch.tensor(pairs.chosen.lengths()) - torch.tensor(pairs.rejected.lengths())
    metrics = {
        "accuracy": right.mean().item(),
        "accuracy_low": low,
        "accuracy_high": high,
        "pairs": float(count),
        "loss": pairwise_loss(chosen, rejected).item(),
        "calibration_error": calibration_error(gap),
        "chosen_longer_share": (longer > 0).float().mean().item(),
    }
    if longer.any():  # else there is no longer one
        metrics["scored_longer_higher_share"] = (gap.sign() == longer.sign()).float()[longer != 0].mean().item()
    edges = [0.0, 1.0, 2.0, 3.0, 4.0, math.inf]
    by_gap = {}
    for start, end in pairwise(edges):
        inside = (pairs.margins >= start) & (pairs.margins < end)
        if inside.any():
            name = f"{start:g} and more" if math.isinf(end) else f"{start:g} to {end:g}"
            by_gap[name] = {"pairs": int(inside.sum()), "accuracy": right[inside].mean().item()}
    return metrics, by_gap


def calibration_error(gap: Tensor) -> float:
    """Expected calibration error of σ(r_a - r_b) as how often a is preferred; `gap` is chosen - rejected, `[N]`.

    Each pair is seen from the side that the model prefers: how often is that side, held with this confidence, chosen?
    """
    confidence, right = torch.sigmoid(gap.abs()), (gap > 0).float()
    bins = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    error = 0.0
    for b in bins.unique():
        inside = bins == b
        error += inside.float().mean().item() * abs(confidence[inside].mean().item() - right[inside].mean().item())
    return error


def wilson_interval(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share = successes / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return center - half, center + half


@torch.no_grad()
def score_statistics(
    model: Any, sft: Path, prompts: Path, generation: config.Generation, samples: int, seed: int, device: torch.device
) -> dict[str, float]:
    """Mean and standard deviation of the score on the SFT model's own responses to training prompts, and their length.

    Raises:
        UserError: every sample has the same score.
    """
    tokenizer, actor = load_tokenizer(sft), load_actor(sft, device)
    column = TokenColumn(read_table(prompts / "train.arrow", ["input_ids"]), "input_ids")
    rows = permutation(len(column), seed, "reward", "statistics", "prompts")
    questions = [column[rows[i % len(rows)]] for i in range(samples)]
    sampling = Sampling.of(generation, stop_ids(actor, tokenizer, generation.stop))
    answers = sample_responses(actor, questions, sampling, (seed, "reward", "statistics")).responses
    texts = [[*q, *a] for q, a in zip(questions, answers, strict=True)]
    scores = torch.zeros(samples)
    for batch in length_batches([len(t) for t in texts], SCORING_BATCH_TOKENS):
        scores[batch] = score_texts(model, [texts[i] for i in batch], device).cpu()
    if not scores.std() > 0:
        raise UserError(
            f"the Reward scores all {samples} SFT samples alike ({scores.mean():.3g}): nothing for PPO to learn; "
            "raise reward.epochs or reward.learning_rate, or look at the preference pairs"
        )
    length = sum(len(answer) for answer in answers) / samples
    return {"mean": scores.mean().item(), "std": scores.std().item(), "length": length, "samples": samples}


def _optimizer(model: Any, settings: config.Reward) -> torch.optim.AdamW:
    """A rate of its own for the new head: at the trunk's it hardly moves."""
    head = list(model.score.parameters())
    trunk = [p for p in learning(model).values() if all(p is not h for h in head)]
    groups = [{"params": trunk}, {"params": head, "lr": settings.head_learning_rate}]
    return adamw(groups, settings.learning_rate, settings.weight_decay)

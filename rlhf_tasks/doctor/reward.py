"""Checks of the Reward, and of a reward function beside it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from rlhf_tasks.doctor.finding import Finding, advice
from rlhf_tasks.doctor.first_batch import EPISODES, FirstBatch
from rlhf_tasks.models import load_score_statistics, load_sft_length
from rlhf_tasks.reward import Pairs, score_texts, wilson_interval
from rlhf_tasks.reward_function import load_reward_function
from rlhf_tasks.seeds import permutation

PAIRS = 512
SCORE_GAP = 1e-3  # of a score, in float32
MEAN_GAP, SPREAD_GAP = 8.0, 5.0  # standard errors, and times, between the statistics and the first batch


@torch.no_grad()
def sign(root: Path, batch: FirstBatch) -> Finding:
    """Known pairs: what people chose has to score higher, more often than chance would have it."""
    pairs = Pairs(root / "data/prepared/pairs/heldout.arrow")
    rows = permutation(len(pairs.lengths), batch.params.seed, "doctor", "pairs")[:PAIRS]
    right, ties, strange = 0, 0, 0
    for start in range(0, len(rows), EPISODES):
        part = rows[start : start + EPISODES]
        chosen, rejected = pairs.scores(batch.trainer.fixed.reward, part, batch.experience.mask.device)
        right += int((chosen > rejected).sum())
        ties += int((chosen == rejected).sum())
        strange += int((~(chosen - rejected).isfinite()).sum())
    if strange:
        text = f"{strange} of {len(rows)} held-out pairs have a score that is not finite"
        return Finding("reward sign", False, f"{text}: checkpoints/reward is damaged; run `rlhf run --until reward`")
    if ties > len(rows) // 2:
        text = f"{ties} of {len(rows)} held-out pairs have equal scores"
        return Finding("reward sign", False, f"{text}: the Reward learned nothing; raise reward.epochs or its rates")
    low, high = wilson_interval(right, len(rows))
    text = f"the chosen text scores higher in {right} of {len(rows)} held-out pairs"
    if high < 0.5:
        return Finding("reward sign", False, f"{text}: chosen and rejected are swapped in the data")
    if low <= 0.5:
        return advice("reward sign", f"{text}: no better than chance; more pairs, or more reward.epochs")
    return Finding("reward sign", True, text)


@torch.no_grad()
def place(root: Path, batch: FirstBatch) -> Finding:
    """The score is the Reward's output at an answer's last token, as when the answer stands alone."""
    reward, episodes, device = batch.trainer.fixed.reward, batch.episodes, batch.raw_scores.device
    gap = 0.0
    for row, (prompt, response) in enumerate(zip(episodes.prompts, episodes.responses, strict=True)):
        alone = score_texts(reward, [[*prompt, *response]], device)[0]
        gap = max(gap, (alone - batch.raw_scores[row]).abs().item() / max(1.0, alone.abs().item()))
    if not gap <= SCORE_GAP:
        text = f"an answer's score differs by {gap:.1e} between its batch and alone, expected at most {SCORE_GAP:.0e}"
        return Finding("reward place", False, f"{text}: its neighbours or the place of the last token change it")
    return Finding("reward place", True, f"{gap:.1e} between an answer's score in its batch and alone")


def scale(root: Path, batch: FirstBatch) -> Finding:
    params, raw = batch.params, batch.raw_scores
    mean, std = load_score_statistics(root / "checkpoints/reward")
    text = f"scores of SFT answers: mean {mean:.2f}, standard deviation {std:.2f}"
    if not (math.isfinite(mean) and 0 < std < math.inf):
        return Finding("reward scale", False, f"{text}: no scale at all; run `rlhf run --until reward` again")
    off = abs(raw.mean().item() - mean) / (std / len(raw) ** 0.5)
    if off > MEAN_GAP or not 1 / SPREAD_GAP < raw.std().item() / std < SPREAD_GAP:
        found = f"on {len(raw)} answers they are {raw.mean():.2f} and {raw.std():.2f}"
        return Finding("reward scale", False, f"{text}, but {found}: score_statistics.json is another model's")
    if params.ppo.missing_eos.mode == "steer" and not load_sft_length(root / "checkpoints/reward") >= 1:
        return Finding("reward scale", False, "score_statistics.json has no length of SFT answers; run reward again")
    if params.ppo.score.kind == "raw" and not (0.2 < std < 5 and abs(mean) < 5 * std):
        return advice("reward scale", f"{text}: β is relative to it; set ppo.score.kind to normalised")
    return Finding("reward scale", True, f"{text}; PPO sees them {params.ppo.score.kind}")


def spread(root: Path, batch: FirstBatch) -> Finding:
    settings = batch.params.reward_function
    score = load_reward_function(settings, batch.tokenizer)
    if score is None:
        return Finding("reward spread", True, "no reward function is named")
    found = score(batch.episodes.prompts, batch.episodes.responses)
    text = f"{settings.name}: from {found.min():.2f} to {found.max():.2f} on {len(found)} SFT answers"
    if found.min() == found.max():
        return advice("reward spread", f"{text}: the same for all, so there is nothing to learn from it")
    return Finding("reward spread", True, text)

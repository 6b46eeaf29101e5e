"""Checks of the Reward, and of a reward function beside it."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_tasks.doctor.finding import Finding
from rlhf_tasks.doctor.first_batch import EPISODES, FirstBatch
from rlhf_tasks.models import load_score_statistics
from rlhf_tasks.reward import Pairs, wilson_interval
from rlhf_tasks.reward_function import load_reward_function
from rlhf_tasks.seeds import permutation

PAIRS = 512


@torch.no_grad()
def sign(root: Path, batch: FirstBatch) -> Finding:
    """Known pairs: what people chose has to score higher, more often than chance would have it."""
    pairs = Pairs(root / "data/prepared/pairs/heldout.arrow", batch.pad_id)
    rows = permutation(len(pairs.lengths), batch.params.seed, "doctor", "pairs")[:PAIRS]
    right = 0
    for start in range(0, len(rows), EPISODES):
        part = rows[start : start + EPISODES]
        chosen, rejected = pairs.scores(batch.trainer.fixed.reward, part, batch.experience.mask.device)
        right += int((chosen > rejected).sum())
    low, high = wilson_interval(right, len(rows))
    text = f"the chosen text scores higher in {right} of {len(rows)} held-out pairs"
    if high < 0.5:
        return Finding("reward sign", False, f"{text}: chosen and rejected are swapped in the data")
    if low <= 0.5:
        return Finding("reward sign", False, f"{text}: no better than chance; more pairs, or more reward.epochs")
    return Finding("reward sign", True, text)


def scale(root: Path, batch: FirstBatch) -> Finding:
    params = batch.params
    mean, std = load_score_statistics(root / "checkpoints/reward")
    text = f"scores of SFT answers: mean {mean:.2f}, standard deviation {std:.2f}"
    if params.ppo.score.kind == "raw" and not (0.2 < std < 5 and abs(mean) < 5 * std):
        return Finding("reward scale", False, f"{text}: β is relative to it; set ppo.score.kind to normalised")
    return Finding("reward scale", True, f"{text}; PPO sees them {params.ppo.score.kind}")


def spread(root: Path, batch: FirstBatch) -> Finding:
    settings = batch.params.reward_function
    score = load_reward_function(settings, batch.tokenizer)
    if score is None:
        return Finding("reward spread", True, "no reward function is named")
    found = score(batch.episodes.prompts, batch.episodes.responses)
    text = f"{settings.name}: from {found.min():.2f} to {found.max():.2f} on {len(found)} SFT answers"
    if found.min() == found.max():
        return Finding("reward spread", False, f"{text}: the same for all, so there is nothing to learn from it")
    return Finding("reward spread", True, text)

"""Best of n: of n answers of SFT the one that the Reward likes most. It needs no training, so it is RL's yardstick.

Its KL to SFT is at most log n - (n-1)/n (Beirami et al. 2024); what it costs is n answers for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, log

import numpy as np

from rlhf_tasks.intervals import interval


@dataclass(frozen=True)
class Draws:
    """S answers of one model to each of N prompts: `[S, N]` all."""

    scores: np.ndarray
    judged: np.ndarray | None
    lengths: np.ndarray


def sizes(draws: int) -> list[int]:
    """The n that so many draws tell of: powers of 4."""
    return [4**power for power in range(1, draws) if 4**power <= draws]


def expected_best(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """What the best scored of n answers has, in the mean over all choices of n from the S that there are.

    `[S, N]` twice -> `[N]`. Without bias, and of less variance than one choice (Nakano et al. 2021, eq. 1).
    """
    draws = len(scores)
    ordered = np.take_along_axis(values, scores.argsort(axis=0, kind="stable"), axis=0)
    weights = np.array([comb(place, n - 1) / comb(draws, n) for place in range(draws)])
    return weights @ ordered


def best_of(draws: Draws, score_std: float, resamples: int, seed: int) -> dict[str, float]:
    """Gains over one answer of SFT, paired by prompt, with their intervals, for each n that the draws tell of."""
    found: dict[str, float] = {}
    for n in sizes(len(draws.scores)):
        name, gains = f"best_of_{n}", {"score_gain": draws.scores / score_std}
        if draws.judged is not None:
            gains["judge_gain"] = draws.judged
        for gain, values in gains.items():
            more = expected_best(draws.scores, values, n) - values.mean(axis=0)
            found |= interval(f"{name}_{gain}", more, resamples, seed)
        lengths = expected_best(draws.scores, draws.lengths, n)
        found[f"{name}_length_ratio"] = float(lengths.mean() / draws.lengths.mean())
        found[f"{name}_kl_bound"] = log(n) - (n - 1) / n
    return found

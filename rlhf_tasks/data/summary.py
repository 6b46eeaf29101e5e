"""The numbers of a prepared data set: what metrics.json says, a function of the rows alone."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

import numpy as np

Numbers = dict[str, float]


@dataclass
class Lengths:
    """Token counts of one column before anything is cut, and the count from which on it is."""

    limit: int
    tokens: array[int] = field(default_factory=lambda: array("i"))

    def add(self, tokens: int) -> None:
        self.tokens.append(tokens)

    def numbers(self) -> Numbers:
        """Mean, 95th percentile and maximum in tokens as they are kept; the share of rows that were cut, 0 to 1."""
        whole = np.asarray(self.tokens)
        tokens = np.minimum(whole, self.limit)
        return {
            "mean": float(tokens.mean()),
            "p95": float(np.percentile(tokens, 95)),
            "max": int(tokens.max()),
            "share_cut": int((whole > self.limit).sum()) / len(tokens),
        }

    def longest(self) -> int:
        """The maximum in tokens, before anything is cut."""
        return max(self.tokens)


@dataclass
class PairNumbers:
    """The balance of preference pairs: a reward model could live off length, and margins off one source."""

    longer: int = 0
    shorter: int = 0
    margins: array[float] = field(default_factory=lambda: array("d"))

    def add(self, chosen: int, rejected: int, margin: float) -> None:
        """One pair, by its answers' lengths in tokens."""
        self.longer += chosen > rejected
        self.shorter += chosen < rejected
        self.margins.append(margin)

    def numbers(self) -> Numbers:
        """Shares of pairs, 0 to 1, whose chosen answer is the longer or the shorter one; the mean margin."""
        rows = len(self.margins)
        return {
            "share_chosen_longer": self.longer / rows,
            "share_chosen_shorter": self.shorter / rows,
            "mean_margin": math.fsum(self.margins) / rows,
        }

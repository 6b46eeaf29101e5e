"""The numbers of a prepared data set: what metrics.json says, a function of the rows alone."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

import numpy as np

Numbers = dict[str, float]


@dataclass
class Lengths:
    """Token counts of one column, and how many of its rows were cut."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    cut: int = 0

    def add(self, tokens: int, *, cut: bool) -> None:
        self.tokens.append(tokens)
        self.cut += cut

    def numbers(self) -> Numbers:
        """Mean, 95th percentile and maximum in tokens; the share of rows that were cut, 0 to 1."""
        tokens = np.asarray(self.tokens)
        return {
            "mean": float(tokens.mean()),
            "p95": float(np.percentile(tokens, 95)),
            "max": int(tokens.max()),
            "share_cut": self.cut / len(tokens),
        }


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

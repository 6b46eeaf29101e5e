"""How far people agree with each other, and a reward model with them, on pairs of answers (`rlhf label`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from rlhf_tasks.data.judgements import SKIP, Judged, by_pair, text_digest


@dataclass(frozen=True)
class Share:
    """`part` of `count`."""

    part: int
    count: int


@dataclass(frozen=True)
class Agreement:
    """What some judgements say together, of which skips are no part.

    Attributes:
        pairs: how many were judged by two raters or more.
        raters: of two raters who judged the same pair, how often they said the same.
        alpha: Krippendorff's, of these pairs: 1 where all agree, 0 where they agree as often as by chance; None where
            all said the same of every pair, so that chance is not known.
        reward: how often the reward model scored the answer that a rater chose above the other.
        actor: how often a rater chose the Actor's answer, of the answers that were SFT's or the Actor's.
    """

    pairs: int
    raters: Share
    alpha: float | None
    reward: Share
    actor: Share


def agreement(judged: Iterable[Judged]) -> Agreement:
    """The agreement of judgements that stand, at most one of each rater on each pair."""
    judged = [one for one in judged if one.choice != SKIP]
    shared = [[said(one) for one in group] for group in by_pair(judged).values() if len(group) > 1]
    meetings = [one == other for values in shared for one, other in combinations(values, 2)]
    return Agreement(
        pairs=len(shared),
        raters=Share(sum(meetings), len(meetings)),
        alpha=nominal_alpha(shared),
        reward=_reward_agrees(judged),
        actor=_actor_chosen(judged),
    )


def said(judged: Judged) -> str:
    """What a rater said, whichever answer was shown first: the order of digests knows nothing of the texts."""
    if judged.chosen is None:
        return judged.choice
    return str(sorted(judged.answers, key=text_digest).index(judged.answers[judged.chosen]))


def nominal_alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha of units with two values or more each (Krippendorff 2011, nominal data).

    `1 - (n - 1) · Σ_u Σ_{c≠k} n_uc n_uk / (m_u - 1) / Σ_{c≠k} n_c n_k`, where unit u has m_u values, n_uc of them c,
    and n_c of all n values are c. None where all n are the same.
    """
    totals = Counter(value for unit in units for value in unit)
    expected = _unlike(totals)
    if expected == 0:
        return None
    observed = sum(_unlike(Counter(unit)) / (len(unit) - 1) for unit in units)
    return 1 - (totals.total() - 1) * observed / expected


def _unlike(counts: Counter[str]) -> int:
    """Ordered pairs of different values."""
    return counts.total() ** 2 - sum(count * count for count in counts.values())


def _reward_agrees(judged: Iterable[Judged]) -> Share:
    gaps = [
        one.scores[one.chosen] - one.scores[1 - one.chosen] for one in judged if one.scores and one.chosen is not None
    ]
    return Share(sum(gap > 0 for gap in gaps), len(gaps))


def _actor_chosen(judged: Iterable[Judged]) -> Share:
    chosen = [one.models[one.chosen] for one in judged if one.models and one.chosen is not None]
    known = [model for model in chosen if model in ("sft", "actor")]
    return Share(known.count("actor"), len(known))

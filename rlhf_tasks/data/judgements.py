"""What people said of two answers (`rlhf label`): which of it stands, and what it says together.

Of one rater and one pair the last judgement stands, and none after a withdrawal. A pair that several raters judged
makes one preference: the answer that more of them chose. Its margin is how far they agreed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rlhf_tasks.data.prompts import Prompt

FIRST, SECOND, TIE, BOTH_BAD, SKIP, WITHDRAWN = CHOICES = ("first", "second", "tie", "both bad", "skip", "withdrawn")
"""What a rater can say of two answers: `first` and `second` is the better one; a skip is no opinion."""


class Judged(NamedTuple):
    """One rater's judgement of two answers, in the order in which they were shown.

    Attributes:
        pair: stands for the prompt and both answers in either order.
        scores: the reward model's at that time, of the answers in their order; None where there were none.
        models: which model gave each of the answers; None where that is not known.
    """

    prompt: Prompt
    answers: tuple[str, str]
    choice: str
    rater: str
    pair: str
    scores: tuple[float, float] | None = None
    models: tuple[str, str] | None = None

    @property
    def chosen(self) -> int | None:
        """Which of the answers is better, 0 or 1; None where the rater preferred neither."""
        return {FIRST: 0, SECOND: 1}.get(self.choice)


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def pair_digest(asked: Mapping[str, Any], answers: Sequence[str]) -> str:
    """SHA-256 of a prompt, as the fields of a row, and the digests of two answers in either order."""
    whole = [asked, sorted(map(text_digest, answers))]
    return text_digest(json.dumps(whole, ensure_ascii=False, separators=(",", ":"), sort_keys=True))


def standing(judged: Iterable[Judged]) -> list[Judged]:
    """The judgements that stand, in the order in which they were made."""
    last: dict[tuple[str, str], Judged] = {}
    for one in judged:
        last.pop((one.pair, one.rater), None)
        if one.choice != WITHDRAWN:
            last[one.pair, one.rater] = one
    return list(last.values())


def by_pair(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    """The judgements of each pair, in order of first appearance."""
    pairs: dict[str, list[Judged]] = {}
    for one in judged:
        pairs.setdefault(one.pair, []).append(one)
    return pairs


def decide(judged: Sequence[Judged]) -> tuple[str, str, float] | None:
    """What the raters of one pair say together: `(chosen, rejected, margin)`; None if no answer has more votes.

    The margin is the votes for one answer less those for the other, divided by all: 1 where all agree. A tie and `both
    bad` are votes for neither; a skip is no vote.
    """
    votes: dict[str, int] = dict.fromkeys(judged[0].answers, 0)
    for one in judged:
        if one.chosen is not None:
            votes[one.answers[one.chosen]] += 1
    (chosen, most), (rejected, fewest) = sorted(votes.items(), key=lambda vote: -vote[1])
    if most == fewest:
        return None
    return chosen, rejected, (most - fewest) / sum(one.choice != SKIP for one in judged)

"""Rated texts as continuations and preference pairs.

Where a rating has a prompt, pairs are built within the prompt. Where a text is all there is, its opening is the prompt
and the rest is the response, as in the sentiment task of Ziegler et al. 2019; pairs are built within one opening.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from rlhf_tasks.data.formats import Preference, Rated
from rlhf_tasks.data.prompts import Prompt
from rlhf_tasks.data.texts import normal
from rlhf_tasks.seeds import derive_seed

Scored = tuple[str, float]
"""A text (or response) and its mean rating."""

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
"""A run of characters up to white space; a Chinese or Japanese character is a word of its own."""

ROUNDS = 64
"""How far round the ring a text looks for partners, so that a large group takes linear time."""


def merge_ratings(rows: Iterable[Rated]) -> Iterator[tuple[Prompt | None, str, float]]:
    """`(prompt, text, mean rating)` of every different prompt and text, in order of first appearance.

    One text in several rows, as where each rater has a row, has all of their ratings, and is written as in the first.
    """
    ratings: dict[tuple[Prompt | None, str], tuple[str, list[float]]] = {}
    for prompt, text, values in rows:
        ratings.setdefault((prompt, normal(text)), (text, []))[1].extend(values)
    for (prompt, _), (text, all_values) in ratings.items():
        yield prompt, text, sum(all_values) / len(all_values)


def split_opening(text: str, words: int) -> tuple[str, str] | None:
    """`(opening, rest)` with the opening `words` long; together they are exactly the text. None if no word is left."""
    end = 0
    for number, match in enumerate(WORD.finditer(text), 1):
        if number > words:
            return text[:end], text[end:]
        end = match.end()
    return None


def continuation(text: str, opening_words: tuple[int, int], seed: int) -> tuple[str, str] | None:
    """`(prompt, response)` of a text: (seed, text) draws how many words, low to high, the prompt has.

    Only lengths that leave a word of response are drawn from; None if there are none.
    """
    low, high = opening_words
    words = sum(1 for _ in zip(WORD.finditer(text), range(high + 1), strict=False))
    high = min(high, words - 1)
    if high < low:
        return None
    return split_opening(text, low + derive_seed(seed, "prepare", "opening", text) % (high - low + 1))


def pairs_by_prompt(
    rated: Iterable[tuple[Prompt, str, float]], seed: int, min_gap: float, pairs_per_text: int
) -> Iterator[Preference]:
    """Pairs of responses to one prompt."""
    groups: dict[Prompt, list[Scored]] = defaultdict(list)
    for prompt, text, score in rated:
        groups[prompt].append((text, score))
    for prompt, group in groups.items():
        for better, worse in neighbours(group, seed, min_gap, pairs_per_text):
            yield Preference(prompt, better[0], worse[0], better[1] - worse[1])


def pairs_by_opening(rated: Sequence[Scored], seed: int, min_gap: float, pairs_per_text: int) -> Iterator[Preference]:
    """Pairs of texts with the same first two words; texts left without a pair are paired by their first word."""
    left = list(rated)
    for words in (2, 1):
        groups: dict[str, list[Scored]] = defaultdict(list)
        for text, score in left:
            if parts := split_opening(text, words):
                groups[parts[0]].append((text, score))
        paired: set[str] = set()
        for opening, group in groups.items():
            for better, worse in neighbours(group, seed, min_gap, pairs_per_text):
                paired.update((better[0], worse[0]))
                cut = len(opening)
                yield Preference(opening, better[0][cut:], worse[0][cut:], better[1] - worse[1])
        left = [(text, score) for text, score in left if text not in paired]


def neighbours(
    group: Sequence[Scored], seed: int, min_gap: float, pairs_per_text: int
) -> Iterator[tuple[Scored, Scored]]:
    """`(better, worse)` pairs of a group: each text in at most `pairs_per_text`, the ratings at least `min_gap` apart.

    The texts stand in a ring, ordered by (seed, text). Each meets the next one, then the one after that, and so on, and
    they pair if their ratings differ enough and neither has had its share.
    """
    ring = sorted(group, key=lambda item: (derive_seed(seed, "prepare", "pairs", item[0]), item[0]))
    size, had = len(ring), [0] * len(ring)
    for step in range(1, min(size // 2, ROUNDS) + 1):
        if min(had) == pairs_per_text:
            return
        for i in range(size if 2 * step < size else step):  # half-way round, every meeting comes up twice
            j = (i + step) % size
            gap = abs(ring[i][1] - ring[j][1])
            if gap > 0 and gap >= min_gap and had[i] < pairs_per_text and had[j] < pairs_per_text:
                had[i] += 1
                had[j] += 1
                yield (ring[i], ring[j]) if ring[i][1] > ring[j][1] else (ring[j], ring[i])

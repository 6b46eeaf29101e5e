"""Continuations rejoin to the text; pairs share an opening, differ by the gap, and spend no text too often."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_tasks.data.formats import Preference, Rated
from rlhf_tasks.data.pairs import (
    continuation,
    merge_ratings,
    neighbours,
    pairs_by_opening,
    pairs_by_prompt,
    split_opening,
)

words = st.lists(st.sampled_from(["It's", "a", "film", "好", "🎬", "bad,"]), min_size=1, max_size=9)
spaces = st.sampled_from([" ", "  ", "\n", "\u3000"])
texts = st.builds(lambda parts, space, lead: lead + space.join(parts), words, spaces, st.sampled_from(["", " "]))


@given(texts, st.integers(1, 3), st.integers(0, 3), st.integers(0, 5))
def test_prompt_and_response_are_exactly_the_text(text, low, more, seed):
    parts = continuation(text, (low, low + more), seed)
    count = len(text.split())
    if parts is None:
        assert count <= low
    else:
        prompt, response = parts
        assert prompt + response == text
        assert response.strip()
        assert response[0].isspace()
        assert low <= len(prompt.split()) <= low + more


def test_the_number_of_opening_words_is_drawn_from_seed_and_text():
    many = [f"one two three four five six seven {i}" for i in range(300)]
    drawn = [len(continuation(text, (2, 5), 0)[0].split()) for text in many]
    assert set(drawn) == {2, 3, 4, 5}
    assert min(Counter(drawn).values()) > 40
    assert drawn == [len(continuation(text, (2, 5), 0)[0].split()) for text in many]
    assert drawn != [len(continuation(text, (2, 5), 1)[0].split()) for text in many]


def test_a_chinese_character_is_a_word():
    assert split_opening("电影很好看", 2) == ("电影", "很好看")
    assert split_opening("电影", 2) is None


def test_one_text_in_several_rows_has_all_their_ratings():
    rows = [Rated(None, "a", (1,)), Rated("p", "a", (4,)), Rated(None, "b", (0, 1)), Rated(None, "a", (1, -2))]
    assert list(merge_ratings(rows)) == [(None, "a", 0), ("p", "a", 4), (None, "b", 0.5)]


scored = st.lists(st.tuples(st.text("abc", min_size=1, max_size=4), st.integers(-8, 8)), unique_by=lambda x: x[0])


@given(scored, st.integers(1, 4), st.sampled_from([0, 1, 2.5]), st.integers(0, 3))
def test_no_text_is_in_too_many_pairs_and_every_gap_is_wide_enough(group, limit, gap, seed):
    pairs = list(neighbours(group, seed, gap, limit))
    uses = Counter(text for pair in pairs for text, _ in pair)
    assert max(uses.values(), default=0) <= limit
    assert all(better[1] - worse[1] >= gap and better[1] > worse[1] for better, worse in pairs)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert set(uses) <= {text for text, _ in group}
    assert pairs == list(neighbours(group[::-1], seed, gap, limit)), "the order of the rows does not matter"


def test_who_pairs_with_whom_depends_on_the_seed():
    group = [(str(i), i) for i in range(20)]
    assert len(list(neighbours(group, 0, 1, 2))) == 20
    assert set(neighbours(group, 0, 1, 2)) != set(neighbours(group, 1, 1, 2))


def test_pairs_share_two_words_or_else_one():
    rated = [("It's a joy", 3.0), ("It's a bore", -2.0), ("It's no good", -1.0), ("It's the one", 2.0), ("Awful", -4.0)]
    assert list(pairs_by_opening(rated, 0, 1.0, 2)) == [
        Preference("It's a", " joy", " bore", 5.0),
        Preference("It's", " the one", " no good", 3.0),
    ]


@given(st.lists(st.tuples(texts, st.integers(-4, 4)), unique_by=lambda x: x[0], max_size=30))
def test_a_pairs_texts_are_rated_texts_and_the_better_one_is_chosen(rated):
    scores = dict(rated)
    for prompt, chosen, rejected, margin in pairs_by_opening(rated, 0, 1.0, 2):
        assert scores[prompt + chosen] - scores[prompt + rejected] == margin >= 1
        assert chosen.strip()
        assert rejected.strip()


def test_pairs_with_a_prompt_stay_within_it():
    rated = [("p", "a", 1.0), ("q", "b", 4.0), ("p", "c", 3.0), ("q", "d", 3.5)]
    assert list(pairs_by_prompt(rated, 0, 1.0, 2)) == [Preference("p", "c", "a", 2.0)]


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_small_groups(size):
    group = [(str(i), float(i)) for i in range(size)]
    assert len(list(neighbours(group, 0, 1.0, 2))) == {0: 0, 1: 0, 2: 1, 3: 3}[size]

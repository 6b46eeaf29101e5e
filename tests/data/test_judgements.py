"""Which judgements stand, and what several raters say of a pair together."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labels import judged

from rlhf_tasks.data.fields import LABELS, Reading
from rlhf_tasks.data.formats import Compared, parse_row
from rlhf_tasks.data.judgements import CHOICES, Judged, decide, standing
from rlhf_tasks.data.prompts import Conversation, Instruction, Message, prompt_fields
from rlhf_tasks.label_file import line

A, B = " good film", " bad film"
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
prompts = st.one_of(
    text.filter(lambda words: not words.startswith("\n\nHuman:")),
    st.builds(Instruction, text, st.just("") | text),
    st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), text), max_size=3).map(
        lambda said: Conversation((*said, Message("user", "Well?")))
    ),
)


@pytest.mark.parametrize(
    ("choices", "together"),
    [
        (["first"], (A, B, 1.0)),
        (["second"], (B, A, 1.0)),
        (["first", "first", "second"], (A, B, 1 / 3)),
        (["first", "second"], None),
        (["first", "tie"], (A, B, 0.5)),
        (["first", "both bad", "tie", "tie"], (A, B, 0.25)),
        (["first", "skip", "skip"], (A, B, 1.0)),
        (["tie"], None),
        (["both bad", "tie"], None),
        (["skip"], None),
    ],
)
def test_the_majority_decides_and_its_lead_is_the_margin(
    choices: list[str], together: tuple[str, str, float] | None
) -> None:
    raters = [judged(choice, rater=str(number)) for number, choice in enumerate(choices)]
    for order in permutations(raters):
        assert decide(order) == together


def test_what_was_shown_in_another_order_counts_for_the_same_answer() -> None:
    one, other = judged("first"), judged("second", rater="bob", answers=(B, A))
    assert one.pair == other.pair
    assert decide([one, other]) == (A, B, 1.0)
    assert judged("first", prompt="It's the").pair != one.pair


@given(st.lists(st.tuples(st.sampled_from(CHOICES), st.sampled_from(["ada", "bob"]), st.sampled_from("xyz"))))
def test_the_last_word_of_a_rater_on_a_pair_stands(said: list[tuple[str, str, str]]) -> None:
    lines = [judged(choice, rater, prompt=prompt) for choice, rater, prompt in said]
    last = {(one.pair, one.rater): number for number, one in enumerate(lines)}
    assert standing(lines) == [lines[n] for n in sorted(last.values()) if lines[n].choice != "withdrawn"]


@given(prompts, text, text, st.sampled_from(CHOICES), st.none() | st.just((0.5, -1.0)))
def test_what_is_written_is_read_again(prompt, one, other, choice, scores) -> None:  # type: ignore[no-untyped-def]
    """Of any prompt and answers, whatever their shape and script."""
    if one.strip() == other.strip():
        return
    asked = parse_row("", prompt_fields(prompt), Reading("prompts", (0, 0))).prompt
    assert asked == prompt or isinstance(prompt, str)
    answers = (one.strip(), other.strip()) if isinstance(asked, Conversation) else (one, other)
    compared = Compared(asked, answers, scores, ("sft", "actor"))
    found = parse_row("", line(compared, choice, "ada"), LABELS)
    assert found == Judged(asked, answers, choice, "ada", compared.pair, scores, ("sft", "actor"))

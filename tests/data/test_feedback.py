"""Which source feeds what, and that no text ends up on both sides of the split."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from labels import judged

from rlhf_tasks.config import Ratings
from rlhf_tasks.data.contracts import Dropped, drop_leaks, is_heldout, whole_text
from rlhf_tasks.data.feedback import Feedback
from rlhf_tasks.data.fields import Reading
from rlhf_tasks.data.formats import Asked, Example, Preference, Rated, parse_row
from rlhf_tasks.data.prompts import Conversation, Instruction, Message
from rlhf_tasks.data.spill import Spill, Text, first_like
from rlhf_tasks.data.texts import normal

RATINGS = Ratings(min_gap=0.5)
short = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(" ".join)
scores = st.integers(-4, 4).map(float)
records = st.one_of(
    st.builds(Example, short, short.map(" {}".format)),
    st.builds(Preference, short, short.map(" {}".format), short.map(" {} ".format), st.just(0.0)),
    st.builds(Rated, st.none() | short, short, st.tuples(scores)),
    st.builds(Asked, short),
    st.builds(judged, st.sampled_from(["first", "second", "tie", "withdrawn"]), st.sampled_from(["ada", "bob"]), short),
)


class Gathered:
    """What became of some records: `sft`, `pairs` and `prompts` as lists, each row with its side; what was dropped."""

    def __init__(self, feedback):
        for kind, table in feedback.tables.items():
            kept = [row for rows in table.batches(table.kept) for row in rows]
            sides = table.heldout[table.kept].tolist()
            together = zip(kept, sides, strict=True)
            setattr(self, kind, [SimpleNamespace(**row._asdict(), heldout=side) for row, side in together])
        self.taught = [row.chosen for rows in feedback.pairs.batches(feedback.taught("pairs")) for row in rows]
        self.dropped = {kind: dropped.counts() for kind, dropped in feedback.dropped.items()}
        self.too_short, self.undecided = feedback.too_short, feedback.undecided


def gather(rows, heldout=0.5, template="none", seed=0):
    with tempfile.TemporaryDirectory() as folder:
        feedback = Feedback(template, None, heldout, Path(folder))
        for number, row in enumerate(rows, 1):
            feedback.add(f"file:{number}", row)
        feedback.finish(seed, RATINGS)
        return Gathered(feedback)


def counts(duplicates=0, contradictions=0, leaks=0):
    return {"duplicates": duplicates, "contradictions": contradictions, "leaks": leaks}


def sides(rows, texts):
    """The texts of the training rows and of the held-out rows, blind to white space."""
    both = {False: set(), True: set()}
    for row in rows:
        both[row.heldout].update(" ".join(text.split()) for text in texts(row))
    return both


@given(st.lists(records, max_size=30), st.sampled_from([0.2, 0.5, 0.8]), st.sampled_from(["none", "alpaca"]))
def test_no_text_is_on_both_sides(rows, heldout, template):
    feedback = gather(rows, heldout, template)
    prompts = sides(feedback.prompts, lambda row: [row.prompt])
    assert prompts[False].isdisjoint(prompts[True])
    sft = sides(feedback.sft, lambda row: [row.prompt + row.response])
    pairs = sides(feedback.pairs, lambda row: [row.prompt + row.chosen, row.prompt + row.rejected])
    assert (sft[False] | pairs[False]).isdisjoint(sft[True] | pairs[True])


by_prompt = records.filter(lambda record: not isinstance(record, Rated))


@given(st.lists(by_prompt, max_size=15), st.lists(by_prompt, max_size=15))
def test_new_rows_move_no_text_to_the_other_side(rows, more):
    before, after = gather(rows), gather(rows + more)
    for table in ("sft", "prompts"):
        old, new = (
            {(row.prompt, getattr(row, "response", "")): row.heldout for row in getattr(gathered, table)}
            for gathered in (before, after)
        )
        assert all(old[key] == new[key] for key in old.keys() & new.keys())


def test_the_split_takes_its_share_and_knows_nothing_of_the_seed():
    names = [f"one text of many is number {i}" for i in range(4000)]
    assert 0.18 < sum(is_heldout(name, 0.2) for name in names) / 4000 < 0.22
    assert all(is_heldout(name, 0.5) for name in names if is_heldout(name, 0.2))
    rows = [Rated(None, name, (float(i % 5),)) for i, name in enumerate(names[:300])]
    first, second = (gather(rows, seed=seed) for seed in (0, 1))
    assert {r.prompt + r.response: r.heldout for r in first.sft} == {
        r.prompt + r.response: r.heldout for r in second.sft
    }
    assert [row.prompt for row in first.sft] != [row.prompt for row in second.sft]


def test_one_prompt_is_on_one_side_whatever_shape_it_comes_in():
    for asked in ("Who are you?", "Add 1 and 1.", "Name a colour."):
        talk = Conversation((Message("user", asked),))
        rows = [Asked(asked), Asked(talk), Example(Instruction(asked, ""), "Me"), Preference(talk, "a", "b", 0.0)]
        feedback = gather([*rows, Rated(asked, "c", (1.0,))])
        assert len({row.heldout for table in (feedback.sft, feedback.pairs, feedback.prompts) for row in table}) == 1


def test_sources_feed_what_the_design_says():
    example, pair, rated = Example("p", " r"), Preference("q", " good", " bad", 0.0), Rated(None, "a b c d", (1.0,))
    assert [row.response for row in gather([example, pair]).sft] == [" r"]
    assert [row.response for row in gather([pair]).sft] == [" good"]
    assert {row.prompt for row in gather([example, pair]).prompts} == {"p", "q"}
    assert [row.prompt for row in gather([example, pair, Asked("x")]).prompts] == ["x"]
    assert [(row.prompt + row.response) for row in gather([rated, example]).sft] == ["p r", "a b c d"]
    assert gather([Rated(None, "Good", (1.0,))]).too_short == 1


def test_labels_feed_pairs_and_nothing_else():
    """One pair of all raters, on its prompt's side; a tokenizer, and SFT, learn from what people wrote."""
    own = Preference("It's a", " film", " movie", 2.0)
    lines = [
        judged("first"),
        judged("second", "bob"),
        judged("second", "eve", answers=(" bad film", " good film")),
        judged("tie", prompt="All in"),
        judged("first", prompt="Who", answers=(" wrote it?", " did?")),
        judged("withdrawn", prompt="Who", answers=(" wrote it?", " did?")),
    ]
    found = gather([own, *lines], heldout=0.0001)
    assert [(row.chosen, row.rejected, row.where) for row in found.pairs] == [
        (" film", " movie", "file:1"),
        (" good film", " bad film", "file:2"),
    ]
    assert [row.margin for row in found.pairs] == [2.0, pytest.approx(1 / 3)]
    assert {row.heldout for row in gather([own, *lines]).pairs} in ({True}, {False})
    assert found.undecided == ["file:5"]
    assert [row.response for row in found.sft] == [" film"]
    assert [row.prompt for row in found.prompts] == ["It's a"]
    assert found.taught == [" film"]


def test_a_prompt_is_remembered_as_it_was_asked():
    talk = Conversation((Message("system", "Be kind."), Message("user", "שלום")))
    asked = [Asked("Hi"), Asked(Instruction("Add", "1 1")), Asked(talk)]
    found = gather([*asked, Example("x", "y")], template="alpaca")
    assert [parse_row("", json.loads(row.asked), Reading("prompts", (0, 0))) for row in found.prompts] == asked
    bare = gather([*asked, Example("x", "y")], template="none").prompts
    assert [row.asked == "" for row in bare] == [True, False, False], "as it stands where that is it"


def test_conversations_keep_their_space_in_pairs_and_examples():
    talk = Conversation((Message("user", "Hello"),))
    feedback = gather([Preference(talk, "Hi", "Yo", 0.0), Example(talk, "Hi")])
    pair = feedback.pairs[0]
    assert (pair.prompt, pair.chosen, pair.rejected) == ("\n\nHuman: Hello\n\nAssistant:", " Hi", " Yo")
    assert feedback.sft[0].response == " Hi"


def test_duplicates_are_dropped_and_counted():
    pair = Preference("q", " good", " bad", 0.0)
    rated = [Rated(None, "a b c", (1.0,)), Rated(None, "a b c", (2.0,))]
    feedback = gather(
        [Example("p", " r"), Example("p", " r"), pair, pair._replace(margin=1.0), Asked("x"), Asked("x"), *rated]
    )
    assert feedback.dropped == {"sft": counts(2), "pairs": counts(1), "prompts": counts(1)}
    assert [len(table) for table in (feedback.sft, feedback.pairs, feedback.prompts)] == [2, 1, 1]
    assert feedback.pairs[0].margin == 0.0, "the first one is kept"
    assert gather([Example("1+1", "2"), Example("1+", "12")]).dropped["sft"]["duplicates"] == 0, "not field by field"


@pytest.mark.parametrize(("one", "other"), [("so  it\n is", " so it is "), ("caf\u00e9", "cafe\u0301")])
def test_white_space_and_the_way_an_accent_is_written_tell_nothing_apart(one, other):
    pair = Preference(one, one, "b", 0.0)
    rows = [Example(one, one), Example(other, other), pair, pair._replace(chosen=other), Asked(one), Asked(other)]
    feedback = gather(rows)
    assert feedback.dropped == {"sft": counts(1), "pairs": counts(1), "prompts": counts(1)}
    turned = gather([pair, Preference(other, "b", other, 0.0), Preference("q", "x", "y", 0.0)])
    assert turned.dropped["pairs"] == counts(contradictions=2)
    rated = gather([Rated("p", one, (1.0,)), Rated("p", other, (3.0,)), Rated("p", "b", (0.0,))])
    assert [(row.chosen, row.margin) for row in rated.pairs] == [(one, 2.0)], "ratings of one text are pooled"
    assert is_heldout(one, 0.5) == is_heldout(other, 0.5)
    assert whole_text(None, one) == whole_text(None, other)


def test_a_pair_that_differs_in_white_space_alone_does_not_contradict_itself():
    pair = Preference("q", "if x:\n    y()", "if x:\ny()", 0.0)
    feedback = gather([pair, pair._replace(prompt="r")])
    assert [row.prompt for row in feedback.pairs] == ["q", "r"]
    assert feedback.dropped["pairs"] == counts()


def test_pairs_that_contradict_each_other_are_both_dropped():
    rows = [Preference("q", " a", " b", 0.0), Preference("q", " b", " a", 1.0), Preference("r", " a", " b", 0.0)]
    feedback = gather(rows)
    assert [row.prompt for row in feedback.pairs] == ["r"]
    assert feedback.dropped["pairs"] == counts(contradictions=2)


def test_a_training_row_with_a_heldout_text_is_dropped_and_counted():
    """A rated text is split by its whole, an example by its prompt: the same text may come from both."""
    texts = [f"number {i} is a fine film" for i in range(40)]
    rows = [Rated(None, text, (float(i % 9) - 4,)) for i, text in enumerate(texts)]
    rows += [Example(text.removesuffix(" is a fine film"), "  is a  fine film") for text in texts]
    feedback = gather(rows)
    crossing = sum(is_heldout(text, 0.5) != is_heldout(text.removesuffix(" is a fine film"), 0.5) for text in texts)
    assert feedback.dropped["sft"]["leaks"] == crossing > 5
    assert feedback.dropped["pairs"]["leaks"] > 0
    assert len({whole_text(None, text) for text in texts}) == 40


def test_the_answers_of_heldout_pairs_leak_too():
    texts = [f"number {i} is a fine film" for i in range(40)]
    pairs = [Preference(f"number {i}", " is good", " is a fine film", 0.0) for i in range(40)]
    feedback = gather([*pairs, *(Rated(None, text, (1.0,)) for text in texts)])
    crossing = sum(is_heldout(f"number {i}", 0.5) and not is_heldout(text, 0.5) for i, text in enumerate(texts))
    assert feedback.dropped["sft"]["leaks"] == crossing > 2


def test_an_opening_that_both_sides_have_is_a_heldout_prompt():
    texts = [f"It's a film of number {i}" for i in range(20)]
    for rows in (texts, texts[::-1]):
        feedback = gather([Rated(None, text, (1.0,)) for text in rows])
        assert {row.heldout for row in feedback.prompts if row.prompt == "It's a"} == {True}
        assert {row.heldout for row in feedback.sft if row.prompt == "It's a"} == {False, True}
        assert feedback.dropped["prompts"]["leaks"] > 0


def test_only_training_rows_leak_and_say_what_they_repeat(tmp_path):
    table, dropped = Spill(tmp_path / "sft", Text), Dropped()
    for where, side, text in (("a:1", False, b"x"), ("a:2", True, b"x"), ("a:3", False, b"y"), ("a:4", False, b"x")):
        table.add(Text("p", " r", where), side, [text * 16])
    table.seal()
    drop_leaks(table, [table], dropped)
    assert table.kept.tolist() == [False, True, True, False]
    (rows, (other, twins)) = dropped.leaks[0]
    assert (table.places(rows), other.places(twins)) == (["a:1", "a:4"], ["a:2", "a:2"])


def test_every_row_knows_where_it_came_from():
    pair = Preference("q", " good", " bad", 0.0)
    rated = [Rated(None, "It's a film, good", (3.0,)), Rated(None, "It's a film, bad", (1.0,)), Rated("p", "x", (1.0,))]
    gathered = gather([pair, Asked("x"), *rated, Rated("p", "y", (3.0,))], heldout=0.0001)
    assert [row.where for row in gathered.pairs] == ["file:1", "file:6", "file:3"]
    assert [row.where for row in gathered.prompts] == ["file:2"]
    assert [row.where for row in gathered.sft] == ["file:5", "file:6", "file:3", "file:4"]
    assert [row.where for row in gather([pair]).sft] == ["file:1"]


# Digests --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_the_first_row_that_is_the_same(rows):
    found = first_like(np.array(rows, np.uint64).reshape(-1, 2))
    assert found.tolist() == [rows.index(row) for row in rows]


@given(st.lists(records, max_size=30))
def test_dropping_by_digest_is_dropping_by_text(rows):
    """The rows that stay, as comparing whole texts would have it."""
    with tempfile.TemporaryDirectory() as folder:
        feedback = Feedback("none", None, 0.5, Path(folder))
        for row in rows:
            feedback.add("", row)
        feedback.finish(0, RATINGS)
        every = {
            kind: list(zip([r for batch in t.batches() for r in batch], t.heldout.tolist(), strict=True))
            for kind, t in feedback.tables.items()
        }
        kept = {kind: [pair for pair, keep in zip(every[kind], t.kept, strict=True) if keep] for kind, t in
                feedback.tables.items()}  # fmt: skip
    unique = {}
    for kind, table in every.items():
        by_text = {}
        for row, side in table:
            texts = tuple(normal(v) for k, v in row._asdict().items() if k not in ("margin", "where"))
            by_text.setdefault((side, texts), (row, side))
        unique[kind] = list(by_text.values())
    orders = {tuple(map(normal, (p.prompt, p.chosen, p.rejected))) for p, _ in unique["pairs"]}
    unique["pairs"] = [
        (p, side)
        for p, side in unique["pairs"]
        if normal(p.chosen) == normal(p.rejected) or tuple(map(normal, (p.prompt, p.rejected, p.chosen))) not in orders
    ]

    def words(row):
        answers = (row.response,) if isinstance(row, Text) else (row.chosen, row.rejected)
        return {" ".join((row.prompt + answer).split()) for answer in answers}

    held = set().union(*(words(row) for kind in ("sft", "pairs") for row, side in unique[kind] if side), set())
    for kind in ("sft", "pairs"):
        assert kept[kind] == [(row, side) for row, side in unique[kind] if side or held.isdisjoint(words(row))]

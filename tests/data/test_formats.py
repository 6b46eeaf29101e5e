"""Every accepted row shape gives its record; every malformed row is refused by place, field, found and expected."""

import json
import math

import pytest

from rlhf_tasks.data.fields import Reading
from rlhf_tasks.data.formats import Asked, Compared, Example, Preference, Rated, parse_row
from rlhf_tasks.data.judgements import Judged
from rlhf_tasks.data.prompts import Conversation, Instruction, Message
from rlhf_tasks.data.repeats import repeats_prompts
from rlhf_tasks.errors import UserError
from rlhf_tasks.label_file import line

SCALE = (-4, 4)
HELLO = [{"role": "user", "content": "Hello"}]
HI, YO = ({"role": "assistant", "content": text} for text in ("Hi!", "Yo."))
LONG = [{"role": "system", "content": "Be kind."}, *HELLO, HI, {"role": "user", "content": "Who?"}]
SAID = Conversation(tuple(Message(m["role"], m["content"]) for m in LONG))
ASKED = Conversation((Message("user", "Hello"),))
TURNS = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Who? \n\nAssistant:"
TALK = Conversation((Message("user", "Hello"), Message("assistant", "Hi!"), Message("user", "Who?")))
GOES_ON = ("Hi!\n\nHuman: Who?", "Yo.")
LABEL = line(Compared("a", ("b", "c"), (0.5, -1.0), ("sft", "actor")), "first", "ada")


def parse(kind, row, **how):
    return parse_row("rows.jsonl:7", row, Reading(kind, SCALE, **how))


GOOD = [
    ("sft", {"instruction": "Add", "input": "1 1", "output": "2"}, Example(Instruction("Add", "1 1"), "2")),
    (
        "sft",
        {"instruction": "介绍一下北京", "input": "", "output": "北京。"},
        Example(Instruction("介绍一下北京", ""), "北京。"),
    ),
    ("sft", {"instruction": "Add", "input": " ", "output": "2"}, Example(Instruction("Add", ""), "2")),
    ("sft", {"instruction": "Add", "input": None, "output": "2"}, Example(Instruction("Add", ""), "2")),
    ("sft", {"prompt": "It's a", "completion": " film"}, Example("It's a", " film")),
    ("sft", {"prompt": HELLO, "completion": [HI]}, Example(ASKED, "Hi!")),
    ("sft", {"prompt": TURNS, "completion": " Me. "}, Example(TALK, "Me.")),
    ("sft", {"messages": [*LONG, HI], "prompt": None}, Example(SAID, "Hi!")),
    ("sft", {"messages": json.dumps([*LONG, HI]), "prompt": ""}, Example(SAID, "Hi!")),
    ("sft", {"messages": [*LONG, HI], "prompt": " Hello\n"}, Example(SAID, "Hi!")),
    ("sft", {"messages": [*LONG, HI], "prompt": LONG, "completion": "Hi!"}, Example(SAID, "Hi!")),
    ("sft", {"prompt": json.dumps(HELLO), "completion": json.dumps([HI])}, Example(ASKED, "Hi!")),
    ("sft", {"prompt": "a", "completion": '[{"b": 1}]'}, Example("a", '[{"b": 1}]')),
    ("sft", {"prompt": "a", "completion": "b", "messages": ""}, Example("a", "b")),
    (
        "sft",
        {"instruction": "Add", "input": math.nan, "output": "2", "text": "x", "prompt": "Below is\n\nAdd\n\n###"},
        Example(Instruction("Add", ""), "2"),
    ),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, Preference("a", "b", "c", 0.0)),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -2}, Preference("a", "b", "c", -2.0)),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1.5"}, Preference("a", "b", "c", 1.5)),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": ""}, Preference("a", "b", "c", 0.0)),
    ("preference", {"chosen": f"{TURNS} Me.", "rejected": f"{TURNS} You."}, Preference(TALK, "Me.", "You.", 0.0)),
    ("preference", {"chosen": f"{TURNS} Me", "rejected": f"{TURNS} Me too"}, Preference(TALK, "Me", "Me too", 0.0)),
    ("preference", {"chosen": TURNS[2:] + " Me", "rejected": TURNS[2:] + " X"}, Preference(TALK, "Me", "X", 0.0)),
    ("preference", {"chosen": [*LONG, HI], "rejected": [*LONG, YO]}, Preference(SAID, "Hi!", "Yo.", 0.0)),
    (
        "preference",
        {"prompt": "Hello", "chosen": [*HELLO, HI], "rejected": [*HELLO, YO]},
        Preference(ASKED, "Hi!", "Yo.", 0),
    ),
    ("preference", {"prompt": LONG, "chosen": [HI], "rejected": [YO]}, Preference(SAID, "Hi!", "Yo.", 0.0)),
    (
        "preference",
        {"prompt": "Who?", "chosen": [*LONG, HI], "rejected": [*LONG, YO]},
        Preference(SAID, "Hi!", "Yo.", 0),
    ),
    (
        "preference",
        {"prompt": [*HELLO, HI], "chosen": [*LONG, HI], "rejected": [*LONG, YO]},
        Preference(SAID, "Hi!", "Yo.", 0),
    ),
    (
        "preference",
        {"prompt": "<|user|>\nHello</s>\n<|assistant|>", "chosen": [*HELLO, HI], "rejected": [*HELLO, YO]},
        Preference(ASKED, "Hi!", "Yo.", 0),
    ),
    (
        "preference",
        {"prompt": "Hello", "chosen": f"{TURNS} Me.", "rejected": f"{TURNS} You."},
        Preference(TALK, "Me.", "You.", 0),
    ),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.nan}, Preference("a", "b", "c", 0.0)),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "nan"}, Preference("a", "b", "c", 0.0)),
    ("ratings", {"id": "1", "text": "Good", "ratings": [1, 2.5]}, Rated(None, "Good", (1, 2.5))),
    ("ratings", {"text": "Good", "rating": -4, "prompt": "So?"}, Rated("So?", "Good", (-4,))),
    ("ratings", {"text": "Good", "rating": -4, "prompt": ""}, Rated(None, "Good", (-4,))),
    ("ratings", {"text": "Good", "ratings": "[1, 2]"}, Rated(None, "Good", (1, 2))),
    ("ratings", {"text": "Good", "rating": "3.5"}, Rated(None, "Good", (3.5,))),
    ("labels", LABEL, Judged("a", ("b", "c"), "first", "ada", LABEL["pair"], (0.5, -1.0), ("sft", "actor"))),
    (
        "labels",
        judged := line(Compared(ASKED, GOES_ON, None, None), "second", "ada"),
        Judged(ASKED, GOES_ON, "second", "ada", judged["pair"]),
    ),
    ("labels", LABEL | {"scores": None, "models": None}, Judged("a", ("b", "c"), "first", "ada", LABEL["pair"])),
    ("prompts", {"prompt": "a"}, Asked("a")),
    ("prompts", {"prompt": HELLO}, Asked(ASKED)),
    ("prompts", {"messages": LONG}, Asked(SAID)),
    ("prompts", {"messages": [*LONG, HI]}, Asked(SAID)),
    ("prompts", {"messages": [*LONG, HI], "prompt": "Who?"}, Asked("Who?")),
    ("prompts", {"instruction": "Add", "output": "2", "prompt": "Below is Add"}, Asked(Instruction("Add", ""))),
    ("prompts", {"instruction": "Add", "input": "1 1"}, Asked(Instruction("Add", "1 1"))),
    ("prompts", {"chosen": f"{TURNS} Me.", "rejected": f"{TURNS} You."}, Asked(TALK)),
    ("prompts", {"prompt": "a", "completion": "b"}, Asked("a")),
]


@pytest.mark.parametrize(("kind", "row", "record"), GOOD)
def test_every_shape_gives_its_record(kind, row, record):
    assert parse(kind, row) == record


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD = [
    (
        "sft",
        {"instruction": "Add", "text": "2"},
        "no `output`; found `instruction`, `text`; a row of kind sft has `ins",
    ),
    ("sft", {}, "no `instruction`; found no fields; a row of kind sft has"),
    ("sft", {"prompt": "a"}, "no `completion`; found `prompt`; "),
    ("sft", {"prompt": "a", "completion": " \n"}, "`completion` is empty, expected a text with at least one word"),
    ("sft", {"prompt": 3, "completion": "b"}, "`prompt` is 3, expected a text"),
    ("sft", {"prompt": "a\ud800", "completion": "b"}, "`prompt` is no valid Unicode at character 2, expected whole"),
    ("sft", {"instruction": "a", "input": 1, "output": "b"}, "`input` is 1, expected a text"),
    (
        "sft",
        {"messages": LONG},
        "`messages` is a conversation that ends with `user`, expected one that ends with a messag",
    ),
    ("sft", {"messages": [HI]}, "`messages` is without a prompt, expected one that ends with a message of role `user`"),
    ("sft", {"messages": []}, "`messages` is [], expected a list of messages, each with `role` and `content`"),
    (
        "sft",
        {"messages": [*HELLO, {"role": "tool", "content": "x"}]},
        '`messages[2].role` is "tool", expected system, us',
    ),
    ("sft", {"messages": [*HELLO, "Hi"]}, '`messages[2]` is "Hi", expected a message with `role` and `content`'),
    ("sft", {"messages": [{"role": "user", "content": ""}, HI]}, "`messages[1].content` is empty"),
    (
        "sft",
        {"prompt": "a", "completion": [*HELLO, HI]},
        "`completion` is 2 messages, expected one, the assistant's answer",
    ),
    ("preference", {"prompt": "a", "chosen": "b"}, "no `rejected`; found `prompt`, `chosen`; a row of kind preference"),
    ("preference", {**PAIR, "rejected": "b"}, "`chosen` is the same as `rejected`, expected two different answers"),
    ("preference", {"chosen": TURNS + " a", "rejected": TURNS + " a"}, "`chosen` is the same as `rejected`"),
    ("preference", {"chosen": TURNS + " a", "rejected": TURNS + " a "}, "`chosen` is the same as `rejected`"),
    ("preference", {"chosen": TURNS + " a", "rejected": TURNS + " "}, "`rejected` is empty"),
    (
        "preference",
        {"chosen": "b", "rejected": "c"},
        '`chosen` is "b" and `rejected` "c", expected both to open with the',
    ),
    (
        "preference",
        {"chosen": [*HELLO, HI], "rejected": [*LONG, YO]},
        "`rejected` is a different conversation, expected",
    ),
    ("preference", {**PAIR, "margin": math.inf}, "`margin` is Infinity, expected a finite number"),
    ("preference", {**PAIR, "margin": "much"}, '`margin` is "much", expected a finite number'),
    ("preference", {**PAIR, "margin": True}, "`margin` is true, expected a finite number"),
    ("preference", {**PAIR, "margin": 10**400}, "`margin` is 1000"),
    (
        "ratings",
        {"text": "Good"},
        "no `rating`; found `text`; a row of kind ratings has `text` and `ratings` or `rating`",
    ),
    ("ratings", {"rating": 1}, "no `text`; found `rating`"),
    ("ratings", {"text": "Good", "rating": 5}, "`rating` is 5, expected -4 to 4 (`data.ratings.scale`)"),
    ("ratings", {"text": "Good", "ratings": [1, math.nan]}, "`ratings[2]` is NaN, expected a finite number"),
    ("ratings", {"text": "Good", "ratings": [1, None]}, "`ratings[2]` is null, expected a finite number"),
    (
        "ratings",
        {"text": "Good", "ratings": []},
        "`ratings` is [], expected a list of at least one number; for a single",
    ),
    ("ratings", {"text": "Good", "ratings": 3}, "`ratings` is 3, expected a list of at least one number"),
    ("ratings", {"text": "Good", "ratings": "good"}, '`ratings` is "good", expected a list of at least one number'),
    ("labels", {"prompt": "a"}, "no `answers`; found `prompt`; a row of kind labels has what `rlhf label` writes: `pr"),
    ("labels", LABEL | {"answers": ["b"]}, '`answers` is ["b"], expected a list of two, one for each answer'),
    ("labels", LABEL | {"answers": ["b", ""]}, "`answers[2]` is empty, expected a text with at least one word"),
    ("labels", LABEL | {"answers": ["b", "b"]}, "`answers` is the same text twice, expected two different answers"),
    ("labels", LABEL | {"choice": "best"}, '`choice` is "best", expected one of first, second, tie, both bad, skip, w'),
    ("labels", LABEL | {"rater": " "}, "`rater` is empty, expected a text"),
    ("labels", LABEL | {"scores": [1, "x"]}, '`scores[2]` is "x", expected a finite number'),
    ("labels", LABEL | {"models": "sft"}, '`models` is "sft", expected a list of two, one for each answer'),
    ("labels", LABEL | {"answers": ["b", "d"]}, "`pair` is not of these texts, expected those that were judged; rest"),
    ("labels", LABEL | {"prompt": "b"}, "`pair` is not of these texts, expected those that were judged"),
    ("labels", LABEL | {"digests": ["", ""]}, "`digests` is not of these texts, expected those that were judged"),
    (
        "prompts",
        {"text": "a"},
        "no `prompt`; found `text`; a row of kind prompts has `prompt`; or the fields of an sft or",
    ),
    # a field that is not read says something else than those that are
    (
        "preference",
        {"prompt": "Be a pirate", "chosen": [*HELLO, HI], "rejected": [*HELLO, YO]},
        '`prompt` is "Be a pirate", expected what `chosen` says too, or none beside it; take one of the two away',
    ),
    (
        "preference",
        {"prompt": [LONG[0]], "chosen": [*HELLO, HI], "rejected": [*HELLO, YO]},
        '`prompt` is [{"role": "system", "content": "Be kind."}], expected what `chosen` says too',
    ),
    (
        "preference",
        {"prompt": "Be a pirate", "chosen": f"{TURNS} Me.", "rejected": f"{TURNS} You."},
        '`prompt` is "Be a pirate", expected what `chosen` says too',
    ),
    (
        "sft",
        {"messages": [*LONG, HI], "prompt": "Bye"},
        '`prompt` is "Bye", expected what `messages` says too, or none',
    ),
    ("sft", {"messages": [*LONG, HI], "completion": "Bye"}, '`completion` is "Bye", expected what `messages` says too'),
    ("sft", {"messages": [*LONG, HI], "instruction": "Add"}, '`instruction` is "Add", expected what `messages` says'),
    ("sft", {"prompt": "a", "completion": "b", "output": "c"}, '`output` is "c", expected what `completion` says too'),
    (
        "sft",
        {"prompt": "a", "instruction": "b", "output": "c"},
        '`prompt` is "a", expected what `instruction` says too',
    ),
    ("prompts", {"prompt": "a", "messages": LONG}, '`prompt` is "a", expected what `messages` says too'),
    ("prompts", {"prompt": "a", "instruction": "b"}, '`prompt` is "a", expected what `instruction` says too'),
    # more than one answer
    (
        "preference",
        {"chosen": f"{TURNS} Me.\n\nHuman: So?\n\nAssistant: Yes.", "rejected": f"{TURNS} You."},
        "`chosen` is a transcript that parts from `rejected` before its last answer, expected both to be the same up",
    ),
    (
        "preference",
        {"chosen": f"{TURNS} Me.", "rejected": f"{TURNS} You.\n\nHuman: So?"},
        "`rejected` is a transcript that ends with the human's turn, expected both to be the same up to the",
    ),
    (
        "sft",
        {"prompt": TURNS, "completion": " Me.\n\nHuman: So?"},
        "`completion` is an answer that goes on with `Human:`, expected the assistant's one answer to `prompt`",
    ),
    (
        "sft",
        {"messages": "[{'role': 'user', 'content': 'Hi'}]"},
        "`messages` is a list as Python prints it, expected the list itself, or its JSON",
    ),
    (
        "sft",
        {"\x1b[2J\ud800": 1} | {f"k{i}": i for i in range(50_000)},
        "no `instruction`; found `\\x1b[2J\\ud800`, "
        "`k0`, `k1`, `k2`, `k3`, `k4`, `k5`, `k6`, `k7`, `k8`, `k9`, `k10` and 49,989 more; a row",
    ),
    ("ratings", {"text": "Good", "rating": "\x9b2J"}, '`rating` is "\\x9b2J", expected a finite number'),
    ("prompts", {"prompt": [HI]}, "`prompt` is a conversation that ends with `assistant`, expected one that ends with"),
]


@pytest.mark.parametrize(("kind", "row", "message"), BAD)
def test_a_malformed_row_is_refused_by_place_field_found_and_expected(kind, row, message):
    with pytest.raises(UserError) as caught:
        parse(kind, row)
    assert str(caught.value).startswith(f"rows.jsonl:7: {message}")
    str(caught.value).encode()  # a message can always be printed


# The names of the user's own files ------------------------------------------------------------------------------------

NAMED = {"prompt": "q", "chosen": "good", "rejected": "answers.bad"}


def test_fields_are_read_under_their_own_names():
    row = {"q": "a", "good": "b", "answers": {"bad": "c"}, "chosen": "theirs", "margin": 2}
    assert parse("preference", row, names=NAMED) == Preference("a", "b", "c", 2.0)
    assert parse("preference", {"q": "a", "good": "b", "answers.bad": "c"}, names=NAMED) == Preference("a", "b", "c", 0)
    swap = {"chosen": "rejected", "rejected": "chosen"}
    assert parse("preference", {"prompt": "a", "chosen": "no", "rejected": "yes"}, names=swap).chosen == "yes"


@pytest.mark.parametrize(
    ("kind", "names", "row", "message"),
    [
        (
            "preference",
            NAMED,
            {"q": "a", "good": "b", "answers": {"worse": "c"}},
            "no `answers.bad` (for `rejected`); found `q`, `good`, `answers`; add it, or correct `fields` in",
        ),
        (
            "preference",
            NAMED,
            {"q": "a", "good": "", "answers": {"bad": "c"}},
            "`good` (for `chosen`) is empty, expected",
        ),
        (
            "preference",
            NAMED,
            {"q": "a", "good": "b", "answers": {"bad": "b"}},
            "`good` (for `chosen`) is the same as `answers.bad` (for `rejected`), expected two",
        ),
        ("sft", {"messages": "talk"}, {"talk": [{"role": "x", "content": "y"}]}, "`talk[1].role` (for `messages`) is"),
        (
            "prompts",
            {"text": "prompt"},
            {"text": "a"},
            "no `prompt`; found `text`; add it, or correct `fields` in `data.sources`: "
            "our name comes first, then yours; did you mean `prompt: text`?",
        ),
    ],
)
def test_messages_say_the_name_in_the_users_file_first(kind, names, row, message):
    with pytest.raises(UserError) as caught:
        parse(kind, row, names=names)
    assert str(caught.value).startswith(f"rows.jsonl:7: {message}")


# Prompts that stand in front of their answers -------------------------------------------------------------------------


def whole(prompt, *answers):
    """A pair whose answers repeat the prompt."""
    return {"prompt": prompt} | dict(
        zip(("chosen", "rejected"), (f"{prompt}{answer}" for answer in answers), strict=True)
    )


WHOLE = [whole(f"The {name}", " is good", " is bad") for name in ("film", "plot", "cast")]
APART = {"prompt": "The end", "chosen": " is good", "rejected": " is bad"}


@pytest.mark.parametrize(
    ("kind", "rows", "repeats"),
    [
        ("preference", WHOLE, True),
        ("preference", [*WHOLE, APART, APART], True),
        ("preference", [*WHOLE[:2], APART, APART], False),
        ("preference", [whole("Hi", "!", " there")], False),  # an answer may well begin so
        ("preference", [whole("Hi", "!", " there")] * 9, True),
        ("preference", [{**row, "rejected": " is bad"} for row in WHOLE], False),
        ("preference", [{"prompt": HELLO, "chosen": [HI], "rejected": [YO]}], False),
        ("sft", [{"prompt": "def f(x):", "completion": "def f(x):\n    return x"}] * 2, True),
        ("ratings", [{"prompt": "The end of it ", "text": " The end of it is near", "rating": 1}] * 2, True),
        ("prompts", [{"prompt": "The end of the film"}], False),
        (
            "labels",
            [line(Compared("The end of it", ("The end of it is near", "The end of it."), None, None), "tie", "ada")],
            False,
        ),
        ("preference", [], False),
    ],
)
def test_a_source_repeats_its_prompts_if_most_rows_do(kind, rows, repeats):
    assert repeats_prompts(rows, Reading(kind, SCALE)) == repeats


def test_a_repeated_prompt_is_taken_off():
    notes = []
    how = {"repeated": True, "on_note": lambda where, note: notes.append((where, note))}
    assert parse("preference", WHOLE[0], **how) == Preference("The film", " is good", " is bad", 0.0)
    talk = whole(TURNS, " Me.", " You.")
    assert parse("preference", talk, **how) == Preference(TALK, "Me.", "You.", 0.0)
    assert parse("sft", {"prompt": "Go on", "completion": "\nGo on, go on"}, **how) == Example("Go on", ", go on")
    assert notes == [("rows.jsonl:7", "repeated prompts")] * 3
    expected = '`chosen` is " is good", expected it to open with its prompt, as most of its source do; list other'
    with pytest.raises(UserError) as caught:
        parse("preference", APART, **how)
    assert str(caught.value).startswith(f"rows.jsonl:7: {expected}")
    with pytest.raises(UserError, match="`chosen` is empty"):
        parse("preference", whole("The film", "", " is bad"), **how)


def test_what_is_read_as_something_else_is_noted_of_good_rows():
    notes = []
    how = {"on_note": lambda where, note: notes.append(note)}
    parse("preference", whole("Who made this film?", " She.", " He."), **how)
    parse("preference", whole("Hi", "!", " there"), **how)
    parse("preference", PAIR | {"margin": math.nan}, **how)
    with pytest.raises(UserError):
        parse("preference", PAIR | {"margin": math.nan, "chosen": ""}, **how)
    assert notes == ["kept prompts", "no margin"]

"""Every accepted row shape gives its record; every malformed row is refused by place, field, found and expected."""

import math

import pytest

from rlhf_tasks.data.formats import Asked, Conversation, Example, Instruction, Message, Preference, Rated, parse_row
from rlhf_tasks.errors import UserError

SCALE = (-4, 4)
HELLO = [{"role": "user", "content": "Hello"}]
HI, YO = ({"role": "assistant", "content": text} for text in ("Hi!", "Yo."))
LONG = [{"role": "system", "content": "Be kind."}, *HELLO, HI, {"role": "user", "content": "Who?"}]
SAID = Conversation(tuple(Message(m["role"], m["content"]) for m in LONG))
ASKED = Conversation((Message("user", "Hello"),))
TURNS = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Who? \n\nAssistant:"
TALK = Conversation((Message("user", "Hello"), Message("assistant", "Hi!"), Message("user", "Who?")))


def parse(kind, row):
    return parse_row("rows.jsonl:7", row, kind, SCALE)


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
    ("ratings", {"id": "1", "text": "Good", "ratings": [1, 2.5]}, Rated(None, "Good", (1, 2.5))),
    ("ratings", {"text": "Good", "rating": -4, "prompt": "So?"}, Rated("So?", "Good", (-4,))),
    ("ratings", {"text": "Good", "ratings": "[1, 2]"}, Rated(None, "Good", (1, 2))),
    ("ratings", {"text": "Good", "rating": "3.5"}, Rated(None, "Good", (3.5,))),
    ("prompts", {"prompt": "a"}, Asked("a")),
    ("prompts", {"prompt": HELLO}, Asked(ASKED)),
    ("prompts", {"messages": LONG}, Asked(SAID)),
    ("prompts", {"messages": [*LONG, HI]}, Asked(SAID)),
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
    ("preference", {**PAIR, "margin": math.nan}, "`margin` is NaN, expected a finite number"),
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
    (
        "prompts",
        {"text": "a"},
        "no `prompt`; found `text`; a row of kind prompts has `prompt`; or the fields of an sft or",
    ),
    ("prompts", {"prompt": [HI]}, "`prompt` is a conversation that ends with `assistant`, expected one that ends with"),
]


@pytest.mark.parametrize(("kind", "row", "message"), BAD)
def test_a_malformed_row_is_refused_by_place_field_found_and_expected(kind, row, message):
    with pytest.raises(UserError) as caught:
        parse(kind, row)
    assert str(caught.value).startswith(f"rows.jsonl:7: {message}")
    str(caught.value).encode()  # a message can always be printed

"""The row shapes that human feedback comes in (DESIGN: Data), read into one record a kind.

A prompt is a plain text, an `Instruction`, or a `Conversation` whose last message is the user's. How it is written for
a model is a matter of the template (encoding.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from rlhf_tasks.errors import UserError

Kind = Literal["ratings", "sft", "preference", "prompts"]
SHAPES: dict[str, str] = {
    "sft": "`instruction`, `input` and `output`; or `prompt` and `completion`; or `messages`",
    "preference": "`prompt`, `chosen` and `rejected`; or `chosen` and `rejected` as whole transcripts or messages",
    "ratings": "`text` and `ratings` or `rating`, with or without `prompt`",
    "prompts": "`prompt`; or the fields of an sft or preference row",
}
ROLES = ("system", "user", "assistant")
ANSWER = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


class Instruction(NamedTuple):
    """An alpaca prompt; `input` may be empty."""

    instruction: str
    input: str


class Conversation(NamedTuple):
    """What was said before the answer."""

    messages: tuple[Message, ...]


Prompt = str | Instruction | Conversation


class Example(NamedTuple):
    """SFT: the response that the model should give to the prompt."""

    prompt: Prompt
    response: str


class Preference(NamedTuple):
    """Two responses to one prompt, of which people prefer `chosen`; `margin` is 0 where the row has none."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float


class Rated(NamedTuple):
    """A text and what its raters gave it; `prompt` is None where the text is all there is."""

    prompt: Prompt | None
    text: str
    ratings: tuple[float, ...]


class Asked(NamedTuple):
    """A prompt without a response."""

    prompt: Prompt


Record = Example | Preference | Rated | Asked


def parse_row(where: str, row: Mapping[str, Any], kind: Kind, scale: tuple[float, float]) -> Record:
    """One row as a record of its source's kind.

    Args:
        where: file and line, for messages.
        scale: the lowest and the highest rating that can be (`data.ratings.scale`).

    Raises:
        UserError: a field is missing, empty, of the wrong type or out of range, or chosen and rejected are the same.
    """
    fields = _Fields(where, {name: value for name, value in row.items() if value is not None}, kind)
    if kind == "sft":
        return _example(fields)
    if kind == "preference":
        return _preference(fields)
    if kind == "ratings":
        return _rated(fields, scale)
    return Asked(_asked(fields))


class RowError(UserError):
    """The first thing that is wrong with a row, and what else is: `more`."""

    def __init__(self, first: UserError, more: list[UserError]) -> None:
        super().__init__(str(first))
        self.more = more


class _Fields:
    """A row's fields, with the one way to complain about them."""

    def __init__(self, where: str, row: dict[str, Any], kind: str) -> None:
        self.where, self.row, self.kind = where, row, kind

    def __contains__(self, name: str) -> bool:
        return name in self.row

    def wrong(self, name: str, found: str, expected: str) -> UserError:
        return UserError(f"{self.where}: `{name}` is {found}, expected {expected}")

    def each(self, *readings: Callable[[], Any]) -> list[Any]:
        """What some readings give, all of which are tried: what is wrong with one says nothing of the next."""
        values, errors = [], []
        for reading in readings:
            try:
                values.append(reading())
            except UserError as error:
                errors += [error, *getattr(error, "more", [])]
        if errors:
            raise errors[0] if len(errors) == 1 else RowError(errors[0], errors[1:])
        return values

    def get(self, name: str) -> Any:
        if name not in self.row:
            found = ", ".join(f"`{field}`" for field in self.row) or "no fields"
            raise UserError(
                f"{self.where}: no `{name}`; found {found}; a row of kind {self.kind} has {SHAPES[self.kind]}"
            )
        return self.row[name]

    def text(self, name: str, value: Any, *, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            raise self.wrong(name, _show(value), "a text")
        if not value.strip() and not may_be_empty:
            raise self.wrong(name, "empty", "a text with at least one word")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.wrong(name, f"no valid Unicode at character {error.start + 1}", "whole characters") from None
        return value

    def number(self, name: str, value: Any) -> float:
        """A finite number; CSV brings it as text."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.wrong(name, _show(value), "a finite number")
        return number

    def messages(self, name: str, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, list) or not value:
            raise self.wrong(name, _show(value), "a list of messages, each with `role` and `content`")
        readings = (partial(self.message, f"{name}[{number}]", item) for number, item in enumerate(value, 1))
        return tuple(self.each(*readings))

    def message(self, place: str, item: Any) -> Message:
        if not isinstance(item, dict) or "role" not in item or "content" not in item:
            raise self.wrong(place, _show(item), "a message with `role` and `content`")
        if item["role"] not in ROLES:
            raise self.wrong(f"{place}.role", _show(item["role"]), "system, user or assistant")
        return Message(item["role"], self.text(f"{place}.content", item["content"]))

    def prompt(self, name: str, value: Any) -> Prompt:
        """A text, a list of messages that ends with the user's, or a transcript that ends with `Assistant:`."""
        if not isinstance(value, list):
            text = self.text(name, value)
            return _turns(text) or text
        return Conversation(self.ends(name, self.messages(name, value), "user"))

    def ends(self, name: str, messages: tuple[Message, ...], role: str) -> tuple[Message, ...]:
        if not messages or messages[-1].role != role:
            found = f"a conversation that ends with `{messages[-1].role}`" if messages else "without a prompt"
            raise self.wrong(name, found, f"one that ends with a message of role `{role}`")
        return messages

    def answer(self, name: str, value: Any, prompt: Prompt | None) -> str:
        """A response: a text, or a list of one assistant message."""
        if isinstance(value, list):
            messages = self.ends(name, self.messages(name, value), "assistant")
            if len(messages) > 1:
                raise self.wrong(name, f"{len(messages)} messages", "one, the assistant's answer to `prompt`")
            return messages[0].content
        text = self.text(name, value)
        return text.strip() if isinstance(prompt, Conversation) else text


def _example(fields: _Fields) -> Example:
    if "messages" in fields:
        messages = fields.ends("messages", fields.messages("messages", fields.get("messages")), "assistant")
        return Example(Conversation(fields.ends("messages", messages[:-1], "user")), messages[-1].content)
    if "prompt" in fields or "completion" in fields:
        prompt, completion = _prompt_and(fields, "completion")
        return Example(prompt, completion)
    return Example(*fields.each(lambda: _instruction(fields), lambda: fields.text("output", fields.get("output"))))


def _prompt_and(fields: _Fields, *answers: str) -> list[Any]:
    """The prompt and its answers; how an answer is read depends on whether the prompt is a conversation."""
    talk: list[Prompt] = []

    def prompt() -> Prompt:
        talk.append(fields.prompt("prompt", fields.get("prompt")))
        return talk[0]

    def answer(name: str) -> str:
        return fields.answer(name, fields.get(name), talk[0] if talk else "")

    return fields.each(prompt, *(partial(answer, name) for name in answers))


def _instruction(fields: _Fields) -> Instruction:
    instruction = fields.text("instruction", fields.get("instruction"))
    given = fields.text("input", fields.row.get("input", ""), may_be_empty=True)
    return Instruction(instruction, given if given.strip() else "")


def _preference(fields: _Fields) -> Preference:
    (prompt, chosen, rejected), margin = fields.each(lambda: _compared(fields), lambda: _margin(fields))
    return Preference(prompt, chosen, rejected, margin)


def _margin(fields: _Fields) -> float:
    margin = fields.row.get("margin", "")
    return 0.0 if margin == "" else fields.number("margin", margin)


def _compared(fields: _Fields) -> tuple[Prompt, str, str]:
    """A row's prompt, chosen and rejected."""
    if "prompt" in fields and not all(name in fields for name in ("chosen", "rejected")):
        _prompt_and(fields, "chosen", "rejected")
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    same = fields.wrong("chosen", "the same as `rejected`", "two different answers")
    if chosen == rejected and chosen not in ("", None):
        raise same
    if isinstance(chosen, list) and isinstance(rejected, list) and (len(chosen) > 1 or "prompt" not in fields):
        # A `prompt` beside whole conversations only repeats their opening.
        prompt, chosen, rejected = _split_messages(fields, chosen, rejected)
    elif "prompt" in fields:
        prompt, chosen, rejected = _prompt_and(fields, "chosen", "rejected")
    else:
        prompt, chosen, rejected = _split_transcripts(fields, chosen, rejected)
    if chosen == rejected:
        raise same
    return prompt, chosen, rejected


def _split_messages(fields: _Fields, chosen: Any, rejected: Any) -> tuple[Prompt, str, str]:
    best, worst = fields.each(lambda: fields.messages("chosen", chosen), lambda: fields.messages("rejected", rejected))
    best, worst = fields.ends("chosen", best, "assistant"), fields.ends("rejected", worst, "assistant")
    if best[:-1] != worst[:-1]:
        raise fields.wrong("rejected", "a different conversation", "the messages of `chosen` up to the last answer")
    return Conversation(fields.ends("chosen", best[:-1], "user")), best[-1].content, worst[-1].content


def _split_transcripts(fields: _Fields, chosen: Any, rejected: Any) -> tuple[Prompt, str, str]:
    """Two transcripts: the prompt is what they share, up to the last `Assistant:` of it."""
    best, worst = fields.each(lambda: fields.text("chosen", chosen), lambda: fields.text("rejected", rejected))
    best, worst = (text if text.startswith("\n\n") else "\n\n" + text.lstrip() for text in (best, worst))
    differs = next((i for i, (a, b) in enumerate(zip(best, worst, strict=False)) if a != b), min(len(best), len(worst)))
    end = best.rfind(ANSWER, 0, differs) + len(ANSWER)
    prompt = _turns(best[:end])
    if prompt is None:
        expected = "both to open with the same turns, \\n\\nHuman: ... \\n\\nAssistant:, or a field `prompt`"
        raise fields.wrong("chosen", f"{_show(chosen)} and `rejected` {_show(rejected)}", expected)
    answers = best[end:].strip(), worst[end:].strip()
    return prompt, fields.text("chosen", answers[0]), fields.text("rejected", answers[1])


def _turns(text: str) -> Conversation | None:
    """The messages of a transcript that ends by asking for the assistant's answer; None for any other text."""
    text = text.rstrip()
    if not text.startswith("\n\nHuman:") or not text.endswith(ANSWER):
        return None
    _, *parts = TURN.split(text.removesuffix(ANSWER))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = tuple(Message(roles[parts[i]], parts[i + 1].strip()) for i in range(0, len(parts), 2))
    return Conversation(turns) if turns[-1].role == "user" and turns[-1].content else None


def _rated(fields: _Fields, scale: tuple[float, float]) -> Rated:
    prompt = fields.prompt("prompt", fields.get("prompt")) if "prompt" in fields else None
    text = fields.answer("text", fields.get("text"), prompt)
    if "ratings" not in fields:
        return Rated(prompt, text, (_rating(fields, "rating", fields.get("rating"), scale),))
    values = fields.get("ratings")
    if isinstance(values, str):  # CSV brings a list as its JSON text
        with contextlib.suppress(json.JSONDecodeError):
            values = json.loads(values)
    if not isinstance(values, list) or not values:
        raise fields.wrong("ratings", _show(values), "a list of at least one number; for a single one use `rating`")
    readings = (partial(_rating, fields, f"ratings[{n}]", value, scale) for n, value in enumerate(values, 1))
    return Rated(prompt, text, tuple(fields.each(*readings)))


def _rating(fields: _Fields, name: str, value: Any, scale: tuple[float, float]) -> float:
    number = fields.number(name, value)
    if not scale[0] <= number <= scale[1]:
        raise fields.wrong(name, _show(value), f"{scale[0]:g} to {scale[1]:g} (`data.ratings.scale`)")
    return number


def _asked(fields: _Fields) -> Prompt:
    if "prompt" in fields:
        return fields.prompt("prompt", fields.get("prompt"))
    if "messages" in fields:
        messages = fields.messages("messages", fields.get("messages"))
        asked = messages[:-1] if messages[-1].role == "assistant" else messages
        return Conversation(fields.ends("messages", asked, "user"))
    if "instruction" in fields:
        return _instruction(fields)
    if "chosen" in fields:
        return _preference(fields).prompt
    return fields.prompt("prompt", fields.get("prompt"))


def _show(value: Any) -> str:
    """A value as a message quotes it: its JSON, at most 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = text.encode(errors="replace").decode()
    return text if len(text) <= 60 else text[:57] + "..."

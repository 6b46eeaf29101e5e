"""The row shapes that human feedback comes in (DESIGN: Data), read into one record a kind."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from rlhf_tasks.data.fields import LABELS, Fields, Reading
from rlhf_tasks.data.judgements import CHOICES, Judged, pair_digest, text_digest
from rlhf_tasks.data.prompts import ANSWER, Conversation, Instruction, Message, Prompt, prompt_fields
from rlhf_tasks.data.repeats import take_prompt_off
from rlhf_tasks.data.texts import normal, show
from rlhf_tasks.errors import UserError

ROLES = ("system", "user", "assistant")
TURN = re.compile(r"\n\n(Human|Assistant):")
Value = TypeVar("Value")

#: fields that may hold a list of messages; CSV brings it as its JSON text
TALK = ("prompt", "completion", "messages", "chosen", "rejected", "text")
LISTED = re.compile(r"\s*\[\s*\{")
PRINTED = re.compile(r"\s*\[\s*\{'(role|content)'")


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


class Compared(NamedTuple):
    """Two answers to one prompt, what the reward model gives them and which models gave them, if that is known."""

    prompt: Prompt
    answers: tuple[str, str]
    scores: tuple[float, float] | None
    models: tuple[str, str] | None

    @property
    def pair(self) -> str:
        """What stands for them in either order."""
        return pair_digest(prompt_fields(self.prompt), self.answers)


Record = Example | Preference | Rated | Judged | Asked


def parse_row(where: str, row: Mapping[str, Any], reading: Reading) -> Record:
    """One row as a record of its source's kind; `where` is its file and line, for messages.

    Raises:
        UserError: a field is missing, empty, of the wrong type or out of range, two fields say different things of one,
            or chosen and rejected are the same.
    """
    fields = _Talk(where, row, reading)
    take_prompt_off(fields)
    record = SHAPE_OF[reading.kind](fields)
    for note in fields.notes:
        reading.on_note(where, note)
    return record


def parse_compared(where: str, row: Mapping[str, Any]) -> Compared:
    """The row of a pair that is to be judged.

    Raises:
        UserError: a field is missing, empty or of the wrong type, or the answers are the same.
    """
    return _answers(_Talk(where, row, LABELS))


# Conversations --------------------------------------------------------------------------------------------------------


class _Talk(Fields):
    """A row's fields, those that hold conversations among them."""

    def get(self, name: str) -> Any:
        value = super().get(name)
        return self._unpacked(name, value) if isinstance(value, str) and name in TALK and LISTED.match(value) else value

    def _unpacked(self, name: str, text: str) -> Any:
        """The messages that a text is the JSON of, or the text."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            if PRINTED.match(text):
                raise self.wrong(name, "a list as Python prints it", "the list itself, or its JSON") from None
            return text
        talk = all(isinstance(item, dict) and "role" in item and "content" in item for item in found)
        return found if talk or name == "messages" else text

    def messages(self, name: str, value: Any) -> tuple[Message, ...]:
        if not isinstance(value, list) or not value:
            raise self.wrong(name, show(value), "a list of messages, each with `role` and `content`")
        readings = (partial(self.message, f"{name}[{number}]", item) for number, item in enumerate(value, 1))
        return tuple(self.each(*readings))

    def message(self, place: str, item: Any) -> Message:
        if not isinstance(item, dict) or "role" not in item or "content" not in item:
            raise self.wrong(place, show(item), "a message with `role` and `content`")
        if item["role"] not in ROLES:
            raise self.wrong(f"{place}.role", show(item["role"]), "system, user or assistant")
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
                expected = f"one, the assistant's answer to {self.label('prompt')}"
                raise self.wrong(name, f"{len(messages)} messages", expected)
            return messages[0].content
        text = self.text(name, value)
        if not isinstance(prompt, Conversation):
            return text
        if turn := TURN.search(text):
            expected = f"the assistant's one answer to {self.label('prompt')}; take the rest away"
            raise self.wrong(name, f"an answer that goes on with `{turn[1]}:`", expected)
        return text.strip()

    def has(self, name: str) -> bool:
        """Whether a field is there and filled: CSV and pandas cannot leave one out."""
        value = self.row.get(name, "")
        return not _is_nan(value) and not (isinstance(value, str) and not value.strip())

    def same_prompt(self, prompt: Conversation, beside: str) -> None:
        """See that a `prompt` beside a whole conversation is of it, so that nothing is lost by not reading it."""
        if self.has("prompt") and not _is_of(self.get("prompt"), prompt):
            raise self.ambiguous("prompt", beside)

    def ambiguous(self, name: str, beside: str) -> UserError:
        expected = f"what {self.label(beside)} says too, or none beside it; take one of the two away"
        return self.wrong(name, show(self.row[name]), expected)


def _is_of(value: Any, talk: Conversation) -> bool:
    """Whether a prompt's value is a message of a conversation, or some in a row, or a rendering of them all."""
    whole = [(message.role, normal(message.content)) for message in talk.messages]
    if isinstance(value, str):
        given, contents = normal(value), [content for _, content in whole]
        if given in contents or all(content in given for content in contents):
            return True
        value = [message._asdict() for message in (_turns(value) or Conversation(())).messages]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return False
    part = [(item.get("role"), normal(str(item.get("content")))) for item in value]
    return bool(part) and any(whole[i : i + len(part)] == part for i in range(len(whole)))


def _is_nan(value: Any) -> bool:
    return (isinstance(value, float) and value != value) or (isinstance(value, str) and value.strip().lower() == "nan")


def _turns(text: str) -> Conversation | None:
    """The messages of a transcript that ends by asking for the assistant's answer; None for any other text."""
    text = text.rstrip()
    if not text.startswith("\n\nHuman:") or not text.endswith(ANSWER):
        return None
    _, *parts = TURN.split(text.removesuffix(ANSWER))
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = tuple(Message(roles[parts[i]], parts[i + 1].strip()) for i in range(0, len(parts), 2))
    return Conversation(turns) if turns[-1].role == "user" and turns[-1].content else None


# Shapes ---------------------------------------------------------------------------------------------------------------


def _example(fields: _Talk) -> Example:
    if fields.has("messages"):
        messages = fields.ends("messages", fields.messages("messages", fields.get("messages")), "assistant")
        asked = Conversation(fields.ends("messages", messages[:-1], "user"))
        fields.same_prompt(asked, "messages")
        _no_other_shape(fields, "messages", "messages", asked, messages[-1].content)
        return Example(asked, messages[-1].content)
    if "completion" in fields or ("prompt" in fields and "instruction" not in fields):
        prompt, completion = _prompt_and(fields, "completion")
        _no_other_shape(fields, "prompt", "completion", prompt, completion)
        return Example(prompt, completion)
    return Example(*fields.each(lambda: _instruction(fields), lambda: fields.text("output", fields.get("output"))))


def _no_other_shape(fields: _Talk, asked: str, answer: str, prompt: Prompt, response: str) -> None:
    """See that fields of another shape than those two that were read say the same: which is meant, nobody knows."""
    talk = prompt.messages if isinstance(prompt, Conversation) else (Message("user", str(prompt)),)
    if fields.has("instruction"):
        instruction = normal(str(fields.row["instruction"]))
        if not any(instruction in normal(message.content) for message in talk):
            raise fields.ambiguous("instruction", asked)
    for name in ("completion", "output"):
        if name != answer and fields.has(name) and normal(str(fields.row[name])) != normal(response):
            raise fields.ambiguous(name, answer)


def _prompt_and(fields: _Talk, *answers: str) -> list[Any]:
    """The prompt and its answers; how an answer is read depends on whether the prompt is a conversation."""
    talk: list[Prompt] = []

    def prompt() -> Prompt:
        talk.append(fields.prompt("prompt", fields.get("prompt")))
        return talk[0]

    def answer(name: str) -> str:
        return fields.answer(name, fields.get(name), talk[0] if talk else "")

    return fields.each(prompt, *(partial(answer, name) for name in answers))


def _instruction(fields: _Talk) -> Instruction:
    instruction = fields.text("instruction", fields.get("instruction"))
    given = fields.text("input", fields.row["input"], may_be_empty=True) if fields.has("input") else ""
    if fields.has("prompt") and normal(instruction) not in normal(str(fields.row["prompt"])):  # else it is rendered
        raise fields.ambiguous("prompt", "instruction")
    return Instruction(instruction, given)


def _preference(fields: _Talk) -> Preference:
    (prompt, chosen, rejected), margin = fields.each(lambda: _compared(fields), lambda: _margin(fields))
    return Preference(prompt, chosen, rejected, margin)


def _margin(fields: _Talk) -> float:
    margin = fields.row.get("margin", "")
    if _is_nan(margin):  # as pandas writes one that is not there
        fields.notes.append("no margin")
        return 0.0
    return 0.0 if margin == "" else fields.number("margin", margin)


def _compared(fields: _Talk) -> tuple[Prompt, str, str]:
    """A row's prompt, chosen and rejected."""
    if "prompt" in fields and not all(name in fields for name in ("chosen", "rejected")):
        _prompt_and(fields, "chosen", "rejected")
    chosen, rejected = fields.get("chosen"), fields.get("rejected")
    if chosen == rejected and chosen != "":
        raise _same(fields)
    if isinstance(chosen, list) and isinstance(rejected, list) and (len(chosen) > 1 or "prompt" not in fields):
        asked, chosen, rejected = _split_messages(fields, chosen, rejected)
        fields.same_prompt(asked, "chosen")
        prompt: Prompt = asked
    elif "prompt" in fields and not (_is_transcript(chosen) and _is_transcript(rejected)):
        prompt, chosen, rejected = _prompt_and(fields, "chosen", "rejected")
    else:
        asked, chosen, rejected = _split_transcripts(fields, chosen, rejected)
        fields.same_prompt(asked, "chosen")
        prompt = asked
    if chosen == rejected:
        raise _same(fields)
    return prompt, chosen, rejected


def _same(fields: _Talk) -> UserError:
    return fields.wrong("chosen", f"the same as {fields.label('rejected')}", "two different answers")


def _split_messages(fields: _Talk, chosen: Any, rejected: Any) -> tuple[Conversation, str, str]:
    best, worst = fields.each(lambda: fields.messages("chosen", chosen), lambda: fields.messages("rejected", rejected))
    best, worst = fields.ends("chosen", best, "assistant"), fields.ends("rejected", worst, "assistant")
    if best[:-1] != worst[:-1]:
        expected = f"the messages of {fields.label('chosen')} up to the last answer"
        raise fields.wrong("rejected", "a different conversation", expected)
    return Conversation(fields.ends("chosen", best[:-1], "user")), best[-1].content, worst[-1].content


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and ANSWER in value


def _split_transcripts(fields: _Talk, chosen: Any, rejected: Any) -> tuple[Conversation, str, str]:
    """Two transcripts: the prompt is what they share, up to the last `Assistant:` of it."""
    best, worst = fields.each(lambda: fields.text("chosen", chosen), lambda: fields.text("rejected", rejected))
    best, worst = (text if text.startswith("\n\n") else "\n\n" + text.lstrip() for text in (best, worst))
    differs = next((i for i, (a, b) in enumerate(zip(best, worst, strict=False)) if a != b), min(len(best), len(worst)))
    end = best.rfind(ANSWER, 0, differs) + len(ANSWER)
    prompt = _turns(best[:end])
    if prompt is None:
        expected = "both to open with the same turns, \\n\\nHuman: ... \\n\\nAssistant:, or a field `prompt`"
        raise fields.wrong("chosen", f"{show(chosen)} and {fields.label('rejected')} {show(rejected)}", expected)
    answers = {"chosen": best[end:], "rejected": worst[end:]}
    best, worst = fields.each(*(partial(_last, fields, name, rest) for name, rest in answers.items()))
    return prompt, best, worst


def _last(fields: _Talk, name: str, rest: str) -> str:
    """The answer that a transcript ends with, after all that it shares with the other one."""
    if turns := TURN.findall(rest):
        found = "a transcript that ends with the human's turn"
        if turns[-1] == "Assistant":
            other = fields.label("rejected" if name == "chosen" else "chosen")
            found = f"a transcript that parts from {other} before its last answer"
        raise fields.wrong(name, found, "both to be the same up to the assistant's last answer; leave this row out")
    return fields.text(name, rest.strip())


def _rated(fields: _Talk) -> Rated:
    prompt = fields.prompt("prompt", fields.get("prompt")) if fields.has("prompt") else None
    text = fields.answer("text", fields.get("text"), prompt)
    if "ratings" not in fields:
        return Rated(prompt, text, (_rating(fields, "rating", fields.get("rating")),))
    values = fields.get("ratings")
    if isinstance(values, str):  # CSV brings a list as its JSON text
        with contextlib.suppress(json.JSONDecodeError):
            values = json.loads(values)
    if not isinstance(values, list) or not values:
        raise fields.wrong("ratings", show(values), "a list of at least one number; for a single one use `rating`")
    readings = (partial(_rating, fields, f"ratings[{n}]", value) for n, value in enumerate(values, 1))
    return Rated(prompt, text, tuple(fields.each(*readings)))


def _rating(fields: _Talk, name: str, value: Any) -> float:
    number, (low, high) = fields.number(name, value), fields.reading.scale
    if not low <= number <= high:
        raise fields.wrong(name, show(value), f"{low:g} to {high:g} (`data.ratings.scale`)")
    return number


def _judged(fields: _Talk) -> Judged:
    found, choice, rater = fields.each(
        lambda: _answers(fields),
        lambda: _choice(fields),
        lambda: fields.text("rater", fields.get("rater")),
    )
    for name, digest in (("pair", found.pair), ("digests", list(map(text_digest, found.answers)))):
        if fields.get(name) != digest:
            raise fields.wrong(name, "not of these texts", "those that were judged; restore the line, or remove it")
    return Judged(found.prompt, found.answers, choice, rater, found.pair, found.scores, found.models)


def _choice(fields: _Talk) -> str:
    choice = fields.get("choice")
    if choice not in CHOICES:
        raise fields.wrong("choice", show(choice), f"one of {', '.join(CHOICES)}")
    return str(choice)


def _answers(fields: _Talk) -> Compared:
    prompt = _asked(fields)
    answers = _two(fields, "answers", partial(_given, fields, prompt))
    if answers[0] == answers[1]:
        raise fields.wrong("answers", "the same text twice", "two different answers")
    scores = _two(fields, "scores", fields.number) if "scores" in fields else None
    return Compared(prompt, answers, scores, _two(fields, "models", fields.text) if "models" in fields else None)


def _given(fields: _Talk, prompt: Prompt, name: str, value: Any) -> str:
    """An answer as a model gave it; whether one may go on with the human's turn is for people to judge."""
    text = fields.answer(name, value, None)
    return text.strip() if isinstance(prompt, Conversation) else text


def _two(fields: _Talk, name: str, read: Callable[[str, Any], Value]) -> tuple[Value, Value]:
    values = fields.get(name)
    if not isinstance(values, list) or len(values) != 2:
        raise fields.wrong(name, show(values), "a list of two, one for each answer")
    first, second = fields.each(*(partial(read, f"{name}[{n}]", value) for n, value in enumerate(values, 1)))
    return first, second


def _asked(fields: _Talk) -> Prompt:
    talk = None
    if fields.has("messages"):
        messages = fields.messages("messages", fields.get("messages"))
        asked = messages[:-1] if messages[-1].role == "assistant" else messages
        talk = Conversation(fields.ends("messages", asked, "user"))
        fields.same_prompt(talk, "messages")
    if "instruction" in fields and "completion" not in fields:
        return _instruction(fields)
    if "prompt" not in fields and (talk or "chosen" in fields):
        return talk or _preference(fields).prompt
    return fields.prompt("prompt", fields.get("prompt"))


#: what reads the rows of each kind
SHAPE_OF: dict[str, Callable[[_Talk], Record]] = {
    "sft": _example,
    "preference": _preference,
    "ratings": _rated,
    "labels": _judged,
    "prompts": lambda fields: Asked(_asked(fields)),
}

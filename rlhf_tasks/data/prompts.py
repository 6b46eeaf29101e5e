"""What a model is asked, before any template: a plain text, an `Instruction`, or a `Conversation`.

The last message of a conversation is the user's. How a prompt is written for a model is a matter of the template
(encoding.py), which files it is read from of formats.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
ANSWER = "\n\nAssistant:"


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


def plain_text(prompt: Prompt) -> str:
    """The prompt without any template; a conversation is a transcript that ends with `Assistant:`."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Instruction):
        return f"{prompt.instruction}\n\n{prompt.input}" if prompt.input else prompt.instruction
    return "".join(f"\n\n{SPEAKERS[role]}: {text}" for role, text in prompt.messages) + ANSWER


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the fields of a row, from which it is read again."""
    if isinstance(prompt, Instruction):
        return prompt._asdict()
    return {"prompt": prompt if isinstance(prompt, str) else [message._asdict() for message in prompt.messages]}

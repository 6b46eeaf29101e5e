"""Prompts that a file repeats in front of its answers, as one does that keeps whole texts beside their prompts.

Trained on as they are, such rows would have every prompt twice. One row says little, as an answer to "Hi" may well
begin with "Hi"; but where most rows of a source do it, that is how the source writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_tasks.data.fields import Fields, Reading, renamed
from rlhf_tasks.data.texts import show

LOOKED_AT = 64
"""Rows at the beginning of a source that tell how it writes them."""
ECHO = 16
"""Characters of prompts, one or some, from which on they hardly come to stand in front of all answers by chance."""

#: the fields that may repeat the prompt; labels have none, as their answers are judged as they are
ANSWERS = {
    "sft": ("completion",),
    "preference": ("chosen", "rejected"),
    "ratings": ("text",),
    "labels": (),
    "prompts": (),
}


def repeats_prompts(rows: Iterable[Mapping[str, Any]], reading: Reading) -> bool:
    """Whether most of some rows repeat their prompt in front of all their answers; those without texts do not count."""
    count, repeated = 0, list[int]()
    for row in (renamed(row, reading.names) for row in rows):
        opens = _opens(row, reading)
        count += opens is not None
        repeated += [len(row["prompt"])] if opens else []
    return 2 * len(repeated) > count and sum(repeated) >= ECHO


def take_prompt_off(fields: Fields) -> None:
    """Take the prompt off the answers of a row whose source repeats it; of another source only note that it is there.

    Raises:
        UserError: the source repeats prompts, and this row does not.
    """
    opens = _opens(fields.row, fields.reading)
    if opens is None:
        return
    prompt = fields.row["prompt"]
    if not fields.reading.repeated:
        if opens and len(prompt) >= ECHO:
            fields.notes.append("kept prompts")
        return
    for name in ANSWERS[fields.reading.kind]:
        rest = _after(prompt, fields.row[name])
        if rest is None:
            expected = "it to open with its prompt, as most of its source do; list other shapes as another source"
            raise fields.wrong(name, show(fields.row[name]), expected)
        fields.row[name] = rest
    fields.notes.append("repeated prompts")


def _opens(row: Mapping[str, Any], reading: Reading) -> bool | None:
    """Whether all answers of a row open with its prompt; None where they are not all texts."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not ANSWERS[reading.kind] or not prompt.strip():
        return None
    opens = True
    for name in ANSWERS[reading.kind]:
        answer = row.get(name)
        if not isinstance(answer, str):
            return None
        opens = opens and _after(prompt, answer) is not None
    return opens


def _after(prompt: str, text: str) -> str | None:
    """What follows the prompt in a text that opens with it, give or take white space around it."""
    if text.startswith(prompt):
        return text[len(prompt) :]
    bare, text = prompt.strip(), text.lstrip()
    return text[len(bare) :] if text.startswith(bare) else None

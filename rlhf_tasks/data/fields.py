"""The fields of one row under our names, and the one way to complain about them, under the names of the user's file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_tasks.data.texts import listed, printable, show
from rlhf_tasks.errors import UserError

Kind = Literal["ratings", "sft", "preference", "labels", "prompts"]

#: the fields that a row of any kind may have, and what `fields` may name
FIELDS = (
    *("prompt", "completion", "instruction", "input", "output", "messages"),
    *("chosen", "rejected", "margin", "text", "rating", "ratings"),
)
#: those that a label has besides; nobody but `rlhf label` writes them
LABELLED = ("answers", "choice", "rater", "pair", "digests", "scores", "models")
SHAPES: dict[str, str] = {
    "sft": "`instruction`, `input` and `output`; or `prompt` and `completion`; or `messages`",
    "preference": "`prompt`, `chosen` and `rejected`; or `chosen` and `rejected` as whole transcripts or messages",
    "ratings": "`text` and `ratings` or `rating`, with or without `prompt`",
    "labels": "what `rlhf label` writes: `prompt`, `answers`, `choice`, `rater`, `pair`, `digests`",
    "prompts": "`prompt`; or the fields of an sft or preference row",
}

NOTES = {
    "repeated prompts": "rows repeat their prompt in front of every answer; it is taken off there",
    "kept prompts": "rows repeat their prompt in front of every answer; it stays, as most rows of their source do not",
    "no margin": "margins are NaN, and count as none",
}
"""What is said of rows that are read as something else than they say; how many they are goes before."""

OnNote = Callable[[str, str], None]
"""Told of every such row: where it stands, and which of the notes."""


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read.

    Attributes:
        scale: the lowest and the highest rating that can be (`data.ratings.scale`).
        names: what the source's files call a field, by our name of it; a dot goes into an object: `answer.text`.
        repeated: whether answers open with their prompt, which is then taken off.
    """

    kind: Kind
    scale: tuple[float, float]
    names: Mapping[str, str] = field(default_factory=dict)
    repeated: bool = False
    on_note: OnNote = lambda where, note: None


LABELS = Reading("labels", scale=(0, 0))  # nothing of a label is on the scale


class RowError(UserError):
    """The first thing that is wrong with a row, and what else is: `more`."""

    def __init__(self, first: UserError, more: list[UserError]) -> None:
        super().__init__(str(first))
        self.more = more


class Fields:
    """A row's fields; one that is null is not there. `notes` is what is to be said of how they were read."""

    def __init__(self, where: str, row: Mapping[str, Any], reading: Reading) -> None:
        self.where, self.reading, self._given = where, reading, row
        named = renamed(row, reading.names) if reading.names else row
        self.row = {name: value for name, value in named.items() if value is not None}
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.row

    def label(self, name: str) -> str:
        """A field as messages name it, `messages[2].role` say: by the user's own name of it, then by ours."""
        ours = re.split(r"\W", name, maxsplit=1)[0]
        theirs = self.reading.names.get(ours, ours)
        return f"`{name}`" if theirs == ours else f"`{printable(theirs)}{name[len(ours) :]}` (for `{ours}`)"

    def wrong(self, name: str, found: str, expected: str) -> UserError:
        return UserError(f"{self.where}: {self.label(name)} is {found}, expected {expected}")

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
            found = listed(name for name, value in self._given.items() if value is not None) or "no fields"
            shape = f"a row of kind {self.reading.kind} has {SHAPES[self.reading.kind]}"
            raise UserError(f"{self.where}: no {self.label(name)}; found {found}; {self._hint(name) or shape}")
        return self.row[name]

    def _hint(self, name: str) -> str:
        """What to do about a field that is not there because `fields` is wrong; or nothing."""
        absent = {ours: theirs for ours, theirs in self.reading.names.items() if not inside(self._given, theirs)}
        hint = next(filter(None, (swapped(*names, self._given) for names in absent.items())), "")
        return f"add it, or correct `fields` in `data.sources`{hint}" if name in absent or hint else ""

    def text(self, name: str, value: Any, *, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            raise self.wrong(name, show(value), "a text")
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
            raise self.wrong(name, show(value), "a finite number")
        return number


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row under our names; `names` gives what the row calls a field, which then counts for nothing else."""
    taken = set(names.values())
    kept = {name: value for name, value in row.items() if name not in taken and name not in names}
    return kept | {ours: value for ours, theirs in names.items() for value in inside(row, theirs)}


def swapped(ours: str, theirs: str, row: Mapping[str, Any]) -> str:
    """A hint, where `fields` looks to be the wrong way round for a row; else nothing."""
    if theirs in FIELDS and ours in row:
        return f": our name comes first, then yours; did you mean `{theirs}: {ours}`?"
    return ""


def inside(row: Mapping[str, Any], path: str) -> list[Any]:
    """The value at a field's name, or at a path of names; none where there is no such field."""
    if path in row:
        return [row[path]]
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return []
        value = value[name]
    return [value]

"""What must hold between rows: no duplicates, no contradictions, no text on both sides of the split.

Texts are compared by a fingerprint of their words, blind to white space, so that these sets stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, TypeVar

from rlhf_tasks.data.encoding import plain_text
from rlhf_tasks.data.formats import Conversation, Prompt

SALT = b"rlhf held-out split"


class Text(NamedTuple):
    """A rendered SFT row; `texts` holds the fingerprint of prompt and response together."""

    prompt: str
    response: str
    heldout: bool
    texts: tuple[bytes, ...]


class Pair(NamedTuple):
    """A rendered preference row; `texts` holds the fingerprints of prompt with chosen and with rejected."""

    prompt: str
    chosen: str
    rejected: str
    margin: float
    heldout: bool
    texts: tuple[bytes, ...]


class Ask(NamedTuple):
    """A rendered prompt; `texts` holds its fingerprint."""

    prompt: str
    heldout: bool
    texts: tuple[bytes, ...]


Row = TypeVar("Row", Text, Pair, Ask)


@dataclass
class Dropped:
    """Rows that were left out of one table, by reason."""

    duplicates: int = 0
    contradictions: int = 0
    leaks: int = 0


def fingerprint(text: str, salt: bytes = b"") -> bytes:
    """16 bytes that stand for a text's words."""
    return blake2b(" ".join(text.split()).encode(), digest_size=16, key=salt).digest()


def prompt_text(prompt: Prompt) -> str:
    """What a prompt asks, whatever shape it came in: a conversation of one turn is that turn's text."""
    if isinstance(prompt, Conversation) and len(prompt.messages) == 1:
        return prompt.messages[0].content
    return plain_text(prompt)


def whole_text(prompt: Prompt | None, response: str) -> bytes:
    """The fingerprint of a prompt with its response, before any template."""
    if prompt is None:
        return fingerprint(response)
    joint = "\n" if isinstance(prompt, Conversation) else ""
    return fingerprint(f"{prompt_text(prompt)}{joint}{response}")


def is_heldout(text: str, fraction: float) -> bool:
    """Which side of the split a text is on: a function of the text and the fraction alone.

    So it survives new rows and a new seed: a model of one seed never meets its held-out texts in training with another,
    and a greater fraction only moves texts from train to held-out.
    """
    return int.from_bytes(fingerprint(text, SALT)[:8], "big") < fraction * 2**64


def drop_duplicates(rows: Iterable[Row], dropped: Dropped) -> list[Row]:
    """The rows that do not repeat, to the character, an earlier one of their side; margins are not compared."""
    kept: dict[tuple[bool, tuple[str, ...]], Row] = {}
    for row in rows:
        if kept.setdefault((row.heldout, _identity(row)), row) is not row:
            dropped.duplicates += 1
    return list(kept.values())


def drop_contradictions(pairs: Sequence[Pair], dropped: Dropped) -> list[Pair]:
    """The pairs that no other pair turns round; of two that disagree neither is kept."""
    orders = {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}
    kept = [pair for pair in pairs if (pair.prompt, pair.rejected, pair.chosen) not in orders]
    dropped.contradictions += len(pairs) - len(kept)
    return kept


def drop_leaks(rows: Sequence[Row], heldout: set[bytes], dropped: Dropped) -> list[Row]:
    """The rows without those training rows that hold a held-out text."""
    kept = [row for row in rows if row.heldout or heldout.isdisjoint(row.texts)]
    dropped.leaks += len(rows) - len(kept)
    return kept


def heldout_texts(*tables: Sequence[Text | Pair | Ask]) -> set[bytes]:
    """The fingerprints of every text in the held-out rows of some tables."""
    return {text for rows in tables for row in rows if row.heldout for text in row.texts}


def _identity(row: Text | Pair | Ask) -> tuple[str, ...]:
    if isinstance(row, Text):
        return row.prompt, row.response
    return (row.prompt, row.chosen, row.rejected) if isinstance(row, Pair) else (row.prompt,)

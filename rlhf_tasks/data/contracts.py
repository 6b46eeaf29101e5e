"""What must hold between rows: no duplicates, no contradictions, no text on both sides of the split.

Texts are compared by digests of their words, blind to white space and to how an accented letter is put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_tasks.data.prompts import Conversation, Prompt, plain_text
from rlhf_tasks.data.spill import DIGEST_BYTES, Ask, Pair, Spill, Text, first_like
from rlhf_tasks.data.texts import normal

SALT = b"rlhf held-out split"
Twin = tuple[Spill[Any], npt.NDArray[np.int64]]
"""For some dropped rows, the rows that they are in conflict with, and whose these are."""


@dataclass
class Dropped:
    """Rows that were left out of one table, by reason: each `[rows]`, beside what each of them is in conflict with."""

    duplicates: list[tuple[npt.NDArray[np.int64], Twin]] = field(default_factory=list)
    contradictions: list[tuple[npt.NDArray[np.int64], Twin]] = field(default_factory=list)
    leaks: list[tuple[npt.NDArray[np.int64], Twin]] = field(default_factory=list)
    pooled: int = 0

    def counts(self) -> dict[str, int]:
        """How many, by reason; ratings of one text that were pooled count as duplicates."""
        found = {name: sum(len(rows) for rows, _ in getattr(self, name)) for name in REASONS}
        return found | {"duplicates": found["duplicates"] + self.pooled}


REASONS = ("duplicates", "contradictions", "leaks")


def fingerprint(text: str, salt: bytes = b"") -> bytes:
    """16 bytes that stand for a text's words."""
    return blake2b(normal(text).encode(), digest_size=DIGEST_BYTES, key=salt).digest()


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


def drop_duplicates(table: Spill[Any], dropped: Dropped) -> None:
    """Drop the rows that repeat the texts of an earlier one of their side; margins are not compared."""
    rows = np.flatnonzero(table.kept)
    first = rows[first_like(np.column_stack([table.heldout[rows].astype(np.uint64), table.identities[rows]]))]
    _drop(table, rows[first != rows], (table, first[first != rows]), dropped.duplicates)


def same_words(pairs: Spill[Pair]) -> npt.NDArray[np.bool_]:
    """Which pairs have answers that differ in white space alone, `[rows]`."""
    same: npt.NDArray[np.bool_] = (pairs.identities == pairs.reversals).all(axis=1)
    return same


def drop_contradictions(pairs: Spill[Pair], dropped: Dropped) -> None:
    """Drop the pairs that another pair turns round; of two that disagree neither is kept.

    A pair whose answers differ in white space alone, as code may, is the same turned round, and is no contradiction.
    """
    rows = np.flatnonzero(pairs.kept & ~same_words(pairs))
    found = first_like(np.concatenate([pairs.identities[rows], pairs.reversals[rows]]))[len(rows) :]
    turned = found < len(rows)
    _drop(pairs, rows[turned], (pairs, rows[found[turned]]), dropped.contradictions)


def drop_leaks(table: Spill[Any], others: Sequence[Spill[Any]], dropped: Dropped) -> None:
    """Drop the training rows of a table that hold a text of a held-out row in one of some tables."""
    for other in others:
        held, rows = np.flatnonzero(other.kept & other.heldout), np.flatnonzero(table.kept & ~table.heldout)
        known, texts = other.texts[held], table.texts[rows]
        found = first_like(np.concatenate([known.reshape(-1, 2), texts.reshape(-1, 2)]))[held.size * known.shape[1] :]
        nearest = found.reshape(texts.shape[:2]).min(axis=1)
        leaks = nearest < held.size * known.shape[1]
        _drop(table, rows[leaks], (other, held[nearest[leaks] // known.shape[1]]), dropped.leaks)


def clean(sft: Spill[Text], pairs: Spill[Pair], prompts: Spill[Ask], dropped: dict[str, Dropped]) -> None:
    """Duplicates first: what is left is compared for contradictions, and what of that is left, across the split."""
    for name, table in (("sft", sft), ("pairs", pairs), ("prompts", prompts)):
        drop_duplicates(table, dropped[name])
    drop_contradictions(pairs, dropped["pairs"])
    drop_leaks(sft, (sft, pairs), dropped["sft"])
    drop_leaks(pairs, (sft, pairs), dropped["pairs"])
    drop_leaks(prompts, (prompts,), dropped["prompts"])


def _drop(
    table: Spill[Any],
    rows: npt.NDArray[np.int64],
    twin: Twin,
    into: list[tuple[npt.NDArray[np.int64], Twin]],
) -> None:
    table.kept[rows] = False
    into.append((rows, twin))

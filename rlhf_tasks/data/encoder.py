"""Rows into the cells of the prepared tables: the shared encoding, with the counts that the summary needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from rlhf_tasks.data.encoding import cut_left, encode_prompts, encode_responses
from rlhf_tasks.data.spill import Ask, Pair, Text
from rlhf_tasks.data.summary import Lengths, PairNumbers
from rlhf_tasks.data.tables import TOKENS
from rlhf_tasks.errors import UserError

MASK = pa.list_(pa.int8())
SCHEMAS: dict[str, pa.Schema] = {
    "sft": pa.schema({"prompt": pa.string(), "response": pa.string(), "prompt_ids": TOKENS, "response_ids": TOKENS}),
    "pairs": pa.schema(
        {
            "prompt": pa.string(),
            "chosen": pa.string(),
            "rejected": pa.string(),
            "input_ids_chosen": TOKENS,
            "attention_mask_chosen": MASK,
            "input_ids_rejected": TOKENS,
            "attention_mask_rejected": MASK,
            "margin": pa.float32(),
        }
    ),
    "prompts": pa.schema({"prompt": pa.string(), "asked": pa.string(), "input_ids": TOKENS}),
}

#: the answers that a row of each kind has
ANSWERS = {"sft": ("response",), "pairs": ("chosen", "rejected"), "prompts": ()}

Cells = dict[str, Any]
OnCut = Callable[[str, str, int], None]
"""Told of every text that is cut: where its row stands, its column, and its tokens before."""

OnFault = Callable[[str, UserError], None]
"""Told of every row that is wrong: where it stands, and why. If it returns, the row is left out."""


def stop_at(where: str, error: UserError) -> None:
    """Let the first wrong row be the end."""
    raise error if where in str(error) else UserError(f"{where}: {error}") from None


@dataclass
class Encoder:
    """The one encoding of some settings, with the counts of one table."""

    tokenizer: PreTrainedTokenizerBase
    markup: bool
    max_prompt: int
    max_response: int
    on_cut: OnCut = lambda where, column, tokens: None
    on_fault: OnFault = stop_at
    lengths: dict[str, Lengths] = field(default_factory=dict)
    balance: PairNumbers = field(default_factory=PairNumbers)
    same_after_cut: int = 0

    def fresh(self) -> Encoder:
        """The same encoding with counts of its own."""
        return Encoder(self.tokenizer, self.markup, self.max_prompt, self.max_response, self.on_cut, self.on_fault)

    def cells(self, kind: str, rows: Sequence[Any]) -> list[Cells]:
        """The cells of some rows of one kind; pairs whose answers became the same by being cut are left out.

        Raises:
            UserError: the tokenizer makes nothing of a prompt, or EOS of a text.
        """
        try:
            prompts, *answers = self._encode(kind, rows)
        except UserError as error:
            if len(rows) > 1:  # which of them?
                return [cells for row in rows for cells in self.cells(kind, [row])]
            self.on_fault(rows[0].where, error)
            return []
        make: dict[str, Callable[..., Cells | None]]
        make = {"sft": self._sft, "pairs": self._pair, "prompts": self._prompt}
        found = [make[kind](row, *ids) for row, *ids in zip(rows, prompts, *answers, strict=True)]
        return [cells for cells in found if cells is not None]

    def _encode(self, kind: str, rows: Sequence[Any]) -> list[list[list[int]]]:
        """Ids of the prompts and of each kind of answer, uncut: what cuts an answer to its limit takes its EOS too."""
        prompts = encode_prompts(self.tokenizer, [row.prompt for row in rows], sys.maxsize, markup=self.markup)
        answers = ([getattr(row, column) for row in rows] for column in ANSWERS[kind])
        return [prompts, *(encode_responses(self.tokenizer, texts, sys.maxsize) for texts in answers)]

    def _prompt(self, row: Ask, prompt: list[int]) -> Cells:
        return {"prompt": row.prompt, "asked": row.asked, "input_ids": self._cut("prompt", prompt, row)}

    def _sft(self, row: Text, prompt: list[int], response: list[int]) -> Cells:
        ids = self._cut("prompt", prompt, row), self._cut("response", response, row)
        return dict(zip(SCHEMAS["sft"].names, (row.prompt, row.response, *ids), strict=True))

    def _pair(self, row: Pair, prompt: list[int], chosen: list[int], rejected: list[int]) -> Cells | None:
        question = self._cut("prompt", prompt, row)
        if chosen[: self.max_response] == rejected[: self.max_response]:
            self.same_after_cut += 1
            return None
        answers = self._cut("chosen", chosen, row), self._cut("rejected", rejected, row)
        self.balance.add(len(chosen), len(rejected), row.margin)
        best, worst = (question + answer for answer in answers)
        values = (row.prompt, row.chosen, row.rejected, best, [1] * len(best), worst, [1] * len(worst), row.margin)
        return dict(zip(SCHEMAS["pairs"].names, values, strict=True))

    def _cut(self, column: str, ids: list[int], row: Text | Pair | Ask) -> list[int]:
        """Count the tokens of a text and cut it: a prompt loses its beginning, an answer its end."""
        limit = self.max_prompt if column == "prompt" else self.max_response
        self.lengths.setdefault(column, Lengths(limit)).add(len(ids))
        if len(ids) <= limit:
            return ids
        self.on_cut(row.where, column, len(ids))
        return cut_left(ids, limit, self.tokenizer.bos_token_id) if column == "prompt" else ids[:limit]

"""The `prepare` stage: human feedback as it is found becomes three encoded data sets, each split in two.

    sources -> records -> rendered rows, each on its side of the split -> cleaned -> tokenizer -> Arrow files

Every row is written with the ids of the one encoding (encoding.py), so that no later stage tokenizes what it trains on.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from rlhf_tasks.base import check_lengths, check_vocabulary, find_base, load_settings, positions
from rlhf_tasks.data.contracts import Pair, Text
from rlhf_tasks.data.encoding import (
    choose_template,
    cut_left,
    encode_prompts,
    encode_responses,
    fixed_strings,
    load_tokenizer,
    train_tokenizer,
)
from rlhf_tasks.data.feedback import Feedback
from rlhf_tasks.data.formats import parse_row
from rlhf_tasks.data.sources import read_rows
from rlhf_tasks.data.summary import Lengths, PairNumbers
from rlhf_tasks.data.tables import BATCH_ROWS, TOKENS, write_table
from rlhf_tasks.errors import UserError

if TYPE_CHECKING:
    from rlhf_tasks import config

Progress = Callable[..., None]
"""Called by name with `done` and `total`, in rows, and any other numbers."""

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
    "prompts": pa.schema({"prompt": pa.string(), "input_ids": TOKENS}),
}

Cells = dict[str, Any]
Tables = dict[tuple[str, str], Sequence[Any]]
"""Rows by kind (sft, pairs, prompts) and side (train, heldout)."""


def run(*, seed: int, data: config.Data, model: config.Model, out: Path, progress: Progress) -> dict[str, float]:
    """Prepare all data under `out`, and return the number of rows by kind and side, as `sft_train`.

    Writes `{sft,pairs,prompts}/{train,heldout}.arrow` (columns: `SCHEMAS`), `tokenizer/` and `metrics.json`, all of
    them functions of the arguments and the sources alone. The seed draws openings and pairs; it leaves the split alone.

    Raises:
        UserError: a source, a row, the tokenizer or what is left of the data is not as it must be.
    """
    if not any(source.kind in ("preference", "ratings") for source in data.sources):
        raise UserError("`data.sources`: no source of kind preference or ratings; the reward model learns from those")
    tokenizer = _base_tokenizer(model, data)
    template = choose_template(data.template, tokenizer)
    feedback = Feedback(template, tokenizer, data.heldout)
    rows_read = _read(data, feedback)
    feedback.finish(seed, data.ratings)
    tables = _split(feedback, data)
    if tokenizer is None:
        texts = [text for row in tables["sft", "train"] for text in (row.prompt, row.response)]
        if any(source.kind == "preference" for source in data.sources):
            # Else what people rejected, which SFT never sees, falls into more tokens, and that gives it away.
            # (The texts of rated pairs are SFT's own.)
            texts += [row.rejected for row in tables["pairs", "train"]]
        tokenizer = train_tokenizer(texts, model.scratch.vocab_size, fixed_strings(template))
    tokenizer.save_pretrained(out / "tokenizer")
    encoder = Encoder(tokenizer, template == "chat", data.max_prompt_tokens, data.max_response_tokens)
    counts, numbers = _write(tables, encoder, data, out, progress)
    details = {
        "rows": rows_read,
        "dropped": {kind: asdict(dropped) for kind, dropped in feedback.dropped.items()},
        "too_short": feedback.too_short,
        "vocabulary": len(tokenizer),
        **numbers,
    }
    summary = {**counts, "details": details}
    (out / "metrics.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return counts


def _base_tokenizer(model: config.Model, data: config.Data) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a base that all later stages can use; None where there is none but one to be trained.

    Raises:
        UserError: they cannot; said here, because here nothing has been trained yet.
    """
    if (base := find_base(model)) is None:
        return None
    settings = load_settings(base)
    tokenizer = load_tokenizer(base)
    check_vocabulary(base, settings.get_text_config().vocab_size, tokenizer)
    check_lengths(model.base, positions(settings), data)
    return tokenizer


def _read(data: config.Data, feedback: Feedback) -> dict[str, int]:
    """Every row of every source into `feedback`; the number of rows by source, named without its folder."""
    counts: dict[str, int] = {}
    for source in data.sources:
        name = unique = source.hub or Path(str(source.path)).name
        while unique in counts:
            unique = f"{name} ({sum(known.startswith(name) for known in counts) + 1})"
        counts[unique] = 0
        for where, row in read_rows(source):
            if isinstance(row, UserError):
                raise row
            record = parse_row(where, row, source.kind, data.ratings.scale)
            try:
                feedback.add(record)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            counts[unique] += 1
    return counts


def _split(feedback: Feedback, data: config.Data) -> Tables:
    kinds: dict[str, Sequence[Any]] = {"sft": feedback.sft, "pairs": feedback.pairs, "prompts": feedback.prompts}
    tables: Tables = {}
    for kind, rows in kinds.items():
        for side in ("train", "heldout"):
            tables[kind, side] = [row for row in rows if row.heldout == (side == "heldout")]
            _check(kind, side, len(tables[kind, side]), data)
    return tables


def _check(kind: str, side: str, rows: int, data: config.Data) -> None:
    if rows == 0:
        change = "raise" if side == "heldout" else "lower"
        gap = f", lower `data.ratings.min_gap` ({data.ratings.min_gap:g})" if kind == "pairs" else ""
        raise UserError(
            f"no rows are left for {kind}/{side}; {change} `data.heldout` ({data.heldout:g}){gap}, or add data"
        )


@dataclass
class Encoder:
    """Rows into cells: the shared encoding, with the counts that the summary needs of one table."""

    tokenizer: PreTrainedTokenizerBase
    markup: bool
    max_prompt: int
    max_response: int
    lengths: dict[str, Lengths] = field(default_factory=lambda: defaultdict(Lengths))
    balance: PairNumbers = field(default_factory=PairNumbers)
    same_after_cut: int = 0

    def fresh(self) -> Encoder:
        """The same encoding with counts of its own."""
        return Encoder(self.tokenizer, self.markup, self.max_prompt, self.max_response)

    def cells(self, kind: str, rows: Sequence[Any]) -> list[Cells]:
        """The cells of some rows of one kind; pairs whose answers became the same by being cut are left out."""
        prompts = self._prompts([row.prompt for row in rows])
        if kind == "sft":
            return self._sft(rows, prompts)
        if kind == "pairs":
            return self._pairs(rows, prompts)
        return [{"prompt": row.prompt, "input_ids": ids} for row, ids in zip(rows, prompts, strict=True)]

    def _sft(self, rows: Sequence[Text], prompts: list[list[int]]) -> list[Cells]:
        cells = []
        responses = encode_responses(self.tokenizer, [row.response for row in rows], self.max_response)
        for row, prompt, response in zip(rows, prompts, responses, strict=True):
            self._count("response", response)
            values = (row.prompt, row.response, prompt, response)
            cells.append(dict(zip(SCHEMAS["sft"].names, values, strict=True)))
        return cells

    def _pairs(self, rows: Sequence[Pair], prompts: list[list[int]]) -> list[Cells]:
        cells = []
        best = encode_responses(self.tokenizer, [row.chosen for row in rows], self.max_response)
        worst = encode_responses(self.tokenizer, [row.rejected for row in rows], self.max_response)
        for row, prompt, chosen, rejected in zip(rows, prompts, best, worst, strict=True):
            if chosen == rejected:
                self.same_after_cut += 1
                continue
            self._count("chosen", chosen)
            self._count("rejected", rejected)
            self.balance.add(len(chosen), len(rejected), row.margin)
            sides = [prompt + chosen, prompt + rejected]
            (ids_chosen, mask_chosen), (ids_rejected, mask_rejected) = ((ids, [1] * len(ids)) for ids in sides)
            values = (ids_chosen, mask_chosen, ids_rejected, mask_rejected, row.margin)
            names = SCHEMAS["pairs"].names
            cells.append(dict(zip(names, (row.prompt, row.chosen, row.rejected, *values), strict=True)))
        return cells

    def _prompts(self, texts: list[str]) -> list[list[int]]:
        whole = encode_prompts(self.tokenizer, texts, sys.maxsize, markup=self.markup)
        for ids in whole:
            self.lengths["prompt"].add(min(len(ids), self.max_prompt), cut=len(ids) > self.max_prompt)
        return [cut_left(ids, self.max_prompt, self.tokenizer.bos_token_id) for ids in whole]

    def _count(self, column: str, ids: list[int]) -> None:
        self.lengths[column].add(len(ids), cut=ids[-1] != self.tokenizer.eos_token_id)


def _write(
    tables: Tables, encoder: Encoder, data: config.Data, out: Path, progress: Progress
) -> tuple[dict[str, float], dict[str, Any]]:
    """All tables to their files; the rows written by kind and side, and the summary's numbers of them."""
    total, done = sum(len(rows) for rows in tables.values()), 0
    counts: dict[str, float] = {}
    numbers: dict[str, Any] = {"tokens": {}, "balance": {}, "same_after_cut": {}}

    def encoded(kind: str, rows: Sequence[Any], encoder: Encoder) -> Iterator[Cells]:
        nonlocal done
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            yield from encoder.cells(kind, batch)
            done += len(batch)
            progress(done=done, total=total)

    for (kind, side), rows in tables.items():
        counter, name = encoder.fresh(), f"{kind}_{side}"
        path = out / kind / f"{side}.arrow"
        counts[name] = write_table(path, encoded(kind, rows, counter), SCHEMAS[kind])
        _check(kind, side, int(counts[name]), data)
        numbers["tokens"][name] = {column: lengths.numbers() for column, lengths in counter.lengths.items()}
        if kind == "pairs":
            numbers["balance"][name] = counter.balance.numbers()
            numbers["same_after_cut"][name] = counter.same_after_cut
    return counts, numbers

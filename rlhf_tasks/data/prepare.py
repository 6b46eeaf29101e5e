"""The `prepare` stage: human feedback as it is found becomes three encoded data sets, each split in two.

    sources -> records -> rendered rows, each on its side of the split -> cleaned -> tokenizer -> Arrow files

Every row is written with the ids of the one encoding (encoding.py), so that no later stage tokenizes what it trains on.
The steps are shared with `rlhf data check` (check.py), which goes on where this stops.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from rlhf_tasks.base import check_lengths, check_vocabulary, find_base, known_positions, load_settings
from rlhf_tasks.data.encoder import SCHEMAS, Cells, Encoder, OnFault, stop_at
from rlhf_tasks.data.encoding import (
    Template,
    choose_template,
    fixed_strings,
    load_tokenizer,
    train_tokenizer,
)
from rlhf_tasks.data.feedback import KINDS, SIDES, Feedback
from rlhf_tasks.data.fields import NOTES, OnNote, Reading
from rlhf_tasks.data.formats import Record, parse_row
from rlhf_tasks.data.repeats import LOOKED_AT, repeats_prompts
from rlhf_tasks.data.sources import Meter, read_rows, source_name
from rlhf_tasks.data.tables import write_table
from rlhf_tasks.errors import UserError

if TYPE_CHECKING:
    from rlhf_tasks import config

log = logging.getLogger(__name__)

Progress = Callable[..., None]
"""Called by name with `done` and `total`, in rows, and any other numbers."""

PASSES = 6
"""Steps that a row that is read is likely to take: read, twice learnt from, encoded as pair, SFT row and prompt."""


def run(*, seed: int, data: config.Data, model: config.Model, out: Path, progress: Progress) -> dict[str, float]:
    """Prepare all data under `out`, and return the number of rows by kind and side, as `sft_train`.

    Writes `{sft,pairs,prompts}/{train,heldout}.arrow` (columns: `SCHEMAS`), `tokenizer/` and `metrics.json`, all of
    them functions of the arguments and the sources alone. The seed draws openings and pairs; it leaves the split alone.
    Rows wait on disk beside the result, so that memory does not grow with their length.

    Raises:
        UserError: a source, a row, the tokenizer or what is left of the data is not as it must be.
    """
    check_kinds(data)
    tokenizer, template = open_tokenizer(data, model)
    check_lengths(model.base, known_positions(model), data)
    steps, noted = Steps(progress, Meter.of(data.sources)), Counter[str]()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rows-", dir=out) as folder:
        feedback = Feedback(template, tokenizer, data.heldout, Path(folder))
        rows_read = read_all(data, feedback, steps, on_note=lambda where, note: noted.update([note]))
        feedback.finish(seed, data.ratings)
        for kind, side in TABLES:
            check_rows(kind, side, int(feedback.wanted(kind, side).sum()), data, feedback)
        steps.settle(feedback, learnt=TAUGHT if tokenizer is None else ())
        tokenizer = tokenizer or learn_tokenizer(feedback, data, model, template, steps)
        tokenizer.save_pretrained(out / "tokenizer")
        encoder = Encoder(tokenizer, template == "chat", data.max_prompt_tokens, data.max_response_tokens)
        counts, numbers = _write(feedback, encoder, data, out, steps)
    details = {
        "rows": rows_read,
        "noted": dict(noted),
        "dropped": {kind: dropped.counts() for kind, dropped in feedback.dropped.items()},
        "too_short": feedback.too_short,
        "undecided": len(feedback.undecided),
        "vocabulary": len(tokenizer),
        **numbers,
    }
    summary = {**counts, "details": details}
    (out / "metrics.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for note, rows in noted.items():
        log.warning("prepare: %s %s", f"{rows:,}", NOTES[note])
    if said := cut_sentence(counts, numbers["tokens"], data):
        log.warning("prepare: %s", said)
    return counts


TAUGHT = ("sft", "pairs")
"""What a tokenizer is trained on, of the training side."""
TABLES = [(kind, side) for kind in KINDS for side in SIDES]


@dataclass
class Steps:
    """How far it is, in steps of a row; while rows are read, how many there will be is taken from the bytes left."""

    progress: Progress
    meter: Meter
    done: int = 0
    total: int = 0

    EVERY = 1024

    def read(self) -> None:
        """A row has been read."""
        self.done += 1
        if self.done % self.EVERY == 0:
            self.progress(done=self.done, total=PASSES * max(self.done, round(self.done / self.meter.fraction)))

    def settle(self, feedback: Feedback, learnt: Sequence[str]) -> None:
        """All are read: what is left is known.

        Args:
            learnt: the kinds of rows that a tokenizer will be trained on.
        """
        self.total = self.done + sum(int(table.kept.sum()) for table in feedback.tables.values())
        self.total += sum(int(feedback.taught(kind).sum()) for kind in learnt)

    def passed(self, rows: int) -> None:
        """Some rows have been learnt from or encoded."""
        self.done += rows
        self.progress(done=self.done, total=self.total)


def check_kinds(data: config.Data) -> None:
    """Raises a `UserError` if no source can teach the reward model."""
    if not any(source.kind in ("preference", "ratings", "labels") for source in data.sources):
        kinds = "preference, ratings or labels"
        raise UserError(f"`data.sources`: no source of kind {kinds}; the reward model learns from those")


def check_rows(kind: str, side: str, rows: int, data: config.Data, feedback: Feedback) -> None:
    """Raises a `UserError` if nothing is left of a table, that says why."""
    if rows:
        return
    table, held = feedback.tables[kind], side == "heldout"
    made, kept = int((table.heldout == held).sum()), int(feedback.wanted(kind, side).sum())
    close = kind == "pairs" and held in feedback.too_close
    gap = f"lower `data.ratings.min_gap` ({data.ratings.min_gap:g})"
    if kept:
        limit = f"`data.max_response_tokens` ({data.max_response_tokens})"
        why = f"the two answers of all {kept:,} became the same by being cut; raise {limit}"
    elif made:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in feedback.dropped[kind].counts().items() if n)
        why = f"all {made:,} were left out ({reasons} on both sides together); `rlhf data check` names them"
    elif len(table):
        why = f"{'raise' if held else 'lower'} `data.heldout` ({data.heldout:g})" + f", {gap}" * close + ", or add data"
    elif close:
        why = f"no two ratings of texts that make a pair are far enough apart; {gap}, or add data"
    elif kind == "pairs" and not any(source.kind == "preference" for source in data.sources):
        why = "no two rated texts share a prompt, or an opening, and differ in their rating; add data"
    else:
        why = "no source gives any; add data"
    raise UserError(f"no rows are left for {kind}/{side}: {why}")


def cut_sentence(counts: Mapping[str, float], tokens: Mapping[str, Any], data: config.Data) -> str:
    """What a run says of texts that are cut: of any answer, and of prompts where it is most of them; or nothing.

    Args:
        counts: rows by table.
        tokens: the summary's numbers by table and column.
    """
    cut, rows = Counter[str](), Counter[str]()
    for table, columns in tokens.items():
        for column, numbers in columns.items():
            what = "prompts" if column == "prompt" else "answers"
            cut[what] += round(numbers["share_cut"] * counts[table])
            rows[what] += int(counts[table])
    share = {what: cut[what] / count for what, count in rows.items()}
    said = []
    if share["answers"]:
        lost = f"lose their end and EOS (`data.max_response_tokens: {data.max_response_tokens}`)"
        said.append(f"{100 * share['answers']:.3g} % of the answers {lost}")
    if share["prompts"] > 0.5:
        lost = f"lose their beginning (`data.max_prompt_tokens: {data.max_prompt_tokens}`)"
        said.append(f"{100 * share['prompts']:.0f} % of the prompts {lost}")
    return f"{' and '.join(said)}; `rlhf data check` says which" if said else ""


def open_tokenizer(data: config.Data, model: config.Model) -> tuple[PreTrainedTokenizerBase | None, Template]:
    """The model's tokenizer, None where one is still to be trained, and the template that the settings mean for it.

    Raises:
        UserError: later stages cannot use the base; said here, because here nothing has been trained yet.
    """
    if (base := find_base(model)) is None:
        return None, choose_template(data.template, None)
    settings = load_settings(base)
    tokenizer = load_tokenizer(base)
    check_vocabulary(base, settings.get_text_config().vocab_size, tokenizer)
    return tokenizer, choose_template(data.template, tokenizer)


def read_all(
    data: config.Data,
    feedback: Feedback,
    steps: Steps,
    on_fault: OnFault = stop_at,
    on_record: Callable[[str, Record], None] = lambda where, record: None,
    on_note: OnNote = lambda where, note: None,
) -> dict[str, int]:
    """Every row of every source into `feedback`; the number of good rows by source, named without its folder.

    Args:
        on_fault: what becomes of a row, or a file, that is wrong.
        on_record: shown every good row.
    """
    counts: dict[str, int] = {}
    for source in data.sources:
        name = unique = Path(source_name(source)).name if source.hub is None else source_name(source)
        while unique in counts:
            unique = f"{name} ({sum(known.startswith(name) for known in counts) + 1})"
        counts[unique] = 0
        rows = read_rows(source, steps.meter)
        first = list(islice(rows, LOOKED_AT))
        reading = Reading(source.kind, data.ratings.scale, source.fields, on_note=on_note)
        repeated = repeats_prompts((row for _, row in first if isinstance(row, dict)), reading)
        reading = replace(reading, repeated=repeated)
        for where, row in chain(first, rows):
            steps.read()
            try:
                if isinstance(row, UserError):
                    raise row
                record = parse_row(where, row, reading)
                feedback.add(where, record)
            except UserError as error:
                on_fault(where, error)
                continue
            on_record(where, record)
            counts[unique] += 1
    return counts


def learn_tokenizer(
    feedback: Feedback, data: config.Data, model: config.Model, template: Template, steps: Steps
) -> PreTrainedTokenizerBase:
    """A tokenizer of the training texts."""

    def texts() -> Iterator[str]:
        for rows in feedback.sft.batches(feedback.taught("sft")):
            for row in rows:
                yield from (row.prompt, row.response)
            steps.passed(len(rows))
        # Else what people rejected, which SFT never sees, falls into more tokens, and that gives it away.
        # (The texts of rated pairs are SFT's own.)
        rejected = any(source.kind == "preference" for source in data.sources)
        for pairs in feedback.pairs.batches(feedback.taught("pairs")):
            yield from (pair.rejected for pair in pairs if rejected)
            steps.passed(len(pairs))

    return train_tokenizer(texts(), model.scratch.vocab_size, fixed_strings(template))


def encode_all(
    feedback: Feedback, encoder: Encoder, steps: Steps
) -> Iterator[tuple[str, str, Encoder, Iterator[Cells]]]:
    """Table after table: kind, side, the encoder that counts it, and its rows, encoded as they are asked for."""

    def encoded(kind: str, side: str, counter: Encoder) -> Iterator[Cells]:
        for rows in feedback.tables[kind].batches(feedback.wanted(kind, side)):
            yield from counter.cells(kind, rows)
            steps.passed(len(rows))

    for kind, side in TABLES:
        counter = encoder.fresh()
        yield kind, side, counter, encoded(kind, side, counter)


def table_numbers(kind: str, counter: Encoder) -> dict[str, Any]:
    """What the summary says of one table: its tokens; of pairs also the balance, and how many became the same."""
    numbers: dict[str, Any] = {"tokens": {column: lengths.numbers() for column, lengths in counter.lengths.items()}}
    if kind == "pairs":
        numbers |= {"balance": counter.balance.numbers(), "same_after_cut": counter.same_after_cut}
    return numbers


def _write(
    feedback: Feedback, encoder: Encoder, data: config.Data, out: Path, steps: Steps
) -> tuple[dict[str, float], dict[str, Any]]:
    """All tables to their files; the rows written by kind and side, and the summary's numbers of them."""
    counts: dict[str, float] = {}
    numbers: dict[str, Any] = {"tokens": {}, "balance": {}, "same_after_cut": {}}
    for kind, side, counter, cells in encode_all(feedback, encoder, steps):
        name = f"{kind}_{side}"
        counts[name] = write_table(out / kind / f"{side}.arrow", cells, SCHEMAS[kind])
        check_rows(kind, side, int(counts[name]), data, feedback)
        for group, number in table_numbers(kind, counter).items():
            numbers[group][name] = number
    return counts, numbers

"""`rlhf data check`: everything that is wrong with the data, before any training.

It takes the steps of `prepare` and writes none of its results: where `prepare` stops at the first fault, this goes on.
A *problem* is what `prepare` refuses; a *remark* is what it puts up with: rows it leaves out, texts it cuts.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_tasks.base import check_lengths, known_positions
from rlhf_tasks.data.contracts import REASONS, fingerprint, is_heldout, prompt_text, same_words
from rlhf_tasks.data.encoder import Encoder
from rlhf_tasks.data.encoding import Template
from rlhf_tasks.data.feedback import SIDES, Feedback
from rlhf_tasks.data.fields import NOTES
from rlhf_tasks.data.formats import Example, Preference, Rated, Record
from rlhf_tasks.data.near import NearCopy, NearTexts
from rlhf_tasks.data.prepare import (
    TABLES,
    TAUGHT,
    Progress,
    Steps,
    check_kinds,
    check_rows,
    encode_all,
    learn_tokenizer,
    open_tokenizer,
    read_all,
    table_numbers,
)
from rlhf_tasks.data.prompts import Conversation
from rlhf_tasks.data.sources import Meter
from rlhf_tasks.data.spill import first_like
from rlhf_tasks.errors import UserError

if TYPE_CHECKING:
    from rlhf_tasks import config

PLACES = 1000
"""Places that a remark names; how many there are is counted in full."""

BIASED = 0.65
"""Share of pairs with the longer answer chosen, or rejected, from which on a reward model could live off length."""
BIASED_PAIRS = 50
"""Fewer pairs than this say nothing of it."""

SAID = {
    "duplicates": "repeat an earlier row; `prepare` keeps the first",
    "contradictions": "are turned round by another pair; `prepare` keeps neither",
    "leaks": "hold a held-out text; `prepare` keeps the held-out row only",
}


@dataclass(frozen=True)
class Problem:
    """What `prepare` refuses, and where it stands: a file and line, a file, or a key of params.yaml."""

    where: str
    message: str

    @property
    def file(self) -> str:
        head, _, tail = self.where.rpartition(":")
        return head if tail.removeprefix("row ").isdigit() else self.where

    def order(self) -> tuple[int, str, bool]:
        """Where it is told of: causes first, so a file before its rows, and what follows from all that last."""
        rank = {"params.yaml": 0, "data.sources": 2}.get(self.where, 1)
        return rank, self.file, self.where != self.file


@dataclass(frozen=True)
class Remark:
    """What `prepare` puts up with: of how many rows, in which files, and the first of their places."""

    name: str
    message: str
    rows: int
    files: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, name: str, message: str, where: list[str], places: Iterable[str] | None = None) -> Remark:
        """A remark on the rows at some places."""
        files = Counter(Problem(place, "").file for place in where if place)
        return cls(name, message, len(where), dict(sorted(files.items())), list(places or where)[:PLACES])


@dataclass
class Report:
    """All that was found.

    Attributes:
        rows: good rows by source, as metrics/prepare.json counts them.
        tables: by table (`sft_train`) its rows, tokens a column, the longest before it is cut, the balance of pairs.
    """

    rows: dict[str, int] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)

    def add(self, where: str, error: UserError) -> None:
        """Take a row's or a file's error, with all that it has to say."""
        for one in (error, *getattr(error, "more", [])):
            text = str(one)
            self.problems.append(Problem(where, text if where in text else f"{where}: {text}"))

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Take what is wrong with params.yaml as a problem, and go on after it."""
        try:
            yield
        except UserError as error:
            self.problems.append(Problem("params.yaml", str(error)))

    def document(self) -> dict[str, Any]:
        """The report as JSON."""
        return {"ok": not self.problems} | asdict(self)


@dataclass
class _Cuts:
    """Which rows' prompts and answers are cut, by place, and how many tokens they had."""

    prompts: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)

    def __call__(self, where: str, column: str, tokens: int) -> None:
        known = self.prompts if column == "prompt" else self.answers
        known[where] = max(tokens, known.get(where, 0))


def check(*, seed: int, data: config.Data, model: config.Model, scratch: Path, progress: Progress) -> Report:
    """Look at all sources as `prepare` would; `scratch` is a folder for what does not fit into memory."""
    report, noted = Report(), defaultdict[str, list[str]](list)
    with tempfile.TemporaryDirectory(prefix="check-", dir=scratch) as folder:
        with report.going_on():
            check_kinds(data)
        tokenizer, longest, loads = None, None, False
        template: Template = "none"  # by which the rows can be looked at where the model does not load
        with report.going_on():
            tokenizer, template = open_tokenizer(data, model)
            longest, loads = known_positions(model), True
            check_lengths(model.base, longest, data)
        feedback, near = Feedback(template, tokenizer, data.heldout, Path(folder)), _Near(Path(folder), data.heldout)
        steps = Steps(progress, Meter.of(data.sources))

        def note(where: str, name: str) -> None:
            noted[name].append(where)

        report.rows = read_all(data, feedback, steps, report.add, near.take, note)
        feedback.finish(seed, data.ratings)
        report.remarks += [Remark.at(name, NOTES[name], where) for name, where in noted.items()]
        report.remarks += [*_dropped(feedback), *_alike(feedback), *near.remarks()]
        if loads and feedback.wanted("sft", "train").any():
            steps.settle(feedback, learnt=TAUGHT if tokenizer is None else ())
            tokenizer = tokenizer or learn_tokenizer(feedback, data, model, template, steps)
            cuts = _Cuts()
            encoder = Encoder(tokenizer, template == "chat", data.max_prompt_tokens, data.max_response_tokens, cuts)
            encoder.on_fault = report.add
            report.tables = _tables(feedback, encoder, steps)
            report.remarks += [*_truncated(cuts, data, longest), *_balance(report.tables)]
        else:
            left = {(kind, side): feedback.wanted(kind, side).sum() for kind, side in TABLES}
            report.tables = {f"{kind}_{side}": {"rows": int(rows)} for (kind, side), rows in left.items()}
        report.problems += _empty(feedback, data)
    report.problems.sort(key=Problem.order)
    return report


class _Near:
    """The texts that rows are split by, and those that are trained on, on their way to the search for near copies.

    The first is the prompt, or the whole of a text that is rated without one; the others are the prompt with an answer.
    Prompts are compared with prompts, and whole texts with whole texts.
    """

    def __init__(self, folder: Path, heldout: float) -> None:
        self._prompts, self._wholes = NearTexts(folder / "prompts-near"), NearTexts(folder / "wholes-near")
        self._digests = {self._prompts: bytearray(), self._wholes: bytearray()}
        self._heldout = heldout

    def take(self, where: str, record: Record) -> None:
        if isinstance(record, Rated) and record.prompt is None:
            self._add(self._wholes, where, record.text, is_heldout(record.text, self._heldout))
            return
        prompt = prompt_text(record.prompt or "")
        side = is_heldout(prompt, self._heldout)
        self._add(self._prompts, where, prompt, side)
        joint = "\n" if isinstance(record.prompt, Conversation) else ""  # as in `whole_text`
        for answer in _answers(record):
            self._add(self._wholes, where, f"{prompt}{joint}{answer}", side)

    def _add(self, texts: NearTexts, where: str, text: str, side: bool) -> None:
        self._digests[texts] += fingerprint(text)
        texts.add(where, text, side)

    def remarks(self) -> Iterator[Remark]:
        """Of the rows, each once, that have a near copy; exact copies are no such, and `prepare` leaves them out."""
        best: dict[str, NearCopy] = {}
        for texts, digests in self._digests.items():
            first = first_like(np.frombuffer(digests, np.uint64).reshape(-1, 2))
            for copy in texts.copies(first == np.arange(len(first))):
                if copy.heldout not in best or copy.similarity > best[copy.heldout].similarity:
                    best[copy.heldout] = copy
            texts.close()
        if best:
            message = "held-out rows have a near copy in training, which `prepare` keeps; take one of each two away"
            places = (f"{copy.heldout} is near {copy.train} ({copy.similarity:.0%})" for copy in best.values())
            yield Remark.at("near leaks", message, list(best), places)


def _answers(record: Record) -> list[str]:
    if isinstance(record, Preference):
        return [record.chosen, record.rejected]
    if isinstance(record, Rated):
        return [record.text]
    return [record.response] if isinstance(record, Example) else []


def _dropped(feedback: Feedback) -> Iterator[Remark]:
    """What `prepare` leaves out, row by row; of prompts only those that came as such, of SFT rows only their own."""
    tables = {"sft": "SFT rows", "pairs": "pairs", "prompts": "prompts"}
    for kind, called in tables.items():
        derived = (kind == "sft" and feedback.sft_from_pairs) or (kind == "prompts" and not feedback.prompts_given)
        for reason in () if derived else REASONS:
            where, places = list[str](), list[str]()
            for rows, (other, twins) in getattr(feedback.dropped[kind], reason):
                where += (mine := feedback.tables[kind].places(rows))
                first = slice(0, PLACES)
                pairs = zip(mine[first], other.places(twins[first]), strict=True)
                places += [f"{one} and {two}" for one, two in pairs]
            if where:
                yield Remark.at(reason, f"{called} {SAID[reason]}", where, places)
    if feedback.dropped["sft"].pooled:
        yield Remark("pooled", "rated rows repeat a text; its ratings are pooled", feedback.dropped["sft"].pooled)
    if feedback.too_short:
        message = "rated texts are no longer than their opening, and make no SFT row"
        yield Remark("too short", message, feedback.too_short)
    if feedback.undecided:
        message = "labelled pairs have no answer that more raters chose, and make no pair"
        yield Remark.at("undecided", message, feedback.undecided)


def _alike(feedback: Feedback) -> Iterator[Remark]:
    """Pairs that nothing but white space tells apart; code may be such."""
    rows = np.flatnonzero(feedback.pairs.kept & same_words(feedback.pairs))
    if len(rows):
        message = "pairs have answers that differ in white space alone; `prepare` keeps them"
        yield Remark.at("white space", message, feedback.pairs.places(rows))


def _empty(feedback: Feedback, data: config.Data) -> Iterator[Problem]:
    for kind, side in TABLES:
        try:
            check_rows(kind, side, int(feedback.wanted(kind, side).sum()), data, feedback)
        except UserError as error:
            yield Problem("data.sources", str(error))


def _tables(feedback: Feedback, encoder: Encoder, steps: Steps) -> dict[str, dict[str, Any]]:
    found = {}
    for kind, side, counter, cells in encode_all(feedback, encoder, steps):
        rows = sum(1 for _ in cells)
        longest = {f"longest_{column}": lengths.longest() for column, lengths in counter.lengths.items()}
        found[f"{kind}_{side}"] = {"rows": rows} | (table_numbers(kind, counter) | longest if rows else {})
    return found


def _truncated(cuts: _Cuts, data: config.Data, longest: int | None) -> Iterator[Remark]:
    def remark(name: str, message: str, tokens: dict[str, int]) -> Remark:
        return Remark.at(name, message, list(tokens), (f"{where}: {count} tokens" for where, count in tokens.items()))

    if cuts.prompts:
        message = (
            f"prompts lose their beginning: they are longer than `data.max_prompt_tokens` ({data.max_prompt_tokens}"
        )
        yield remark("cut prompts", f"{message}; the longest has {max(cuts.prompts.values())})", cuts.prompts)
    if cuts.answers:
        message = f"answers lose their end and EOS: longer than `data.max_response_tokens` ({data.max_response_tokens}"
        yield remark("cut answers", f"{message}; the longest has {max(cuts.answers.values())})", cuts.answers)
    beyond = {where: count for where, count in cuts.prompts.items() if longest is not None and count > longest}
    if beyond:
        yield remark("beyond the model", f"prompts are longer than the model reads ({longest} tokens)", beyond)


def _balance(tables: dict[str, dict[str, Any]]) -> Iterator[Remark]:
    pairs = [tables[f"pairs_{side}"] for side in SIDES if tables[f"pairs_{side}"]["rows"]]
    same = sum(table["same_after_cut"] for table in pairs)
    if same:
        yield Remark("same after cut", "pairs differ only in what is cut away; `prepare` leaves them out", same)
    rows = [table["rows"] for table in pairs]
    for way in ("longer", "shorter"):
        shares = [table["balance"][f"share_chosen_{way}"] for table in pairs]
        share = float(np.average(shares, weights=rows)) if sum(rows) else 0.0
        if share >= BIASED and sum(rows) >= BIASED_PAIRS:
            message = (
                f"pairs of {sum(rows)} ({share:.0%}) choose the {way} answer: a reward model could learn just that"
            )
            yield Remark("length bias", message, round(share * sum(rows)))

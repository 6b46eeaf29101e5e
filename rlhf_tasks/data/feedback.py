"""Records become rendered rows, each on its side of the split: which source feeds which data set.

SFT rows come from `sft` and `ratings` sources, else from the chosen answers; pairs from `preference`, `ratings` and
`labels`; prompts from `prompts` sources, else from all the others. Labels feed nothing but pairs: their answers are a
model's, from which neither SFT nor a tokenizer is to learn, and their prompts came from the other sources. A rated text
without a prompt is split by its whole text, everything else by its prompt, so that one prompt is on one side in every
source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from rlhf_tasks.data.contracts import Dropped, clean, fingerprint, is_heldout, prompt_text, whole_text
from rlhf_tasks.data.encoding import Template, render_prompt, render_response
from rlhf_tasks.data.formats import Asked, Preference, Rated, Record
from rlhf_tasks.data.judgements import Judged, by_pair, decide, standing
from rlhf_tasks.data.pairs import continuation, merge_ratings, pairs_by_opening, pairs_by_prompt
from rlhf_tasks.data.prompts import Prompt, prompt_fields
from rlhf_tasks.data.spill import Ask, Pair, Spill, Text

if TYPE_CHECKING:
    from rlhf_tasks import config

KINDS = ("sft", "pairs", "prompts")
SIDES = ("train", "heldout")


class Feedback:
    """The rows of all sources, in order of appearance, and what was left out on the way.

    Their texts are kept in a folder; only rated texts, whose pairs are built between them, are held in memory.

    Attributes, once it is finished:
        tables: the rows by kind (sft, pairs, prompts).
        dropped: what was left out, by kind.
        too_short: rated texts that leave no response after their opening.
        undecided: where pairs stand of which their raters prefer neither answer.
        sft_from_pairs: whether no source had SFT rows, so that they are the chosen answers.
        prompts_given: whether there were sources of prompts, so that only those count.
        too_close: the sides, True is held-out, on which `min_gap` alone keeps rated texts from making any pair.
    """

    def __init__(
        self, template: Template, tokenizer: PreTrainedTokenizerBase | None, heldout: float, folder: Path
    ) -> None:
        self.template, self.tokenizer, self.heldout = template, tokenizer, heldout
        self.sft, self.pairs = Spill(folder / "sft", Text), Spill(folder / "pairs", Pair)
        self.prompts, self._asked = Spill(folder / "prompts", Ask), Spill(folder / "asked", Ask)
        self.dropped = {kind: Dropped() for kind in KINDS}
        self.too_short = 0
        self.undecided: list[str] = []
        self.sft_from_pairs = self.prompts_given = False
        self.too_close: set[bool] = set()
        self._rated: list[tuple[str, Rated]] = []
        self._judged: list[tuple[str, Judged]] = []
        self._own_pairs = 0  # those before the judged ones

    @property
    def tables(self) -> dict[str, Spill[Any]]:
        return {"sft": self.sft, "pairs": self.pairs, "prompts": self.prompts}

    def add(self, where: str, record: Record) -> None:
        """Take one record.

        Raises:
            UserError: the tokenizer's chat template refuses its prompt.
        """
        if isinstance(record, Rated):
            if record.prompt is not None:
                self._render(record.prompt)  # to refuse it while its place is known
            self._rated.append((where, record))
            return
        text = prompt_text(record.prompt)
        side, prompt = is_heldout(text, self.heldout), self._ask(record.prompt, where)
        if isinstance(record, Judged):
            self._judged.append((where, record))
            return
        if isinstance(record, Asked):
            self._asked.add(prompt, side, [fingerprint(text)])
            return
        if isinstance(record, Preference):
            self._add_pair(prompt, record, side)
        else:
            self._add_example(prompt, record.prompt, record.response, side)
        self.prompts.add(prompt, side, [fingerprint(text)])

    def finish(self, seed: int, ratings: config.Ratings) -> None:
        """Turn the ratings into rows, settle which source feeds what, and drop what must not be there."""
        merged = list(merge_ratings(record for _, record in self._rated))
        self.dropped["sft"].pooled = len(self._rated) - len(merged)
        places: dict[tuple[Prompt | None, str], str] = {}
        for where, record in self._rated:
            places.setdefault((record.prompt, record.text), where)
        self._rated.clear()
        prompted = [(p, text, score) for p, text, score in merged if p is not None]
        whole = [(text, score) for p, text, score in merged if p is None]
        self._finish_prompted(prompted, seed, ratings, places)
        self._finish_openings(whole, seed, ratings, places)
        self._own_pairs = len(self.pairs)
        self._finish_judged()
        self.pairs.seal()
        if missing := {side for side in (True, False) if not (self.pairs.heldout == side).any()}:
            self.too_close = missing & set(self._sides_with_pairs(prompted, whole, seed))
        if len(self.sft) == 0:
            self.sft_from_pairs = True
            self._learn_chosen()
        for spill in (self.sft, self.prompts, self._asked):
            spill.seal()
        self.prompts_given = len(self._asked) > 0
        if self.prompts_given:
            self.prompts = self._asked
        clean(self.sft, self.pairs, self.prompts, self.dropped)

    def wanted(self, kind: str, side: str) -> npt.NDArray[np.bool_]:
        """Which rows of a table stay and are on a side (train, heldout), `[rows]`."""
        table = self.tables[kind]
        return table.kept & (table.heldout == (side == "heldout"))

    def taught(self, kind: str) -> npt.NDArray[np.bool_]:
        """Which training rows of a table a tokenizer may learn from, `[rows]`: of pairs, those that nobody labelled."""
        wanted = self.wanted(kind, "train")
        return wanted & (np.arange(len(wanted)) < self._own_pairs) if kind == "pairs" else wanted

    def _finish_prompted(
        self,
        rated: list[tuple[Prompt, str, float]],
        seed: int,
        ratings: config.Ratings,
        places: dict[tuple[Prompt | None, str], str],
    ) -> None:
        for prompt, text, _ in rated:
            side, ask = is_heldout(prompt_text(prompt), self.heldout), self._ask(prompt, places[prompt, text])
            self._add_example(ask, prompt, text, side)
            self.prompts.add(ask, side, [fingerprint(prompt_text(prompt))])
        for pair in pairs_by_prompt(rated, seed, ratings.min_gap, ratings.pairs_per_text):
            ask = self._ask(pair.prompt, places[pair.prompt, pair.chosen])
            self._add_pair(ask, pair, is_heldout(prompt_text(pair.prompt), self.heldout))

    def _finish_openings(
        self,
        rated: list[tuple[str, float]],
        seed: int,
        ratings: config.Ratings,
        places: dict[tuple[Prompt | None, str], str],
    ) -> None:
        sides: dict[bool, list[tuple[str, float]]] = {False: [], True: []}
        for text, score in rated:
            sides[is_heldout(text, self.heldout)].append((text, score))
        for side, texts in sides.items():
            for text, _ in texts:
                if parts := continuation(text, ratings.opening_words, seed):
                    ask = self._ask(parts[0], places[None, text])
                    self._add_example(ask, *parts, side)
                    self.prompts.add(ask, side, [fingerprint(prompt_text(parts[0]))])
                else:
                    self.too_short += 1
            for pair in pairs_by_opening(texts, seed, ratings.min_gap, ratings.pairs_per_text):
                where = places[None, f"{pair.prompt}{pair.chosen}"]
                self._add_pair(self._ask(pair.prompt, where), pair, side)

    def _finish_judged(self) -> None:
        places: dict[str, str] = {}
        for where, record in self._judged:
            places.setdefault(record.pair, where)
        found = by_pair(standing(record for _, record in self._judged))
        self._judged.clear()
        for name, judged in found.items():
            if decided := decide(judged):
                pair = Preference(judged[0].prompt, *decided)
                side = is_heldout(prompt_text(pair.prompt), self.heldout)
                self._add_pair(self._ask(pair.prompt, places[name]), pair, side)
            else:
                self.undecided.append(places[name])

    def _sides_with_pairs(
        self, prompted: list[tuple[Prompt, str, float]], whole: list[tuple[str, float]], seed: int
    ) -> Iterator[bool]:
        """The sides of the pairs that there would be if any gap were enough."""
        for pair in pairs_by_prompt(prompted, seed, 0.0, 1):
            yield is_heldout(prompt_text(pair.prompt), self.heldout)
        for side in (True, False):
            texts = [(text, score) for text, score in whole if is_heldout(text, self.heldout) == side]
            yield from (side for _ in pairs_by_opening(texts, seed, 0.0, 1))

    def _learn_chosen(self) -> None:
        row, own = 0, np.arange(len(self.pairs)) < self._own_pairs
        for batch in self.pairs.batches(own):
            for pair in batch:
                side, texts = bool(self.pairs.heldout[row]), [self.pairs.texts[row, 0].tobytes()]
                self.sft.add(Text(pair.prompt, pair.chosen, pair.where), side, texts)
                row += 1

    def _add_example(self, ask: Ask, prompt: Prompt, response: str, heldout: bool) -> None:
        answer = render_response(response, prompt, self.template)
        self.sft.add(Text(ask.prompt, answer, ask.where), heldout, [whole_text(prompt, response)])

    def _add_pair(self, ask: Ask, pair: Preference, heldout: bool) -> None:
        prompt, answers = pair.prompt, (pair.chosen, pair.rejected)
        chosen, rejected = (render_response(answer, prompt, self.template) for answer in answers)
        row = Pair(ask.prompt, chosen, rejected, pair.margin, ask.where)
        self.pairs.add(row, heldout, [whole_text(prompt, answer) for answer in answers])

    def _ask(self, prompt: Prompt, where: str) -> Ask:
        text, fields = self._render(prompt), prompt_fields(prompt)
        return Ask(text, "" if fields == {"prompt": text} else json.dumps(fields, ensure_ascii=False), where)

    def _render(self, prompt: Prompt) -> str:
        return render_prompt(prompt, self.template, self.tokenizer)

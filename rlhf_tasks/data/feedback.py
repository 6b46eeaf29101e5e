"""Records become rendered rows, each on its side of the split: which source feeds which data set.

SFT rows come from `sft` and `ratings` sources, else from the chosen answers; pairs from `preference` and `ratings`;
prompts from `prompts` sources, else from all the others. A rated text without a prompt is split by its whole text,
everything else by its prompt, so that one prompt is on one side in every source.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from rlhf_tasks.data.contracts import (
    Ask,
    Dropped,
    Pair,
    Text,
    drop_contradictions,
    drop_duplicates,
    drop_leaks,
    fingerprint,
    heldout_texts,
    is_heldout,
    prompt_text,
    whole_text,
)
from rlhf_tasks.data.encoding import Template, render_prompt, render_response
from rlhf_tasks.data.formats import Asked, Example, Preference, Prompt, Rated, Record
from rlhf_tasks.data.pairs import continuation, merge_ratings, pairs_by_opening, pairs_by_prompt

if TYPE_CHECKING:
    from rlhf_tasks import config


@dataclass
class Feedback:
    """The rows of all sources, in order of appearance, and what was left out on the way."""

    template: Template
    tokenizer: PreTrainedTokenizerBase | None
    heldout: float
    sft: list[Text] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    prompts: list[Ask] = field(default_factory=list)
    too_short: int = 0
    dropped: dict[str, Dropped] = field(default_factory=lambda: {k: Dropped() for k in ("sft", "pairs", "prompts")})
    _rated: list[Rated] = field(default_factory=list)
    _asked: list[Ask] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Take one record.

        Raises:
            UserError: the tokenizer's chat template refuses its prompt.
        """
        if isinstance(record, Rated):
            if record.prompt is not None:
                self._render(record.prompt)  # to refuse it while its place is known
            self._rated.append(record)
            return
        side = is_heldout(prompt_text(record.prompt), self.heldout)
        if isinstance(record, Asked):
            self._asked.append(self._ask(record.prompt, side))
        elif isinstance(record, Example):
            self._add_example(record.prompt, record.response, side)
        else:
            self._add_pair(record, side)
            self.prompts.append(self._ask(record.prompt, side))

    def finish(self, seed: int, ratings: config.Ratings) -> None:
        """Turn the ratings into rows, settle which source feeds what, and drop what must not be there."""
        merged = list(merge_ratings(self._rated))
        self.dropped["sft"].duplicates += len(self._rated) - len(merged)
        self._rated.clear()
        self._finish_prompted([(p, text, score) for p, text, score in merged if p is not None], seed, ratings)
        self._finish_openings([(text, score) for p, text, score in merged if p is None], seed, ratings)
        if not self.sft:
            self.sft = [Text(p.prompt, p.chosen, p.heldout, p.texts[:1]) for p in self.pairs]
        self.prompts = self._asked or self.prompts
        self._clean()

    def _finish_prompted(self, rated: list[tuple[Prompt, str, float]], seed: int, ratings: config.Ratings) -> None:
        for prompt, text, _ in rated:
            self._add_example(prompt, text, is_heldout(prompt_text(prompt), self.heldout))
        for pair in pairs_by_prompt(rated, seed, ratings.min_gap, ratings.pairs_per_text):
            self._add_pair(pair, is_heldout(prompt_text(pair.prompt), self.heldout))

    def _finish_openings(self, rated: list[tuple[str, float]], seed: int, ratings: config.Ratings) -> None:
        sides: dict[bool, list[tuple[str, float]]] = {False: [], True: []}
        for text, score in rated:
            sides[is_heldout(text, self.heldout)].append((text, score))
        for side, texts in sides.items():
            for text, _ in texts:
                if parts := continuation(text, ratings.opening_words, seed):
                    self._add_example(*parts, side)
                else:
                    self.too_short += 1
            for pair in pairs_by_opening(texts, seed, ratings.min_gap, ratings.pairs_per_text):
                self._add_pair(pair, side)

    def _clean(self) -> None:
        """Duplicates first: what is left is compared for contradictions, and what of that is left, across the split."""
        dropped = self.dropped
        self.sft = drop_duplicates(self.sft, dropped["sft"])
        self.pairs = drop_contradictions(drop_duplicates(self.pairs, dropped["pairs"]), dropped["pairs"])
        self.prompts = drop_duplicates(self.prompts, dropped["prompts"])
        heldout = heldout_texts(self.sft, self.pairs)
        self.sft = drop_leaks(self.sft, heldout, dropped["sft"])
        self.pairs = drop_leaks(self.pairs, heldout, dropped["pairs"])
        self.prompts = drop_leaks(self.prompts, heldout_texts(self.prompts), dropped["prompts"])

    def _add_example(self, prompt: Prompt, response: str, heldout: bool) -> None:
        ask = self._ask(prompt, heldout)
        answer = render_response(response, prompt, self.template)
        self.sft.append(Text(ask.prompt, answer, heldout, (whole_text(prompt, response),)))
        self.prompts.append(ask)

    def _add_pair(self, pair: Preference, heldout: bool) -> None:
        prompt, answers = pair.prompt, (pair.chosen, pair.rejected)
        chosen, rejected = (render_response(answer, prompt, self.template) for answer in answers)
        texts = tuple(whole_text(prompt, answer) for answer in answers)
        self.pairs.append(Pair(self._render(prompt), chosen, rejected, pair.margin, heldout, texts))

    def _ask(self, prompt: Prompt, heldout: bool) -> Ask:
        return Ask(self._render(prompt), heldout, (fingerprint(prompt_text(prompt)),))

    def _render(self, prompt: Prompt) -> str:
        return render_prompt(prompt, self.template, self.tokenizer)

"""What the page of `rlhf label` asks for: what is next for a rater, and what becomes of a judgement.

Nothing is kept but in the feedback file. Which answer stands first follows from the pair and the rater, and is the same
after a reload.
"""

from __future__ import annotations

import unicodedata
from dataclasses import asdict
from typing import Any

from rlhf_tasks.agreement import agreement
from rlhf_tasks.data.formats import Compared
from rlhf_tasks.data.judgements import CHOICES, WITHDRAWN, standing, text_digest
from rlhf_tasks.data.prompts import plain_text
from rlhf_tasks.errors import UserError
from rlhf_tasks.label_file import LabelFile

LONGEST_NAME = 64


class Desk:
    """What the page asks for: what is next for a rater, and what becomes of a judgement."""

    def __init__(self, pairs: dict[str, Compared], file: LabelFile) -> None:
        self.pairs, self.file = pairs, file

    def state(self, rater: object, again: str = "") -> dict[str, Any]:
        """The next pair for a rater, and how far it all is.

        Args:
            again: the pair that was taken back, which then comes before any other.
        """
        rater = rater_name(rater)
        judged = standing(self.file.judged())
        mine = {one.pair for one in judged if one.rater == rater}
        found = asdict(agreement(judged))
        del found["actor"]  # it is for those who judge no more
        left = [pair for pair in self.pairs if pair not in mine]
        chosen = again if again in left else next(iter(left), None)
        return {
            "rater": rater,
            "pair": None if chosen is None else self._shown(chosen, rater),
            "done": len(self.pairs) - len(left),
            "total": len(self.pairs),
            "raters": len({one.rater for one in judged}),
            "agreement": found,
        }

    def judge(self, rater: object, pair: object, choice: object) -> dict[str, Any]:
        """Keep a judgement of a pair as this rater sees it; what is next."""
        rater = rater_name(rater)
        if choice not in CHOICES or choice == WITHDRAWN:
            raise UserError(f"choice: found {choice!r}, expected one of {', '.join(CHOICES[:-1])}")
        if not isinstance(pair, str) or pair not in self.pairs:
            raise UserError("this pair is no longer among those to judge; reload the page")
        self.file.add(in_shown_order(self.pairs[pair], rater), str(choice), rater)
        return self.state(rater)

    def undo(self, rater: object) -> dict[str, Any]:
        """Withdraw what a rater said last of these pairs, and show that pair again."""
        rater = rater_name(rater)
        last = self.file.undo(rater, self.pairs)
        if last is None:
            raise UserError("there is nothing to undo")
        return self.state(rater, last.pair)

    def _shown(self, pair: str, rater: str) -> dict[str, Any]:
        shown = in_shown_order(self.pairs[pair], rater)
        return {"id": pair, "prompt": plain_text(shown.prompt).strip("\n"), "answers": list(shown.answers)}


def in_shown_order(compared: Compared, rater: str) -> Compared:
    """A pair as a rater sees it: for about half of the pairs and raters the answers change places."""
    if int(text_digest(f"{compared.pair}\n{rater}"), 16) % 2:
        return compared
    turned = [value and value[::-1] for value in (compared.answers, compared.scores, compared.models)]
    return Compared(compared.prompt, *turned)  # type: ignore[arg-type]  # each is a pair, or None as before


def rater_name(name: object) -> str:
    """A rater's name as it is kept: one form of each letter, single blanks.

    Raises:
        UserError: it is empty, too long or no text.
    """
    if isinstance(name, str):
        name = " ".join(unicodedata.normalize("NFC", name).split())
        if 0 < len(name) <= LONGEST_NAME and not any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            return name
    found = "none" if not name else f"one of {len(name)} characters" if isinstance(name, str) else repr(name)
    raise UserError(f"name: found {found}, expected yours, of 1 to {LONGEST_NAME} characters")

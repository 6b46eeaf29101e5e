"""Judgements for tests."""

from __future__ import annotations

from rlhf_tasks.data.judgements import Judged, pair_digest
from rlhf_tasks.data.prompts import Prompt, prompt_fields


def judged(
    choice: str,
    rater: str = "ada",
    prompt: Prompt = "It's a",
    answers: tuple[str, str] = (" good film", " bad film"),
    scores: tuple[float, float] | None = None,
    models: tuple[str, str] | None = None,
) -> Judged:
    """What `rater` says of two answers, in the order in which they were shown."""
    return Judged(prompt, answers, choice, rater, pair_digest(prompt_fields(prompt), answers), scores, models)

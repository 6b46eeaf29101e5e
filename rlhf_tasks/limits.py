"""What a model and the prepared data have room for: limits that several places look at, each with its sentence."""

from __future__ import annotations

from typing import Any

from rlhf_tasks.errors import UserError


def positions(settings: Any) -> int | None:
    """The most tokens that a model was made for, by its Hugging Face configuration, or None where it has no limit."""
    found = getattr(settings.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_room(longest_prompt: int, max_new_tokens: int, have: int | None) -> None:
    """See that the longest prompt leaves room for the longest answer in a model of `have` positions.

    Raises:
        UserError: a model with positions by number would fail, one with rotary ones answer beyond what it has learned.
    """
    if have is not None and longest_prompt + max_new_tokens > have:
        raise UserError(
            f"generation.max_new_tokens: {max_new_tokens} after a prompt of {longest_prompt} tokens, but the model has "
            f"{have} positions; lower it, or data.max_prompt_tokens"
        )


def check_layer_count(where: str, trainable: int, have: int) -> None:
    """See that something is left below the layers that are to learn.

    Args:
        where: the setting that asks for it.

    Raises:
        UserError: the model has not more layers than that.
    """
    if trainable >= have:
        raise UserError(
            f"{where}: found {trainable}, but the model has {have} layers; expected fewer than that, or null to train "
            "all of it"
        )


def check_heldout_prompts(asked: int, have: int) -> None:
    """See that there are as many held-out prompts as `evaluate.prompts` asks for.

    Raises:
        UserError: there are fewer.
    """
    if asked > have:
        raise UserError(
            f"evaluate.prompts: found {asked}, but the data has only {have} held-out prompts; lower it, raise "
            "data.heldout, or add prompts"
        )

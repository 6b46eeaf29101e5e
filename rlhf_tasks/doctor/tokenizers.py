"""Checks of the tokenizers: the base model's, and those of the four models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_tasks.base import find_base
from rlhf_tasks.config import Params
from rlhf_tasks.data.encoding import choose_template
from rlhf_tasks.data.encoding import load_tokenizer as load_base_tokenizer
from rlhf_tasks.doctor.finding import Finding, advice
from rlhf_tasks.models import load_tokenizer

_WAITS = "prepare trains the tokenizer: `rlhf run --until prepare`, then ask again"


def _tokenizer_folders(root: Path) -> list[Path]:
    folders = (root / f"checkpoints/{name}" for name in ("sft", "reward", "actor", "critic"))
    return [folder for folder in folders if folder.exists()]


def _tokenizer(root: Path, params: Params) -> Any:
    """SFT's, or, before SFT, the base model's; None where it has still to be trained."""
    if folders := _tokenizer_folders(root):
        return load_tokenizer(folders[0])
    base = find_base(params.model, root)
    return load_base_tokenizer(base) if base else None


def pad_and_eos(root: Path, params: Params) -> Finding:
    if (tokenizer := _tokenizer(root, params)) is None:
        return Finding("pad and EOS", None, _WAITS)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or eos is None or pad == eos:
        text = f"pad is {pad}, EOS is {eos}: with one token for both, no answer learns to end; give it a pad token"
        return Finding("pad and EOS", False, text)
    return Finding("pad and EOS", True, f"two tokens: {tokenizer.pad_token!r} and {tokenizer.eos_token!r}")


def template(root: Path, params: Params) -> Finding:
    if (tokenizer := _tokenizer(root, params)) is None:
        return Finding("template", None, _WAITS)
    template = choose_template(params.data.template, tokenizer)
    if tokenizer.chat_template and template != "chat":
        text = "data.template: the tokenizer has a chat template that is not used; set it to chat or auto"
        return advice("template", text)
    return Finding("template", True, f"prompts are written with {template}")


def one_tokenizer(root: Path, params: Params) -> Finding:
    folders = _tokenizer_folders(root)
    if len(folders) < 2:
        return Finding("one tokenizer", None, "the four models are not there yet")
    different = [f.name for f in folders[1:] if _vocabulary(f) != _vocabulary(folders[0])]
    if different:
        text = f"checkpoints/{different[0]} has another tokenizer than {folders[0].name}; run `rlhf run` again"
        return Finding("one tokenizer", False, text)
    return Finding("one tokenizer", True, f"the same in {', '.join(f.name for f in folders)}")


def _vocabulary(folder: Path) -> tuple[Any, ...]:
    tokenizer = load_tokenizer(folder)
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    return whole, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template

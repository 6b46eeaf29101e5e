"""The Actor that SFT starts from: a small Llama drawn from the seed, or the weights of a base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from rlhf_tasks.base import SCRATCH_POSITIONS, check_vocabulary, find_base, load_settings
from rlhf_tasks.data.batching import Line
from rlhf_tasks.errors import UserError
from rlhf_tasks.forward import Cache, hidden_states, windows
from rlhf_tasks.gguf_file import read_gguf
from rlhf_tasks.head import Head
from rlhf_tasks.models import check_size, load_actor, ready
from rlhf_tasks.seeds import derive_seed

if TYPE_CHECKING:
    from rlhf_tasks import config

SAME = 1e-2  # of the logits' spread: rounding is far below, a wrong position far above


def new_actor(model: config.Model, tokenizer: Any, seed: int) -> Any:
    """The model that SFT starts from, with an embedding for every token of `tokenizer`.

    Raises:
        UserError: the base holds no causal language model, not all of one, or one that the four models cannot come of.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "sft", "weights"))
        if (base := find_base(model)) is None:
            return ready(
                LlamaForCausalLM(
                    scratch_settings(model.scratch, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
                ),
                tokenizer,
            )
        settings = load_settings(base)
        actor = _from_gguf(base, settings) if base.is_file() else load_actor(base, torch.device("cpu"))
        check_vocabulary(base, actor.get_input_embeddings().num_embeddings, tokenizer)
        _check_weights(base, actor)
        _give_row(actor, tokenizer)
        _check_forward(base, actor)
        return ready(actor, tokenizer)


def scratch_settings(scratch: config.Scratch, vocabulary: int, eos_id: int, pad_id: int) -> LlamaConfig:
    """The configuration of the small Llama for a vocabulary of so many tokens."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.heads,
        max_position_embeddings=SCRATCH_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


def _from_gguf(path: Path, settings: Any) -> Any:
    """The weights of a GGUF file in float32, in a plain model of transformers.

    Not by `from_pretrained`, which wants accelerate for it and makes a model that cannot be saved.
    """
    said = read_gguf(path)
    check_size(path, settings, said.weights)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    try:
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        tensors = load_gguf_checkpoint(str(path), True, model, torch.float32)["tensors"]
        found = model.load_state_dict(tensors, strict=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(f"`model.base: {path}`: transformers does not load this GGUF file: {reason}") from None
    tied = {"lm_head.weight"} if settings.tie_word_embeddings else set()
    if missing := sorted(set(found.missing_keys) - tied):
        raise UserError(f"`model.base: {path}`: {len(missing)} weights are missing, such as {missing[0]}")
    model.tie_weights()
    ends = {settings.eos_token_id, said.token_id("eos"), said.token_id("eot")} - {None}
    model.generation_config.eos_token_id = sorted(ends)
    return model.eval()


def _check_weights(base: Path, actor: Any) -> None:
    """See that all weights are finite: one that is not can make none of all that the model says."""
    for name, weight in actor.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"`model.base: {base}`: {name} holds numbers that are not finite (NaN, infinity): its training "
                "diverged, or the file is damaged; take an earlier checkpoint, or copy it again"
            )


def _give_row(actor: Any, tokenizer: Any) -> None:
    """An embedding for a pad token that has none yet.

    It is the mean of the others: whatever the hidden state, its probability is at most the mean of theirs (Jensen).
    """
    rows = actor.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id < rows:
        return
    actor.resize_token_embeddings(rows + 1, mean_resizing=False)
    head = actor.get_output_embeddings()
    with torch.no_grad():
        for table in (actor.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)):
            if table is not None:
                table[rows] = table[:rows].mean(0)


@torch.no_grad()
def _check_forward(base: Path, actor: Any) -> None:
    """See on a few tokens that our forward pass (forward.py, head.py) is the model's own, as all that follows takes for
    granted: in a line with other texts, and with a cache.

    Raises:
        UserError: it is not: the model is of a kind whose ratios and scores would be of something else.
    """
    most = actor.config.get_text_config().vocab_size
    texts = [[i % most for i in (1, 2)], [i % most for i in (3, 4, 5, 6)]]
    try:
        own, line = _plainly(actor, texts), Line.of(texts, torch.device("cpu"))
        together = Head.of(actor).logits(hidden_states(actor, line))
        by_token, told = _token_by_token(actor, texts[1]), windows(actor, line)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"`model.base: {base}`: {actor.config.model_type} models cannot be read: {reason}") from None
    wrong = [
        what
        for found, wanted, what in (
            (together, own, "reading several texts at once"),
            (by_token, own[len(texts[0]) :], "decoding with a cache"),
        )
        if not (found - wanted).abs().max() <= SAME * own.std()
    ]
    if len(told) - told.count(None) < _windowed_layers(actor.config):
        wrong.append("attention without the sliding window of its config.json")
    if wrong:
        raise UserError(
            f"`model.base: {base}`: {wrong[0]} changes what this model ({actor.config.model_type}) says, so PPO's "
            "ratios would be of something else; choose a base of another kind"
        )


def _plainly(actor: Any, texts: list[list[int]]) -> Tensor:
    """Logits of all tokens as the model itself says, text by text, with the attention that leaves nothing out."""
    usual, actor.config._attn_implementation = actor.config._attn_implementation, "eager"
    try:
        return torch.cat([actor(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts])
    finally:
        actor.config._attn_implementation = usual


def _token_by_token(actor: Any, text: list[int]) -> Tensor:
    """Logits of all tokens of a text, each from the cache of those before it."""
    cache, states = Cache(len(text)), []
    for place, token in enumerate(text):
        states.append(hidden_states(actor, Line(torch.tensor([token]), (1,), (place,)), cache))
    return Head.of(actor).logits(torch.cat(states))


def _windowed_layers(settings: Any) -> int:
    """How many layers do not look back to the beginning, by the model's settings."""
    kinds = getattr(settings, "layer_types", None)
    if kinds is not None:
        return len([kind for kind in kinds if kind != "full_attention"])
    return settings.num_hidden_layers if getattr(settings, "sliding_window", None) else 0

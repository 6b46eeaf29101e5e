"""The Actor that SFT starts from: a small Llama drawn from the seed, or the weights of a base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from rlhf_tasks.base import SCRATCH_POSITIONS, check_vocabulary, find_base, load_settings
from rlhf_tasks.errors import UserError
from rlhf_tasks.gguf_file import read_gguf
from rlhf_tasks.models import check_size, load_actor, position_ids, ready, response_logits
from rlhf_tasks.seeds import derive_seed

if TYPE_CHECKING:
    from rlhf_tasks import config

PADDING = 3
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
        _check_scorer(base, actor.config)
        _give_row(actor, tokenizer)
        _check_padding(base, actor, tokenizer)
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


def _check_scorer(base: Path, settings: Any) -> None:
    """See, without weights, that Reward and Critic can be made: a trunk and a head named `score`."""
    with torch.device("meta"):
        scorer = AutoModelForSequenceClassification.from_config(settings)
    if not isinstance(getattr(scorer, "score", None), torch.nn.Linear) or not hasattr(scorer, scorer.base_model_prefix):
        raise UserError(
            f"`model.base: {base}`: {type(scorer).__name__} of transformers has no linear head `score` on one trunk, "
            "so no Reward or Critic can be made of it; choose another base"
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
def _check_padding(base: Path, actor: Any, tokenizer: Any) -> None:
    """See on three tokens that padding and the cache change nothing, as all that follows takes for granted.

    Raises:
        UserError: they do: the model is of a kind whose ratios and scores would be of something else.
    """
    pad = tokenizer.pad_token_id
    tokens = torch.tensor([i for i in range(actor.config.get_text_config().vocab_size) if i != pad][:PADDING])[None]
    ids = torch.nn.functional.pad(tokens, (PADDING, 0), value=pad)
    mask = torch.tensor([[0] * PADDING + [1] * tokens.shape[1]])
    alone_logits = response_logits(actor, tokens, torch.ones_like(tokens), tokens.shape[1] - 1)
    padded = response_logits(actor, ids, mask, tokens.shape[1] - 1)
    cached = _token_by_token(actor, ids, mask)[:, PADDING:-1]
    spread = alone_logits.std()
    for found, what in ((padded, "padding on the left"), (cached, "decoding with a cache")):
        if not (found - alone_logits).abs().max() <= SAME * spread:
            raise UserError(
                f"`model.base: {base}`: {what} changes what this model ({actor.config.model_type}) says, so PPO's "
                "ratios would be of something else; choose a base of another kind"
            )


def _token_by_token(actor: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of every place, `[B, L, V]`, each from the cache of the places before it."""
    cache, positions = DynamicCache(config=actor.config), position_ids(mask)
    steps = [
        actor(
            input_ids=ids[:, place : place + 1],
            attention_mask=mask[:, : place + 1],
            position_ids=positions[:, place : place + 1],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for place in range(ids.shape[1])
    ]
    return torch.cat(steps, dim=1)

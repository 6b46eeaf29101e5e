"""Tiny bases of the shapes that people bring: architectures, heads, positions and tokenizers as they are published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LETTERS = "A warm and funny film, a rare one: the jokes are old, the story is a mess. " * 9
WORDS = 290  # tokens of the model that are no special ones
SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
GROUPED = SIZE | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 96}
HEADS = GROUPED | {"head_dim": 16}
PLAIN = SIZE | {"intermediate_size": 64, "max_position_embeddings": 96}


def make_tokenizer(specials: tuple[str, ...], *, adds_bos: bool = False, **named: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose first tokens are the special ones; `adds_bos`: as Llama's, it puts its BOS first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS + len(specials),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([LETTERS], trainer)
    if adds_bos:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@dataclass(frozen=True)
class Shape:
    """A base as people publish it.

    Attributes:
        spare: rows of the embedding that no token has.
        eos: what generation_config.json says ends a response, beside the tokenizer's EOS.
    """

    config: Callable[..., Any]
    settings: dict[str, Any]
    specials: tuple[str, ...]
    named: dict[str, Any]
    tied: bool
    spare: int = 0
    eos: tuple[str, ...] = ()


LLAMA = ("<s>", "</s>", "<|eot|>")
LLAMA_NAMES = {"adds_bos": True, "bos_token": "<s>", "eos_token": "</s>"}
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_NAMES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
GEMMA = ("<pad>", "<eos>", "<bos>", "<end_of_turn>")
GEMMA_NAMES = {"adds_bos": True, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
ENDOFTEXT = ("<|endoftext|>",)
ENDOFTEXT_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
OPT_NAMES = {"adds_bos": True, "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}

SHAPES = {
    "llama": Shape(LlamaConfig, GROUPED, LLAMA, LLAMA_NAMES, tied=False, eos=("</s>", "<|eot|>")),
    "qwen2": Shape(Qwen2Config, GROUPED, QWEN, QWEN_NAMES, tied=True, spare=7, eos=("<|im_end|>", "<|endoftext|>")),
    "qwen3": Shape(Qwen3Config, HEADS, QWEN, QWEN_NAMES, tied=False, spare=7),
    "gemma": Shape(GemmaConfig, HEADS, GEMMA, GEMMA_NAMES, tied=True, eos=("<eos>", "<end_of_turn>")),
    "gemma2": Shape(Gemma2Config, HEADS | {"sliding_window": 8}, GEMMA, GEMMA_NAMES, tied=True),
    "gemma3": Shape(Gemma3TextConfig, HEADS | {"sliding_window": 8}, GEMMA, GEMMA_NAMES, tied=True),
    "gpt2": Shape(
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.2},
        ENDOFTEXT,
        ENDOFTEXT_NAMES,
        tied=True,
    ),
    "gpt_neox": Shape(GPTNeoXConfig, PLAIN, ENDOFTEXT, ENDOFTEXT_NAMES, tied=False, spare=5),
    "opt": Shape(
        OPTConfig,
        SIZE | {"ffn_dim": 64, "max_position_embeddings": 96, "word_embed_proj_dim": 16, "init_std": 0.2},
        ("<s>", "<pad>", "</s>"),
        OPT_NAMES,
        tied=True,
        spare=4,
    ),
    "phi": Shape(PhiConfig, PLAIN | {"num_key_value_heads": 2}, ENDOFTEXT, ENDOFTEXT_NAMES, tied=False, spare=9),
    "mistral": Shape(MistralConfig, GROUPED | {"sliding_window": 8}, ("<unk>", *LLAMA), LLAMA_NAMES, tied=False),
}


def write_shape(name: str, folder: Path, seed: int = 0, layers: int = 2) -> Any:
    """A base folder of a shape, with weights at which tokens, positions and layers matter. Gives its model."""
    shape = SHAPES[name]
    tokenizer = make_tokenizer(shape.specials, **shape.named)
    ids = {which: getattr(tokenizer, f"{which}_token_id") for which in ("bos", "eos", "pad")}
    settings = shape.settings | {f"{which}_token_id": found for which, found in ids.items()}
    settings["n_layer" if "n_layer" in settings else "num_hidden_layers"] = layers
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            shape.config(vocab_size=len(tokenizer) + shape.spare, tie_word_embeddings=shape.tied, **settings)
        )
    if shape.eos:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(shape.eos))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()

"""Text to tokens: the templates, the tokenizers, and the one encoding of prompt and response that every stage shares.

Prompt and response are tokenized apart and joined, so no token spans the boundary. A prompt never holds an EOS that its
text did not earn from the chat template; a response ends with EOS unless it was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_tasks.data.prompts import Conversation, Instruction, Message, Prompt, plain_text
from rlhf_tasks.errors import UserError
from rlhf_tasks.gguf_file import alone, read_gguf

Template = Literal["none", "alpaca", "chat"]

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
ALPACA_GIVEN = "\n\n### Input:\n"
ALPACA_RESPONSE = "\n\n### Response:"

PAD, EOS = "<pad>", "<eos>"
PIECE = 5000  # characters that merges are learnt from at once: a longer run without white space takes its square
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def choose_template(name: str, tokenizer: PreTrainedTokenizerBase | None) -> Template:
    """The template that `data.template` means for a tokenizer; None stands for the one still to be trained.

    Raises:
        UserError: `chat` is asked of a tokenizer that has no chat template.
    """
    has_chat = tokenizer is not None and bool(tokenizer.chat_template)
    if name == "chat" and not has_chat:
        raise UserError(
            "`data.template: chat`: the tokenizer has no chat template; set `data.template` to alpaca, none or auto"
        )
    if name == "auto":
        return "chat" if has_chat else "alpaca"
    return cast(Template, name)


def render_prompt(prompt: Prompt, template: Template, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The text that a model reads before its response.

    `none` is the prompt's own text, a conversation as a transcript that ends with `Assistant:`; `alpaca` is Stanford's;
    `chat` is the tokenizer's own with its generation prompt, where special tokens that the prompt's author typed are
    broken by a zero-width space, so that only the template's own count.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    if template == "none":
        return plain_text(prompt)
    if template == "alpaca":
        asked, given = prompt if isinstance(prompt, Instruction) else (_one_turn(prompt), "")
        return (f"{ALPACA_INPUT}{asked}{ALPACA_GIVEN}{given}" if given else f"{ALPACA}{asked}") + ALPACA_RESPONSE
    assert tokenizer is not None, "the chat template belongs to a tokenizer"
    messages = prompt.messages if isinstance(prompt, Conversation) else (Message("user", plain_text(prompt)),)
    content = [{"role": role, "content": break_special_tokens(tokenizer, text)} for role, text in messages]
    try:
        return str(tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise jinja2's errors, and any that their expressions do
        reason = " ".join(str(error).split())
        raise UserError(f"the tokenizer's chat template refuses the conversation: {reason}") from None


def break_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text in which special tokens that its author typed are characters: a zero-width space parts them."""
    return _special_strings(tokenizer).sub(lambda match: f"{match[0][0]}\u200b{match[0][1:]}", text)


def render_response(response: str, prompt: Prompt, template: Template) -> str:
    """The response's text after a rendered prompt: a transcript's `Assistant:` is followed by a space."""
    return f" {response}" if template == "none" and isinstance(prompt, Conversation) else response


def _one_turn(prompt: str | Conversation) -> str:
    """A prompt as one instruction: a single turn's own words, or else the transcript."""
    if isinstance(prompt, str):
        return prompt
    if all(message.role == "system" for message in prompt.messages[:-1]):
        return "\n\n".join(message.content for message in prompt.messages)
    return plain_text(prompt).removesuffix("\n\nAssistant:").removeprefix("\n\n")


def fixed_strings(template: Template) -> tuple[str, ...]:
    """The constant strings of a template of ours, longest first."""
    return (ALPACA_INPUT, ALPACA, ALPACA_RESPONSE, ALPACA_GIVEN) if template == "alpaca" else ()


def train_tokenizer(texts: Iterable[str], vocab_size: int, special_strings: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; the same texts give the same tokenizer.

    It is lossless, has `<pad>` (id 0) and `<eos>` (id 1), no BOS, and pads on the left.

    Args:
        texts: what the merges are learnt from; special strings in them are left out.
        special_strings: each becomes a single token, counted in `vocab_size`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_strings),
        min_frequency=2,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    if special_strings:
        cut = re.compile("|".join(map(re.escape, special_strings)))
        texts = (part for text in texts for part in cut.split(text))
    pieces = (text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE))
    tokenizer.train_from_iterator(pieces, trainer)
    # Not "special" ones: those vanish when a decoder skips special tokens, and the prompt's text would change.
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in special_strings])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder or a GGUF file, with a pad token that ends no response.

    Raises:
        UserError: there is no tokenizer in it, none that loads, or it has no EOS.
    """
    if base.is_dir() and not any((base / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"`model.base: {base}`: no tokenizer in this folder; expected one of {', '.join(TOKENIZER_FILES)} in it"
        )
    from transformers import AutoTokenizer  # it imports torch and half of transformers: seconds that `scratch` saves

    try:
        if base.is_file():
            tokenizer = _gguf_tokenizer(base)
        else:
            tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its parser does
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"`model.base: {base}`: its tokenizer does not load: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"`model.base: {base}`: the tokenizer names no EOS token, so no response could end; "
            "set `eos_token` in its tokenizer_config.json"
        )
    ends = {tokenizer.eos_token_id, *(_ends(base) if base.is_dir() else [read_gguf(base).token_id("eot")])}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        _give_pad(tokenizer, ends)
    tokenizer.padding_side = "left"
    tokenizer.clean_up_tokenization_spaces = False  # it would take away spaces that the text has
    return cast(PreTrainedTokenizerBase, tokenizer)


def _gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with the special tokens and the BOS in front that the file says it has.

    transformers 5.17 takes a Llama's BOS for its EOS, gives others `<s>` and `</s>`, and forgets the BOS in front.
    """
    from transformers import AutoTokenizer

    said = read_gguf(path)
    uses = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {f"{name}_token": said.token(use) for use, name in uses.items()}
    with alone(path) as (folder, name):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True, **special)
    for use, token in special.items():
        setattr(tokenizer, use, token)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in said.control], True)
    if tokenizer.bos_token is not None:
        lead = [tokenizer.bos_token] if said.numbers.get("tokenizer.ggml.add_bos_token") else []
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=[*lead, "$A"], special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _ends(base: Path) -> list[int]:
    """The ids of the tokens that end a response of a folder's model, as its settings list them."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((base / name).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]
    return []


def _give_pad(tokenizer: PreTrainedTokenizerBase, ends: set[int | None]) -> None:
    """A pad token of its own: one that the vocabulary keeps for it or for no use at all, else a new `<pad>`."""
    used = {tokenizer.bos_token, tokenizer.unk_token}
    spare = [
        token.content
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and i not in ends and token.content not in used
    ]
    for word in ("pad", "reserved", "unused"):
        for content in spare:
            if word in content.lower():
                tokenizer.pad_token = content
                return
    tokenizer.add_special_tokens({"pad_token": PAD})


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, *, markup: bool
) -> list[list[int]]:
    """Token ids of rendered prompts, each at most `max_tokens` long; too long ones lose their beginning, never BOS.

    Args:
        markup: the texts were rendered by the chat template, whose special tokens count as such and which puts BOS
            itself. Otherwise such strings are ordinary text, and the tokenizer's own BOS is added. EOS never is.

    Raises:
        UserError: a prompt makes no token, or the tokenizer reads ordinary text as its EOS or pad token.
    """
    lead = [] if markup else _bos(tokenizer)
    rows = [lead + row for row in _ids(tokenizer, texts, split=not markup)]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise UserError(f"the tokenizer makes no token of the prompt {text[:60]!r}; leave this prompt out")
    return [cut_left(row, max_tokens, tokenizer.bos_token_id) for row in rows]


def encode_responses(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of responses, each at most `max_tokens` long with its EOS; one that was cut has no EOS.

    Raises:
        UserError: the tokenizer reads ordinary text as its EOS or pad token.
    """
    eos = cast(int, tokenizer.eos_token_id)
    rows = _ids(tokenizer, texts, split=True)
    return [[*row, eos] if len(row) < max_tokens else row[:max_tokens] for row in rows]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int, *, markup: bool) -> list[int]:
    """`encode_prompts` of one text."""
    return encode_prompts(tokenizer, [text], max_tokens, markup=markup)[0]


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> list[int]:
    """`encode_responses` of one text."""
    return encode_responses(tokenizer, [text], max_tokens)[0]


def cut_left(ids: list[int], max_tokens: int, bos: int | None) -> list[int]:
    """At most `max_tokens` ids: the last ones, after BOS if that was the first."""
    if len(ids) <= max_tokens:
        return ids
    lead = ids[:1] if ids[0] == bos else []
    return lead + ids[len(ids) - (max_tokens - len(lead)) :]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, split: bool) -> list[list[int]]:
    """Token ids without added special tokens; with `split`, special tokens in the texts are ordinary characters."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=split,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    if split:
        special = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
        for text, row in zip(texts, rows, strict=True):
            if not special.isdisjoint(row):
                raise UserError(
                    f"the tokenizer reads a part of {text[:60]!r} as its EOS or pad token, not as text; "
                    "change this text, or mark these tokens as special in the tokenizer's files"
                )
    return rows


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer puts before every text, if it does."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    return full[:1] if full[0] == tokenizer.bos_token_id and full != bare else []


@lru_cache(maxsize=4)
def _special_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches every special token in a text, the longest first."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    strings = sorted((s for s in special if len(s) > 1), key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, strings)) or "(?!)")

"""The model that a run starts from: where `model.base` lies on this machine, and whether it can be trained at all.

A base is a folder of the Hugging Face kind, a GGUF file, or a model of the Hub at a pinned commit. Everything here is
known from names and settings, before any weight is read, so a wrong one costs seconds. Code from a model is never run.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_tasks.errors import UserError
from rlhf_tasks.gguf_file import alone, read_gguf
from rlhf_tasks.limits import check_layer_count, positions

if TYPE_CHECKING:
    from rlhf_tasks import config

SCRATCH_POSITIONS = 2048
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
NOT_FOUND = (
    "no such folder or file; expected `scratch`, a local Hugging Face folder, a .gguf file, or `owner/name` of the Hub "
    "with its commit as `model.revision`"
)
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt", "spiece.model")
HUB_OTHERS = ("*/*", "consolidated*")  # the same weights in other forms


def find_base(model: config.Model, root: Path = Path()) -> Path | None:
    """The folder or GGUF file that `model.base` names, from the Hub if there is a revision; None is `scratch`.

    Args:
        root: what a local path is relative to.

    Raises:
        UserError: it is not there, or cannot be had.
    """
    if model.base == "scratch":
        return None
    if model.revision is not None:
        return _hub_folder(model.base, model.revision)
    path = root / model.base
    if not path.exists():
        raise UserError(f"`model.base: {model.base}`: {NOT_FOUND}")
    if path.is_file():
        read_gguf(path)
    return path


def base_at_hand(model: config.Model, root: Path = Path()) -> Path | None:
    """`find_base` without the network: None also for a model of the Hub that is not in the cache."""
    return find_base(model, root) if model.revision is None else _cached(model.base, model.revision)


def load_settings(base: Path) -> Any:
    """The configuration of a base that a causal language model with a tokenizer and whole weights can come of.

    Raises:
        UserError: the base is something else; the sentence says what.
    """
    from transformers import AutoConfig  # it imports torch: seconds that `scratch` saves

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        if base.is_file():
            with alone(base) as (folder, name):
                settings = AutoConfig.from_pretrained(folder, gguf_file=name, **options)
        else:
            _check_files(base)
            settings = AutoConfig.from_pretrained(base, **options)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises whatever its parser does
        reason, what = " ".join(str(error).split())[:300], "model" if base.is_file() else "config.json"
        raise UserError(f"`model.base: {base}`: its {what} does not load: {reason}") from None
    _check_kind(base, settings)
    _check_ends(base, settings)
    _check_models(base, settings)
    return settings


def check_vocabulary(base: Path, rows: int, tokenizer: Any) -> None:
    """See that every token of a base's tokenizer has one of the `rows` of its embedding.

    A pad token right behind them may have none: it was added without resizing, by `prepare` or before.

    Raises:
        UserError: another token has none, so tokenizer and model do not belong together.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows and not highest == tokenizer.pad_token_id == rows:
        raise UserError(
            f"`model.base: {base}`: its tokenizer has token ids up to {highest}, its model embeddings for {rows} "
            "tokens; expected the tokenizer that the model was trained with: put that there, or, if tokens were added "
            f"on purpose, save the model after `model.resize_token_embeddings({highest + 1})`"
        )


def known_positions(model: config.Model, root: Path = Path()) -> int | None:
    """`positions` of the base, as far as is known without the network."""
    if model.base == "scratch":
        return SCRATCH_POSITIONS
    base = base_at_hand(model, root)
    if base is None or base.is_dir():
        return positions(load_settings(base)) if base else None
    return read_gguf(base).positions  # transformers takes half a minute to say so


def check_layers(params: config.Params, root: Path = Path()) -> None:
    """See that something is left below the layers that are to learn, as far as is known without the network.

    Raises:
        UserError: the model has not more layers than that.
    """
    model, asked = params.model, {name: getattr(params, name).trainable_layers for name in ("reward", "ppo")}
    if not any(asked.values()):
        return
    have: int | None = model.scratch.layers
    if model.base != "scratch":
        base = base_at_hand(model, root)
        if base and base.is_file():  # transformers takes half a minute to say so
            have = read_gguf(base).layers
        else:
            have = load_settings(base).get_text_config().num_hidden_layers if base else None
    for name, count in asked.items():
        if count and have:
            check_layer_count(f"{name}.trainable_layers", count, have)


def check_lengths(base: str, have: int | None, data: config.Data, max_new_tokens: int = 0) -> None:
    """See that a prompt and a response, each as long as params.yaml allows, fit a model of `have` positions.

    Raises:
        UserError: they do not.
    """
    response = max(max_new_tokens, data.max_response_tokens)
    key = "generation.max_new_tokens" if response == max_new_tokens else "data.max_response_tokens"
    if have is not None and data.max_prompt_tokens + response > have:
        raise UserError(
            f"data.max_prompt_tokens: {data.max_prompt_tokens} and {key}: {response} make "
            f"{data.max_prompt_tokens + response} tokens, but the model of `model.base: {base}` has {have} positions; "
            "lower one of the two"
        )


def _hub_folder(name: str, revision: str) -> Path:
    """The files of a Hub model at its pinned commit: from the cache, and what that lacks from the Hub.

    A commit's files never change: its id is their digest, and nothing is asked of the Hub about files that are there.
    """
    try:
        return _snapshot(name, revision, local_files_only=False)
    except Exception as error:  # huggingface_hub's own errors, httpx's, and those of the file system
        if cached := _cached(name, revision):  # filled by another program, without a list of the commit's files
            return cached
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(
            f"`model.base: {name}` at `model.revision: {revision}`: not in the cache and not to be had from the Hub: "
            f"{reason}; check both, HF_HUB_OFFLINE and, for a gated model, HF_TOKEN, or run where the Hub is reached"
        ) from None


def _cached(name: str, revision: str) -> Path | None:
    """The folder of a Hub model in the local cache; None where it is not there whole."""
    try:
        return _snapshot(name, revision, local_files_only=True)
    except (OSError, ValueError):
        return None


def _snapshot(name: str, revision: str, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=list(HUB_OTHERS),
            local_files_only=local_files_only,
        )
    )


def _check_files(folder: Path) -> None:
    """What can be told from the names of the files, and from config.json as text."""
    where, names = f"`model.base: {folder}`", {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise UserError(
                f"{where}: found a PEFT adapter, expected a whole model; merge it into the one that it was trained on "
                "(`merge_and_unload()`) and save the result with its tokenizer"
            )
        if gguf := sorted(name for name in names if name.endswith(".gguf")):
            raise UserError(
                f"{where}: found a folder of GGUF files; name one of them: `model.base: {folder / gguf[0]}`"
            )
        raise UserError(
            f"{where}: no config.json in this folder; expected a Hugging Face folder, as `save_pretrained` leaves"
        )
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise UserError(f"{where}: config.json holds no object; expected the settings that `save_pretrained` leaves")
    if quantised := document.get("quantization_config"):
        kind = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise UserError(
            f"{where}: found quantised weights ({kind}), expected plain ones; start from the model they were made of"
        )
    room = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    layers = max((n for key, n in document.items() if key in LAYERS and isinstance(n, int)), default=0)
    if room and layers > room:  # some settings make a list of them as soon as they are read
        raise UserError(f"{where}: found {layers:,} layers in config.json, but {room:,} bytes of weights")
    if not room:
        pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
        found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
        raise UserError(
            f"{where}: found {found}; expected safetensors: where you trust it, load the model and "
            "`save_pretrained` it once more"
        )


def _check_kind(base: Path, settings: Any) -> None:
    """What can be told from the settings: that it is one text model that writes, from left to right."""
    from transformers.models.auto import modeling_auto as known

    where, kind = f"`model.base: {base}`", settings.model_type
    wanted = "expected a causal language model, such as Llama, Qwen, Gemma, Mistral, GPT-2, GPT-NeoX, OPT or Phi"
    if settings.is_encoder_decoder:
        raise UserError(f"{where}: found an encoder-decoder model ({kind}), {wanted}")
    if any(getattr(settings, f"{sense}_config", None) is not None for sense in ("vision", "audio")):
        raise UserError(f"{where}: found a model of images or sound ({kind}), {wanted}, of text alone")
    if kind not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{where}: found a model that writes no text ({kind}), {wanted}")
    layers = getattr(settings.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"{where}: found {layers} layers in its settings, expected at least 1")
    made_as, class_name = settings.architectures or [], known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    if made_as and class_name.lower() not in [str(name).lower() for name in made_as]:
        raise UserError(f"{where}: config.json says {made_as[0]}, expected {class_name}: a base that writes text")
    if kind not in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(
            f"{where}: transformers has no sequence classifier of its kind ({kind}), so no Reward or Critic can be "
            "made of it; choose another base"
        )


def _check_ends(base: Path, settings: Any) -> None:
    """See that what the base says ends a response are tokens of its vocabulary."""
    where, rows, name = f"`model.base: {base}`", settings.get_text_config().vocab_size, "config.json"
    if base.is_file():
        said, name = read_gguf(base), base.name
        found: Any = [number for use in ("eos", "eot") if (number := said.token_id(use)) is not None]
    elif (path := base / "generation_config.json").exists():
        name = path.name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["eos_token_id"]
        except KeyError:
            return
        except (OSError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: its {name} does not load: {reason}; mend it, or delete it") from None
    else:
        found = settings.eos_token_id
    for number in found if isinstance(found, list) else [found]:
        if number is not None and (type(number) is not int or not 0 <= number < rows):
            raise UserError(
                f"{where}: found `eos_token_id: {json.dumps(found)}` in its {name}, expected the number of a token, "
                f"0 to {rows - 1}, or a list of them; correct it there"
            )


def _check_models(base: Path, settings: Any) -> None:
    """See, without weights, that the four models can be made: a trunk, and on it a head named `score`."""
    import torch
    from transformers import AutoModelForSequenceClassification

    where, asked = f"`model.base: {base}`", copy.deepcopy(settings)
    try:
        with torch.device("meta"):
            scorer = AutoModelForSequenceClassification.from_config(asked)
    except Exception as error:  # whatever the code of a kind raises at settings that it cannot use
        reason = f"nothing is known there as {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"{where}: transformers can make no {settings.model_type} of its settings: {reason[:300]}; expected those "
            "that its weights were saved with"
        ) from None
    if not isinstance(getattr(scorer, "score", None), torch.nn.Linear) or not hasattr(scorer, scorer.base_model_prefix):
        raise UserError(
            f"{where}: {type(scorer).__name__} of transformers has no linear head `score` on one trunk, so no Reward "
            "or Critic can be made of it; choose another base"
        )

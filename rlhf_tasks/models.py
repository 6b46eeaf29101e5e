"""Making, loading and saving the four models.

Actor and Ref are causal language models; Reward and Critic are sequence classifiers with one label. All run with
dropout off, in float32, from safetensors; code from a model's folder is never run.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rlhf_tasks.errors import UserError
from rlhf_tasks.seeds import derive_seed
from rlhf_tasks.trunk import frozen_names

if TYPE_CHECKING:
    from rlhf_tasks import config

LEAST_OF_A_LAYER = 32  # weights
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
SCORE_STATISTICS = "score_statistics.json"
#: names in a file that change nothing of what a model writes: buffers that old versions saved, and heads for values
IDLE = re.compile(r"(?:inv_freq|masked_bias|position_ids)$|^(?:score|v_head|value_head)\.")


def set_up_torch(runtime: config.Runtime) -> torch.device:
    """Fix what changes bits: thread count and algorithms. Returns the device.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    check_device(runtime)
    torch.set_num_threads(runtime.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over each
    _keep_freed_memory()
    return torch.device(runtime.device)


def check_device(runtime: config.Runtime) -> None:
    """See that the device is there.

    Raises:
        UserError: it is a GPU, and there is none.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device: found `cuda`, but torch sees no GPU here; set it to `cpu`")


def _keep_freed_memory() -> None:
    """Have glibc keep memory that is freed for the next tensor: memory that the system gave anew costs most of a
    millisecond a megabyte to touch. Tensors above 32 MB always come from the system."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # other C libraries have none
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder, padding on the left.

    Raises:
        UserError: the folder holds none that loads without running code of its own.
    """
    options: dict[str, Any] = {"padding_side": "left", "local_files_only": True, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # a damaged file raises whatever its parser does
        raise UserError(f"{folder}: its tokenizer does not load: {' '.join(str(error).split())[:300]}") from None


def load_actor(folder: Path, device: torch.device) -> Any:
    """An Actor or Ref from a checkpoint folder."""
    return _load(AutoModelForCausalLM, folder).to(device).eval()


def load_scorer(folder: Path, device: torch.device) -> Any:
    """A Reward or Critic from a checkpoint folder."""
    return _load(AutoModelForSequenceClassification, folder, num_labels=1).to(device).eval()


def new_scorer(sft: Path, tokenizer: Any, seed: int, purpose: str, device: torch.device) -> Any:
    """The SFT model's trunk with a new scalar head, drawn for the `purpose`: "reward" or "critic"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, purpose, "weights"))
        scorer = _load(AutoModelForSequenceClassification, sft, new=("score.weight",), num_labels=1)
    return ready(scorer, tokenizer).to(device)


def ready(model: Any, tokenizer: Any) -> Any:
    """A new model for use: pad id as the tokenizer says, dropout off."""
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def freeze(model: Any) -> Any:
    """Take a model out of training."""
    return model.eval().requires_grad_(False)


def save_model(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Write a Hugging Face folder: config, safetensors and, if given, the tokenizer.

    A frozen trunk is a shard of its own, the same file in the folder of every model that has it: DVC keeps it once.
    """
    model.save_pretrained(folder)
    if frozen := frozen_names(model):
        _save_shards(model, folder, frozen)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_shards(model: Any, folder: Path, first: Collection[str]) -> None:
    """Put a model's weights into two files in place of one, those named and the others.

    Names in files are not always those in memory, so transformers saves each part.
    """
    whole, weight_map, size = folder / SAFE_WEIGHTS_NAME, dict[str, str](), 0
    everything = load_file(whole)
    own = model.state_dict()
    with TemporaryDirectory(dir=folder) as part:
        model.save_pretrained(part, state_dict={name: own[name] for name in sorted(first)})
        names = load_file(Path(part, SAFE_WEIGHTS_NAME)).keys()
    for number, chosen in enumerate((everything.keys() & names, everything.keys() - names), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: everything[name] for name in sorted(chosen)}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sorted(chosen), shard)
        size += sum(everything[name].nbytes for name in chosen)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1))
    whole.unlink()


def load_score_statistics(reward: Path) -> tuple[float, float]:
    """Mean and standard deviation of the Reward's scores on SFT samples."""
    statistics = json.loads((reward / SCORE_STATISTICS).read_text())
    return statistics["mean"], statistics["std"]


def load_sft_length(reward: Path) -> float:
    """Mean tokens of the same samples, EOS included."""
    return float(json.loads((reward / SCORE_STATISTICS).read_text())["length"])


def stop_ids(model: Any, tokenizer: Any, stop: str | None) -> list[int]:
    """Every token that ends a response: the tokenizer's and the model's EOS, and the configured stop token.

    Raises:
        UserError: `generation.stop` is not one token of this tokenizer.
    """
    configured = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    if stop is not None:
        ids.add(stop_id(tokenizer, stop))
    return sorted(ids)


def stop_id(tokenizer: Any, stop: str) -> int:
    """The token of `generation.stop`.

    Raises:
        UserError: it is not one token of this tokenizer.
    """
    tokens: list[int] = tokenizer.encode(stop, add_special_tokens=False)
    if len(tokens) != 1:
        raise UserError(
            f"generation.stop: found {stop!r}, which is {len(tokens)} tokens; expected a text that is one token"
        )
    return tokens[0]


def _load(kind: Any, folder: Path, new: tuple[str, ...] = (), **options: Any) -> Any:
    """A model of a folder. It has every weight but those that are to be `new`, in place of another head's; no other is
    made up, or left out, silently.
    """
    try:
        _check_settings(folder)
        model, found = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # said below, in a sentence
            **options,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder}: not a loadable {kind.__name__[9:]} folder with safetensors weights: {first}"
        ) from error
    if wrong := sorted(found["mismatched_keys"]):
        name, have, want = wrong[0]
        raise UserError(f"{folder}: {name} is {list(have)} in its file, but {list(want)} by its config.json")
    if missing := sorted(set(found["missing_keys"]) - set(new)):
        expected = f"expected all of its {type(model).__name__}"
        raise UserError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}; {expected}")
    if unused := sorted(name for name in found["unexpected_keys"] if not new and not IDLE.search(name)):
        raise UserError(
            f"{folder}: {len(unused)} weights in its files are not of the {type(model).__name__} that its config.json "
            f"describes, such as {unused[0]}; expected the config.json that they were saved with"
        )
    return model


def _check_settings(folder: Path) -> None:
    """Look at what config.json would have us run and allocate, before anything is.

    Raises:
        UserError: it asks for code from elsewhere, or describes a model far larger than the weights beside it.
    """
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if "/" in (kernel := str(getattr(settings, "_attn_implementation", None) or "")):
        raise UserError(f"{folder}: config.json asks for the attention kernel {kernel}, which is code from elsewhere")
    if room := sum(file.stat().st_size for file in folder.glob("*.safetensors")):
        check_size(folder, settings, room)  # a weight takes a byte at least


def check_size(where: Path, settings: Any, room: int) -> None:
    """See that settings describe no model of far more weights than there can be.

    Raises:
        UserError: they do.
    """
    elements = getattr(settings, "num_hidden_layers", 0) * LEAST_OF_A_LAYER
    if elements <= room:
        with torch.device("meta"):
            elements = sum(p.numel() for p in AutoModel.from_config(settings).parameters())
    if elements > room:
        text = f"{elements:,} weights or more in its settings, but room for {room:,} in its file"
        raise UserError(f"{where}: found {text}; expected the settings that these weights were saved with")

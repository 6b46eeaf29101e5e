"""Where a base comes from, and the ones that are refused: in a sentence, before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import write_shape
from transformers import (
    BertConfig,
    CLIPConfig,
    CohereConfig,
    LlamaConfig,
    LlavaConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from rlhf_tasks import config, keying
from rlhf_tasks.base import check_layers, check_lengths, find_base, known_positions, load_settings, positions
from rlhf_tasks.config import parse_params
from rlhf_tasks.data import prepare
from rlhf_tasks.errors import UserError
from rlhf_tasks.first_actor import new_actor
from rlhf_tasks.models import load_tokenizer
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "llama"
    write_shape("llama", folder)
    return folder


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    """A good base, to be spoiled."""
    return Path(shutil.copytree(llama, tmp_path / "base"))


def settings(**changes: Any) -> Change:
    """Spoils config.json; None takes a key out."""

    def change(base: Path) -> None:
        path = base / "config.json"
        document = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))

    return change


def of_kind(kind: Any) -> Change:
    return lambda base: kind().save_pretrained(base)


def pickled(base: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def adapter(base: Path) -> None:
    (base / "config.json").rename(base / "adapter_config.json")
    (base / "model.safetensors").rename(base / "adapter_model.safetensors")


def only_gguf(base: Path) -> None:
    (base / "config.json").unlink()
    (base / "llama-Q4_0.gguf").touch()


def more_tokens(base: Path) -> None:
    words = load_tokenizer(base)
    words.add_tokens(["<one>", "<two>"])
    words.save_pretrained(base)


def sequence_classifier(base: Path) -> None:
    settings(architectures=["LlamaForSequenceClassification"])(base)


REFUSED: dict[str, tuple[Change, str]] = {
    "more tokens than embeddings": (
        more_tokens,
        r"its tokenizer has token ids up to 295, its model embeddings for 293 tokens; expected the tokenizer that",
    ),
    "an encoder-decoder": (of_kind(T5Config), r"found an encoder-decoder model \(t5\), expected a causal language"),
    "speech": (of_kind(WhisperConfig), r"found an encoder-decoder model \(whisper\), expected a causal"),
    "images and text": (
        of_kind(LlavaConfig),
        r"found a model of images or sound \(llava\), expected .*, of text alone",
    ),
    "images beside text": (of_kind(CLIPConfig), r"found a model of images or sound \(clip\), expected a causal"),
    "images": (of_kind(ViTConfig), r"found a model that writes no text \(vit\), expected a causal language model"),
    "an encoder": (
        lambda base: BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(base),
        r"config\.json says BertForMaskedLM, expected BertLMHeadModel: a base that writes text",
    ),
    "a sequence classifier": (
        sequence_classifier,
        r"config\.json says LlamaForSequenceClassification, expected LlamaForCausalLM",
    ),
    "no sequence classifier of its kind": (
        of_kind(CohereConfig),
        r"transformers has no sequence classifier of its kind \(cohere\), so no Reward or Critic",
    ),
    "pickled weights": (pickled, r"found only pytorch_model\.bin, a pickle, which can run code; expected safetensors"),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), r"found no weights; expected safetensors"),
    "a PEFT adapter": (adapter, r"found a PEFT adapter, expected a whole model; merge it"),
    "quantised weights": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"found quantised weights \(gptq\), expected plain ones",
    ),
    "a folder of GGUF files": (only_gguf, r"name one of them: `model\.base: \S+/base/llama-Q4_0\.gguf`"),
    "no config": (lambda base: (base / "config.json").unlink(), r"no config\.json in this folder"),
    "a config that is cut": (
        lambda base: (base / "config.json").write_text('{"model_type": "lla'),
        r"its config\.json does not load: ",
    ),
    "a config that is a list": (lambda base: (base / "config.json").write_text("[]"), r"config\.json holds no object"),
    "two billion layers": (
        settings(model_type="qwen2", num_hidden_layers=2_000_000_000),
        r"found 2,000,000,000 layers in config\.json, but \d+,\d+ bytes of weights",
    ),
    "a kind that nobody knows": (settings(model_type="evil", auto_map={"AutoConfig": "evil.C"}), r"does not load: "),
    "few positions": (
        settings(max_position_embeddings=50),
        r"data\.max_prompt_tokens: 16 and data\.max_response_tokens: 40 make 56 tokens, but .* has 50 positions; lower",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_base_that_cannot_be_trained_is_refused_by_prepare(base: Path, tmp_path: Path, what: str) -> None:
    spoil, message = REFUSED[what]
    spoil(base)
    (base / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "pairs.jsonl").write_text("")  # not reached
    data = {"sources": [{"kind": "preference", "path": "no"}], "max_prompt_tokens": 16, "max_response_tokens": 40}
    params = parse_params({"data": data, "model": {"base": str(base)}})
    with pytest.raises(UserError, match=message) as caught:
        prepare.run(seed=0, data=params.data, model=params.model, out=tmp_path / "out", progress=lambda **values: None)
    assert "base`: " in str(caught.value) or "few" in what
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused_before_sft(base: Path) -> None:
    """What `prepare` cannot see, because it reads no weights."""
    words = load_tokenizer(base)
    words.add_special_tokens({"pad_token": "<pad>"})
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-3]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"base: lm_head\.weight is \[290, 32\] in its file, but \[293, 32\] by its config\.json"
    ):
        new_actor(config.Model(base=str(base)), words, 0)


def test_a_tokenizer_of_another_model_is_refused_before_sft(base: Path) -> None:
    words = load_tokenizer(base)
    words.add_tokens(["<one>"])
    words.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(UserError, match=r"token ids up to 294, its model embeddings for 293 tokens"):
        new_actor(config.Model(base=str(base)), words, 0)


def test_scratch_is_no_place_and_has_2048_positions() -> None:
    assert find_base(config.Model()) is None
    assert known_positions(config.Model()) == 2048


def test_a_path_is_relative_to_the_project(llama: Path) -> None:
    model = config.Model(base="llama")
    assert find_base(model, llama.parent) == llama
    assert known_positions(model, llama.parent) == positions(load_settings(llama)) == 96


@pytest.mark.parametrize(("limit", "refused"), [(80, False), (81, True)])
def test_prompt_and_answer_must_fit_the_positions(limit: int, refused: bool) -> None:
    data = config.Data.model_validate(
        {"sources": [{"kind": "sft", "path": "x"}], "max_prompt_tokens": 16, "max_response_tokens": 8}
    )
    if not refused:
        check_lengths("base", 96, data, limit)
        check_lengths("base", None, data, 10**9)
        return
    with pytest.raises(UserError, match=r"generation\.max_new_tokens: 81 make 97 tokens, but .* has 96 positions"):
        check_lengths("base", 96, data, limit)


def test_the_reward_looks_at_the_longest_prompt_before_it_trains(
    workspace: Callable[..., Workspace], run_stages: Callable[..., Any], llama: Path
) -> None:
    project = workspace("model.base=base", "generation.max_new_tokens=95")
    shutil.copytree(llama, project.root / "base")
    run_stages(project, "prepare", "sft")
    message = r"generation\.max_new_tokens: 95 after a prompt of \d+ tokens, but the model has 96 positions"
    with pytest.raises(UserError, match=message):
        run_stages(project, "reward")


def test_a_base_that_is_not_there_is_told_before_anything_runs(sketch: Workspace) -> None:
    for base, said in {
        "no/such/folder": "no such folder or file; expected `scratch`, a local Hugging Face folder or a .gguf file$",
        "owner/name": "no such folder or file; .* a model of the Hub needs its commit as `model.revision` too$",
    }.items():
        params = sketch.params.model_copy(update={"model": config.Model(base=base)})
        with pytest.raises(UserError, match=rf"^`model\.base: {base}`: {said}"):
            keying.check_sources(params, sketch.root, [STAGES["prepare"]])


def test_config_is_the_only_text_of_a_llama_here(llama: Path) -> None:
    """The table above starts from a base that is right."""
    assert isinstance(load_settings(llama), LlamaConfig)


@pytest.mark.parametrize(("reward", "ppo", "named"), [(2, 2, "reward"), (1, 2, "ppo"), (1, 1, None)])
@pytest.mark.parametrize("base", ["scratch", "base"])
def test_layers_that_learn_must_leave_some_below(
    workspace: Any, tmp_path: Path, base: str, reward: int, ppo: int, named: str | None
) -> None:
    """Known before anything is trained."""
    write_shape("qwen2", tmp_path / "base")
    layers = (f"reward.trainable_layers={reward}", f"ppo.trainable_layers={ppo}")
    params = workspace(f"model.base={base}", "model.scratch.layers=2", *layers).params
    if named is None:
        check_layers(params, tmp_path)
        return
    text = rf"{named}\.trainable_layers: found 2, but the model of `model\.base: {base}` has 2 layers; expected fewer"
    with pytest.raises(UserError, match=text):
        check_layers(params, tmp_path)

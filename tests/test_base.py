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
from shapes import SHAPES, write_shape
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
from rlhf_tasks.base import check_layers, check_lengths, find_base, known_positions, load_settings
from rlhf_tasks.config import parse_params
from rlhf_tasks.data import prepare
from rlhf_tasks.data.encoding import load_tokenizer as load_base_tokenizer
from rlhf_tasks.errors import UserError
from rlhf_tasks.first_actor import new_actor
from rlhf_tasks.limits import positions
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


def generation(**changes: Any) -> Change:
    """Spoils generation_config.json."""

    def change(base: Path) -> None:
        path = base / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(**changes: torch.Tensor) -> Change:
    """Puts tensors, by their names with `__` for the dots, into the file of weights."""

    def change(base: Path) -> None:
        path = base / "model.safetensors"
        tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file(tensors, path, metadata={"format": "pt"})

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


def eos_in_config(base: Path) -> None:
    settings(eos_token_id=293)(base)
    (base / "generation_config.json").unlink()


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
    "no layers": (settings(num_hidden_layers=0), r"found 0 layers in its settings, expected at least 1"),
    "an activation that nobody knows": (
        settings(hidden_act="nope"),
        r"transformers can make no llama of its settings: nothing is known there as 'nope'; expected those",
    ),
    "an EOS as text": (
        generation(eos_token_id="</s>"),
        r"found `eos_token_id: \"</s>\"` in its generation_config\.json, expected the number of a token, 0 to 292, or",
    ),
    "an EOS that is no token": (generation(eos_token_id=[1, 99999]), r"found `eos_token_id: \[1, 99999\]` in its gen"),
    "an EOS that is no token, of old": (eos_in_config, r"found `eos_token_id: 293` in its config\.json"),
    "generation settings that are cut": (
        lambda base: (base / "generation_config.json").write_text("{"),
        r"its generation_config\.json does not load: .*; mend it, or delete it",
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


NAN, INFINITE = torch.full((293, 32), torch.nan), torch.full((32,), torch.inf)
SPOILT: dict[str, tuple[Change, str]] = {
    "fewer layers than weights": (
        settings(num_hidden_layers=1),
        r"9 weights in its files are not of the LlamaForCausalLM that its config\.json describes, such as model\.layers"
        r"\.1\.input_layernorm\.weight; expected the config\.json that they were saved with",
    ),
    "a weight of another model": (weights(model__mtp__weight=torch.ones(2)), r"1 weights .*, such as model\.mtp\.wei"),
    "not a number": (weights(lm_head__weight=NAN), r"lm_head\.weight holds numbers that are not finite"),
    "infinite": (weights(model__norm__weight=INFINITE), r"model\.norm\.weight holds numbers that are not finite"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_weights_that_no_model_can_be_made_of_are_refused_before_sft(base: Path, what: str) -> None:
    spoil, message = SPOILT[what]
    words = load_tokenizer(base)
    words.add_special_tokens({"pad_token": "<pad>"})
    spoil(base)
    with pytest.raises(UserError, match=message):
        new_actor(config.Model(base=str(base)), words, 0)


def test_what_changes_nothing_of_what_a_model_writes_may_lie_beside_its_weights(base: Path) -> None:
    """Buffers of earlier versions, and the head of a scorer or a critic."""
    words = load_tokenizer(base)
    words.add_special_tokens({"pad_token": "<pad>"})
    before = new_actor(config.Model(base=str(base)), words, 0).state_dict()
    idle = ("model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.h.0.attn.masked_bias", "score.weight")
    idle += ("v_head.summary.weight", "value_head.weight")
    weights(**{name: torch.ones(2) for name in idle})(base)
    after = new_actor(config.Model(base=str(base)), words, 0).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.tied])
def test_a_head_that_is_tied_may_stand_in_the_file(tmp_path: Path, name: str) -> None:
    own = write_shape(name, tmp_path / "base")
    words = load_base_tokenizer(tmp_path / "base")
    weights(lm_head__weight=own.get_input_embeddings().weight.detach().clone())(tmp_path / "base")
    actor = new_actor(config.Model(base=str(tmp_path / "base")), words, 0)
    assert actor.get_output_embeddings().weight is actor.get_input_embeddings().weight


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
    said = (
        "no such folder or file; expected `scratch`, .* folder, a .gguf file, or `owner/name` of the Hub with its com"
    )
    for base in ("no/such/folder", "owner/name", "gpt2"):
        model = config.Model(base=base)
        with pytest.raises(UserError, match=rf"^`model\.base: {base}`: {said}"):
            keying.check_sources(sketch.params.model_copy(update={"model": model}), sketch.root, [STAGES["prepare"]])
        with pytest.raises(UserError, match=rf"^`model\.base: {base}`: {said}"):
            find_base(model)


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
    text = rf"{named}\.trainable_layers: found 2, but the model has 2 layers; expected fewer than that"
    with pytest.raises(UserError, match=text):
        check_layers(params, tmp_path)

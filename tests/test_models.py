"""Making, loading and saving models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_tasks import config
from rlhf_tasks.errors import UserError
from rlhf_tasks.first_actor import new_actor
from rlhf_tasks.models import (
    freeze,
    load_actor,
    load_score_statistics,
    load_scorer,
    load_sft_length,
    load_tokenizer,
    new_scorer,
    save_model,
    set_up_torch,
    stop_ids,
)

CPU = torch.device("cpu")
SCRATCH = config.Scratch(vocab_size=300, hidden_size=32, intermediate_size=64, layers=2, heads=2)


# Making models -------------------------------------------------------------------------------------------------------


def test_new_models_belong_to_their_seed_and_leave_the_generator_alone(tokenizer: Any, tiny_actor: Path) -> None:
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    actors = [new_actor(config.Model(scratch=SCRATCH), tokenizer, seed).state_dict() for seed in (0, 0, 1)]
    heads = [new_scorer(tiny_actor, tokenizer, seed, "reward", CPU).score.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), undisturbed)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(actors[0][name], actors[1][name])
    assert not torch.equal(actors[0][name], actors[2][name])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_new_actor_is_as_configured(tokenizer: Any) -> None:
    actor = new_actor(config.Model(scratch=SCRATCH), tokenizer, 0)
    shape = actor.config
    assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == (32, 2, 2)
    assert shape.vocab_size == len(tokenizer)
    assert (shape.pad_token_id, shape.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert shape.pad_token_id != shape.eos_token_id
    assert not actor.training


def test_a_reward_has_the_trunk_of_sft(tokenizer: Any, tiny_actor: Path) -> None:
    actor, reward = load_actor(tiny_actor, CPU), new_scorer(tiny_actor, tokenizer, 0, "reward", CPU)
    assert all(torch.equal(reward.model.state_dict()[name], x) for name, x in actor.model.state_dict().items())
    assert reward.score.weight.shape == (1, 32)


def test_frozen_models_learn_nothing(four: Any) -> None:
    freeze(four.ref.train())
    assert not four.ref.training
    assert not any(parameter.requires_grad for parameter in four.ref.parameters())


# Folders -------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_to_the_bit(four: Any, tmp_path: Path, tokenizer: Any) -> None:
    save_model(four.actor, tmp_path / "actor", tokenizer)
    save_model(four.critic, tmp_path / "critic")
    for model, loaded in (
        (four.actor, load_actor(tmp_path / "actor", CPU)),
        (four.critic, load_scorer(tmp_path / "critic", CPU)),
    ):
        assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
        assert not loaded.training
    assert load_tokenizer(tmp_path / "actor").encode("A warm film") == tokenizer.encode("A warm film")
    assert load_tokenizer(tmp_path / "actor").padding_side == "left"


def test_a_model_has_one_text_on_disk(four: Any, tiny_actor: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_model(load_actor(tiny_actor, CPU), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_score_statistics_are_read_from_the_rewards_folder(tiny_scorer: Path) -> None:
    assert load_score_statistics(tiny_scorer) == (0.5, 2.0)
    assert load_sft_length(tiny_scorer) == 6.0


@pytest.mark.parametrize("load", [load_actor, load_scorer])
@pytest.mark.parametrize("content", ["nothing", "empty", "config only", "pickled weights"])
def test_a_folder_without_weights_is_named_in_a_sentence(
    tiny_actor: Path, tmp_path: Path, load: Any, content: str
) -> None:
    folder = tmp_path / "model"
    if content != "nothing":
        folder.mkdir()
    if content in ("config only", "pickled weights"):
        shutil.copyfile(tiny_actor / "config.json", folder / "config.json")
    if content == "pickled weights":
        torch.save(load_actor(tiny_actor, CPU).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"{folder}: not a loadable .* folder with safetensors weights") as caught:
        load(folder, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("load", "lost"),
    [
        (load_actor, "model.layers.1.mlp.down_proj.weight"),
        (load_scorer, "score.weight"),
        (lambda folder, device: new_scorer(folder, load_tokenizer(folder), 0, "reward", device), "model.norm.weight"),
    ],
)
def test_weights_that_are_missing_are_not_made_up(
    tiny_actor: Path, tiny_scorer: Path, tmp_path: Path, load: Any, lost: str
) -> None:
    shutil.copytree(tiny_scorer if load is load_scorer else tiny_actor, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 weights are missing, such as {lost}"):
        load(tmp_path / "model", CPU)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"intermediate_size": 20_000_000}, "weights or more in its settings"),
        ({"num_hidden_layers": 2_000_000_000}, "weights or more in its settings"),
        ({"_attn_implementation": "somebody/kernel"}, "code from elsewhere"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "not a loadable"),
        ({"model_type": 7}, "not a loadable"),
    ],
)
def test_a_config_of_somebody_elses_is_looked_at_first(
    tiny_actor: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    """It can name sizes that fill the memory, and code."""
    shutil.copytree(tiny_actor, tmp_path / "model")
    (tmp_path / "model/evil.py").write_text("raise SystemExit('ran')")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=said):
        load_actor(tmp_path / "model", CPU)


def test_a_tokenizer_with_code_of_its_own_is_refused(tiny_actor: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_actor, tmp_path / "model")
    (tmp_path / "model/evil.py").write_text("raise SystemExit('ran')")
    path = tmp_path / "model/tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(UserError, match="its tokenizer does not load"):
        load_tokenizer(tmp_path / "model")


def test_asking_for_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"runtime\.device: found `cuda`"):
        set_up_torch(config.Runtime(threads=1, device="cuda"))


def test_setting_up_torch_fixes_threads_and_algorithms() -> None:
    assert set_up_torch(config.Runtime(threads=1)) == CPU
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


# What ends a response ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "stop", "texts"),
    [
        (None, None, ["<eos>"]),
        (1, None, ["<eos>"]),
        ([1, 7], None, ["<eos>", 7]),
        (1, ".", ["<eos>", "."]),
        (1, "<eos>", ["<eos>"]),
    ],
)
def test_every_end_of_a_response_is_known(
    four: Any, tokenizer: Any, configured: Any, stop: str | None, texts: list[str | int]
) -> None:
    four.actor.generation_config.eos_token_id = configured
    expected = {text if isinstance(text, int) else tokenizer.convert_tokens_to_ids(text) for text in texts}
    assert stop_ids(four.actor, tokenizer, stop) == sorted(expected)


@pytest.mark.parametrize("stop", ["two words", ""])
def test_a_stop_text_must_be_one_token(four: Any, tokenizer: Any, stop: str) -> None:
    with pytest.raises(UserError, match=rf"generation\.stop: found {stop!r}.*expected"):
        stop_ids(four.actor, tokenizer, stop)

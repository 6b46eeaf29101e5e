"""A GGUF file as the base: the same model as the folder it was made of; and files that are not what they say."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from changes import stage_keys
from shapes import CHATML, SHAPES, write_shape
from transformers import AutoTokenizer

from rlhf_tasks import config, keying
from rlhf_tasks.base import check_layers, find_base, known_positions, load_settings
from rlhf_tasks.data.encoding import encode_prompt, encode_response, load_tokenizer
from rlhf_tasks.errors import UserError
from rlhf_tasks.first_actor import new_actor
from rlhf_tasks.gguf_file import read_gguf
from rlhf_tasks.models import load_actor, save_model, stop_ids
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import digest_path
from rlhf_tasks.workspace import Workspace

CPU = torch.device("cpu")
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def write_gguf(folder: Path, path: Path, name: str, kind: Any = gguf.GGMLQuantizationType.F32) -> None:
    """A shape's folder as llama.cpp's converter writes it."""
    model, words = load_actor(folder, CPU), AutoTokenizer.from_pretrained(folder)
    shape = model.config
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_vocab_size(shape.vocab_size)
    add_tokenizer(writer, words, shape.vocab_size, name)
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], shape.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and shape.tie_word_embeddings:
            continue
        weights = tensor.numpy()
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = shape.num_attention_heads if "q_proj" in key else shape.num_key_value_heads
            weights = weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)
        place = names.get_name(key, try_suffixes=(".weight", ".bias"))
        packed = kind if weights.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(place, gguf.quants.quantize(np.ascontiguousarray(weights), packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, words: Any, rows: int, name: str) -> None:
    backend, shape = json.loads(words.backend_tokenizer.to_str()), SHAPES[name]
    tokens = sorted(words.get_vocab(), key=words.get_vocab().get)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), rows)]  # as the converter fills rows that no token has
    kinds = [3 if token in shape.specials else 5 if token.startswith("[PAD") else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    for use in ("bos", "eos", "pad"):
        if (number := getattr(words, f"{use}_token_id")) is not None:
            getattr(writer, f"add_{use}_token_id")(number)
    writer.add_add_bos_token(bool(shape.named.get("adds_bos")))
    if name == "llama":
        writer.add_eot_token_id(words.convert_tokens_to_ids("<|eot|>"))
    if words.chat_template:
        writer.add_chat_template(CHATML)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A shape's name, its folder, and the file made of it."""
    root = tmp_path_factory.mktemp("gguf")
    write_shape(request.param, root / "folder")
    write_gguf(root / "folder", root / "own.gguf", request.param)
    return request.param, root / "folder", root / "own.gguf"


def test_a_file_is_the_model_that_it_was_made_of(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    """The same logits; what ends an answer; and what was loaded can be saved."""
    name, folder, path = pair
    words = load_tokenizer(path)
    actor, own = new_actor(config.Model(base=str(path)), words, 0), load_actor(folder, CPU)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = own.config.vocab_size
        torch.testing.assert_close(actor(input_ids=ids).logits[..., :rows], own(input_ids=ids).logits)
    assert own(input_ids=ids).logits.std() > 0.3
    assert all(p.dtype == torch.float32 for p in actor.parameters())
    eos = {SHAPES[name].named["eos_token"]} | ({"<|eot|>"} if name == "llama" else set())
    assert set(stop_ids(actor, words, None)) == set(words.convert_tokens_to_ids(list(eos)))
    save_model(actor, tmp_path / "saved", words)
    again = load_actor(tmp_path / "saved", CPU).state_dict()
    assert all(torch.equal(x, again[key]) for key, x in actor.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_its_tokenizer_is_that_of_the_folder(pair: tuple[str, Path, Path]) -> None:
    """Special tokens, BOS in front, chat template: as the file says, whatever transformers makes of it."""
    name, folder, path = pair
    ours, theirs = load_tokenizer(path), load_tokenizer(folder)
    for text in ("A warm and funny film: it's  a rare 123.\n", f"typed {theirs.eos_token} myself", "电影 é"):
        assert encode_prompt(ours, text, 99, markup=False) == encode_prompt(theirs, text, 99, markup=False)
        assert encode_prompt(ours, text, 99, markup=True) == encode_prompt(theirs, text, 99, markup=True)
        assert encode_response(ours, text, 99) == encode_response(theirs, text, 99)
    assert (ours.eos_token, ours.bos_token, ours.chat_template) == (
        theirs.eos_token,
        theirs.bos_token,
        theirs.chat_template,
    )
    assert ours.pad_token_id != ours.eos_token_id
    assert "<s>" in SHAPES[name].specials or "<s>" not in ours.get_vocab()


def test_its_positions_are_known_without_loading_it(pair: tuple[str, Path, Path]) -> None:
    _, _, path = pair
    assert known_positions(config.Model(base=str(path))) == load_settings(path).max_position_embeddings == 96


def test_quantised_weights_are_made_plain(tmp_path: Path) -> None:
    write_shape("llama", tmp_path / "folder")
    write_gguf(tmp_path / "folder", tmp_path / "q8.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    own = load_actor(tmp_path / "folder", CPU).model.layers[1].mlp.down_proj.weight
    plain = new_actor(config.Model(base=str(tmp_path / "q8.gguf")), load_tokenizer(tmp_path / "q8.gguf"), 0)
    found = plain.model.layers[1].mlp.down_proj.weight
    assert found.dtype == torch.float32
    assert 0 < (found - own).abs().max() < own.abs().max() / 100


def test_a_file_goes_through_all_of_training(
    workspace: Callable[..., Workspace], run_stages: Callable[..., Any], pair: tuple[str, Path, Path]
) -> None:
    _, _, path = pair
    template = "chat" if load_tokenizer(path).chat_template else "none"
    project = workspace(f"model.base={path}", f"data.template={template}", "ppo.iterations=1")
    entries = run_stages(project, "prepare", "sft", "reward", "ppo")
    assert entries["ppo"].manifest["metrics"]["policy/epochs"] == 2


def test_the_file_and_its_reader_are_in_the_keys(
    sketch: Workspace, pair: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = config.Model(base=str(pair[2]))
    project = Workspace(sketch.root, sketch.params.model_copy(update={"model": model}))
    before, version = stage_keys(project), keying.version
    with monkeypatch.context() as other:
        other.setattr(keying, "version", lambda name: "0" if name == "gguf" else version(name))
        assert keying.differing(before, stage_keys(project)) == {"prepare", "sft"}
    job = keying.plan(project, STAGES["sft"])
    assert job.identity["inputs"][str(pair[2])] == digest_path(pair[2])


# Files that are not what they say ------------------------------------------------------------------------------------


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


HUGE = 2**62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "version 1": (header(version=1), r"version 1\); expected version 2 or 3"),
    "tensors without end": (header(tensors=HUGE) + b"\0" * 99, r"it counts 4,611,686,018,427,387,904 at byte 16"),
    "fields without end": (header(fields=HUGE) + b"\0" * 99, r"it counts 4,611,686,018,427,387,904 at byte 24"),
    "a name without end": (header(fields=1) + struct.pack("<Q", HUGE) + b"x" * 99, r"it counts 4,611,686"),
    "a list without end": (
        header(fields=1) + string("a") + struct.pack("<IIQ", 9, 0, HUGE) + b"\0" * 99,
        r"it counts 4,611,686,018,427,387,904 at byte 49",
    ),
    "a list of lists": (header(fields=1) + string("a") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 99, r"unknown type 9"),
    "a value of no type": (header(fields=1) + string("a") + struct.pack("<I", 77) + b"\0" * 99, r"unknown type 77"),
    "a tensor of no type": (
        header(tensors=1) + string("w") + struct.pack("<IQIQ", 1, 8, 999, 0) + b"\0" * 99,
        r"the tensor w is of the unknown type 999",
    ),
    "many dimensions": (header(tensors=1) + string("w") + struct.pack("<I", 10**6) + b"\0" * 99, r"1000000 dimensions"),
    "a tensor of a petabyte": (
        header(tensors=1) + string("w") + struct.pack("<IQQIQ", 2, 2**24, 2**24, 0, 0) + b"\0" * 99,
        r"its tensors end at byte 1,125,899,906,842,720, the file at 164",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_lies_is_a_sentence(tmp_path: Path, what: str) -> None:
    content, said = HOSTILE[what]
    path = tmp_path / "own.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        find_base(config.Model(base=str(path)))
    assert str(caught.value).startswith(f"`model.base: {path}`: not a whole GGUF file (")


def test_a_file_that_is_cut_anywhere_is_a_sentence(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    content, path = pair[2].read_bytes(), tmp_path / "cut.gguf"
    for part in (0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(UserError, match="not a whole GGUF file"):
            read_gguf(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"\x80\x04" + b"x" * 90, b"{}"])
def test_a_file_of_another_kind_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"safetensors`: no GGUF file, .*; expected one, or the folder that holds a mod"
    ):
        find_base(config.Model(base=str(path)))


def with_number(path: Path, key: str, number: int) -> bytes:
    """A file's content with another number under a key of its metadata."""
    name, content = string(key), path.read_bytes()
    at = content.index(name) + len(name) + 4
    return content[:at] + struct.pack("<I", number) + content[at + 4 :]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (2_000_000_000, r"it says 2,000,000,000 layers and holds \d+ tensors"),  # before a list of them is made
        (1, r"it says 1 layers and holds the tensors of 2\)"),
        (3, r"it says 3 layers and holds the tensors of 2\)"),
        (0, r"it says 0 layers and holds the tensors of 2\)"),
    ],
)
def test_other_layers_than_it_says_are_a_sentence(
    pair: tuple[str, Path, Path], tmp_path: Path, layers: int, said: str
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(with_number(pair[2], f"{pair[0]}.block_count", layers))
    with pytest.raises(UserError, match=said):
        find_base(config.Model(base=str(other)))


def test_one_part_of_a_model_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "own-00001-of-00003.gguf"
    path.write_bytes(header(fields=1) + string("split.count") + struct.pack("<IH", 2, 3) + b"\0" * 99)
    with pytest.raises(UserError, match=r"it is one of 3 files of a model: `llama-gguf-split --merge` makes one of th"):
        find_base(config.Model(base=str(path)))


def test_an_eos_that_is_no_token_is_a_sentence(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(with_number(pair[2], "tokenizer.ggml.eos_token_id", 99999))
    with pytest.raises(UserError, match=r"`eos_token_id: \[99999(, \d+)?\]` in its other\.gguf, expected the number"):
        load_settings(other)


def test_too_many_layers_to_learn_are_known_without_loading_it(workspace: Any, pair: tuple[str, Path, Path]) -> None:
    params = workspace(f"model.base={pair[2]}", "reward.trainable_layers=2").params
    with pytest.raises(UserError, match=r"reward\.trainable_layers: found 2, but the model has 2 layers"):
        check_layers(params)


def test_without_the_package_it_is_named(pair: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf.constants", None)
    with pytest.raises(UserError, match=r"to read a GGUF file, `pip install gguf`"):
        read_gguf(pair[2])

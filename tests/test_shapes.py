"""Models as people bring them: each shape through SFT, the Reward and an iteration of PPO, with PPO's invariants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import GROUPED, SHAPES, Shape, make_tokenizer, write_shape
from torch import Tensor
from transformers import BloomConfig, FalconConfig, GPTJConfig, Qwen2MoeConfig

from rlhf_tasks import config
from rlhf_tasks.data.batching import Batch, Line
from rlhf_tasks.data.tables import TokenColumn, read_table
from rlhf_tasks.doctor import _OF_MODELS
from rlhf_tasks.doctor.first_batch import FirstBatch
from rlhf_tasks.errors import UserError
from rlhf_tasks.first_actor import new_actor
from rlhf_tasks.forward import Cache, hidden_states, states_before
from rlhf_tasks.head import Head
from rlhf_tasks.models import (
    load_actor,
    load_scorer,
    load_tokenizer,
    save_model,
    stop_ids,
)
from rlhf_tasks.ppo.rollout import Sampling, sample, sample_responses, uniforms
from rlhf_tasks.workspace import Workspace

CPU = torch.device("cpu")
PROMPTS = [[9, 30], [17, 40, 60, 21, 33, 45, 50, 71, 72, 73, 74], [25], [80, 81, 82, 83]]
RESPONSES = [[70, 31, 52, 99], [44, 98], [11, 12, 13, 14, 15, 16, 17], [50, 51, 52, 53, 54, 55]]
ROWS = 200
OF_DATA = {"prompts", "disk", "reward sign", "reward scale"}  # these tiny runs are not to learn anything


class Trained:
    """A project of one shape, with PPO's first iteration done."""

    def __init__(self, name: str, project: Workspace) -> None:
        self.name, self.shape, self.root, self.params = name, SHAPES[name], project.root, project.params
        self.tokenizer = load_tokenizer(self.root / "checkpoints/actor")


@pytest.fixture(scope="module", params=SHAPES)
def trained(
    request: pytest.FixtureRequest, workspace: Callable[..., Workspace], run_stages: Callable[..., Any]
) -> Trained:
    template = "chat" if "chat_template" in SHAPES[request.param].named else "none"
    project = workspace(
        "model.base=base", f"data.template={template}", "ppo.iterations=1", "reward.statistics_samples=8"
    )
    ratings = project.root / "data/raw/ratings.jsonl"
    ratings.write_text("".join(ratings.open(encoding="utf-8").readlines()[:ROWS]), encoding="utf-8")
    write_shape(request.param, project.root / "base")
    run_stages(project, "prepare", "sft", "reward", "ppo")
    return Trained(request.param, project)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_invariants_of_ppo_hold_on_the_first_batch(trained: Trained) -> None:
    """Those of `rlhf doctor`: ratio 1, KL 0, decoding, neighbours, order, micro-batches, the place of the score."""
    batch = FirstBatch.load(trained.root, trained.params)
    found = [look(trained.root, batch) for name, look in _OF_MODELS.items() if name not in OF_DATA]
    assert len(found) > 12
    assert not [finding for finding in found if not finding.ok]


@torch.no_grad()
def test_the_forward_passes_are_the_models_own(trained: Trained) -> None:
    """In a line of texts, with our attention, against the classes of transformers on a row alone, with theirs."""
    actor = load_actor(trained.root / "checkpoints/actor", CPU)
    critic = load_scorer(trained.root / "checkpoints/critic", CPU)
    batch = Batch.of(PROMPTS, RESPONSES, CPU)
    logits = Head.of(actor).logits(states_before(actor, batch)).split([len(response) for response in RESPONSES])
    scores = critic.score(hidden_states(critic, batch.line)[batch.line.ends]).squeeze(-1)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = torch.tensor([[*prompt, *response]])
        close(logits[row], actor(input_ids=ids).logits[0, len(prompt) - 1 : -1])
        close(scores[row], critic(input_ids=ids).logits[0, 0])
    assert torch.cat(logits).std() > 0.3
    assert (logits[0][0] - logits[1][0]).abs().max() > 0.3, "the model is sharp enough for this to say something"


def test_the_rollout_draws_what_the_model_alone_would(trained: Trained) -> None:
    """Token by token with a cache, beyond sliding windows, in a batch from which rows leave, against whole passes."""
    actor = load_actor(trained.root / "checkpoints/actor", CPU)
    stops = (*stop_ids(actor, trained.tokenizer, None), *range(3, 290, 4))
    how = Sampling(10, 1.0, None, None, stops)
    draws = uniforms(len(PROMPTS), how.length, (0, "shapes"))
    expected: list[list[int]] = [[] for _ in PROMPTS]
    for prompt, response, row in zip(PROMPTS, expected, draws, strict=True):
        while len(response) < how.length and not set(response) & set(stops):
            with torch.no_grad():
                logits = actor(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[:, -1]
            response.append(int(sample(logits, row[len(response)][None], how).tokens))
    assert sample_responses(actor, PROMPTS, how, (0, "shapes")).responses == expected
    assert len({len(response) for response in expected}) > 1


def test_a_checkpoint_is_loaded_to_the_bit(trained: Trained, tmp_path: Path) -> None:
    """What PPO's resuming rests on, tied head or not."""
    for name, load in (("actor", load_actor), ("critic", load_scorer)):
        model = load(trained.root / "checkpoints" / name, CPU)
        save_model(model, tmp_path / name)
        again = load(tmp_path / name, CPU).state_dict()
        assert all(torch.equal(x, again[key]) for key, x in model.state_dict().items())
        if name == "actor":
            head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
            assert (head is table) is trained.shape.tied


def test_the_embedding_keeps_its_size_unless_pad_has_no_row(trained: Trained) -> None:
    actor = load_actor(trained.root / "checkpoints/actor", CPU)
    words = make_tokenizer(trained.shape.specials, **trained.shape.named)
    rows = len(words) + trained.shape.spare
    assert actor.config.vocab_size == max(rows, trained.tokenizer.pad_token_id + 1) <= rows + 1


def test_what_ends_a_response_is_what_the_base_says_and_never_pad(trained: Trained) -> None:
    actor = load_actor(trained.root / "checkpoints/actor", CPU)
    stops = stop_ids(actor, trained.tokenizer, None)
    named = {trained.shape.named["eos_token"], *trained.shape.eos}
    assert set(stops) == set(trained.tokenizer.convert_tokens_to_ids(list(named)))
    assert trained.tokenizer.pad_token_id not in stops


def test_a_prompt_has_bos_once_where_the_tokenizer_adds_it_and_a_response_never(trained: Trained) -> None:
    table = read_table(trained.root / "data/prepared/sft/train.arrow")
    prompts, responses = (TokenColumn(table, f"{side}_ids") for side in ("prompt", "response"))
    bos, eos = trained.tokenizer.bos_token_id, trained.tokenizer.eos_token_id
    for i in range(len(prompts)):
        prompt, response = list(prompts[i]), list(responses[i])
        assert prompt.count(bos) == (1 if trained.shape.named.get("adds_bos") else 0)
        assert prompt[0] == bos or not trained.shape.named.get("adds_bos")
        assert bos not in response[:-1]
        assert eos not in response[:-1]


def test_a_chat_template_is_used_where_there_is_one(trained: Trained) -> None:
    prompt = read_table(trained.root / "data/prepared/prompts/train.arrow")["prompt"][0].as_py()
    assert prompt.startswith("<|im_start|>user\n") is ("chat_template" in trained.shape.named)


# A pad token of its own ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_a_pad_token_that_is_new_is_hardly_ever_said(tmp_path: Path, name: str) -> None:
    """At most as often as the mean token (Jensen), with a tied head, one of its own, and one with a bias."""
    base = tmp_path / "base"
    before = write_shape(name, base)
    words = load_tokenizer(base)
    rows = before.config.vocab_size
    words.add_tokens([f"<{i}>" for i in range(len(words), rows)])  # takes what rows there are to spare
    words.add_special_tokens({"pad_token": "<pad>"})
    actor = new_actor(config.Model(base=str(base)), words, 0)
    assert words.pad_token_id == rows == actor.config.vocab_size - 1
    ids = torch.randint(1, 250, (4, 20), generator=torch.Generator().manual_seed(0))
    logits, old = actor(input_ids=ids).logits, before(input_ids=ids).logits
    close(logits[..., :rows], old)
    assert (logits.softmax(-1)[..., rows] <= 1 / (rows + 1)).all()


def test_a_pad_that_ends_responses_gives_way(tmp_path: Path) -> None:
    """As in Qwen2's instruct models, whose generation_config.json lists their pad token among the EOS ids."""
    from rlhf_tasks.data.encoding import load_tokenizer as load_base_tokenizer

    write_shape("qwen2", tmp_path)
    listed = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert load_tokenizer(tmp_path).pad_token_id in listed
    words = load_base_tokenizer(tmp_path)
    assert words.pad_token_id not in listed
    assert words.pad_token == "<pad>"
    assert words.pad_token_id < SHAPES["qwen2"].spare + len(load_tokenizer(tmp_path)), "a row that was to spare"


# Models that our forward pass does not read as they read themselves ---------------------------------------------------


def as_one_text(model: Any, line: Line, cache: Cache | None = None) -> Tensor:
    """Every token sees all before it in the line, whichever text they belong to."""
    return hidden_states(model, Line(line.ids, (sum(line.lengths),), (0,)) if cache is None else line, cache)


def without_memory(model: Any, line: Line, cache: Cache | None = None) -> Tensor:
    return hidden_states(model, line)


@pytest.mark.parametrize(
    ("reads", "what"), [(as_one_text, "reading several texts at once"), (without_memory, "decoding with a cache")]
)
def test_a_model_that_is_read_wrongly_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Any, what: str
) -> None:
    from rlhf_tasks import first_actor

    write_shape("gpt2", tmp_path / "base")
    words = load_tokenizer(tmp_path / "base")
    words.add_special_tokens({"pad_token": "<pad>"})
    new_actor(config.Model(base=str(tmp_path / "base")), words, 0)
    monkeypatch.setattr(first_actor, "hidden_states", reads)
    with pytest.raises(UserError, match=rf"base`: {what} changes what this model \(gpt2\) says"):
        new_actor(config.Model(base=str(tmp_path / "base")), words, 0)


OWN = "reading several texts at once changes what this model"
WINDOWED = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}, OWN),
        (GPTJConfig, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "rotary_dim": 4}, OWN),
        (
            FalconConfig,
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            "falcon models cannot be",
        ),
        (Qwen2MoeConfig, GROUPED | WINDOWED | EXPERTS, "attention without the sliding window of its config.json"),
    ],
)
def test_a_model_with_an_attention_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, sizes: dict[str, Any], said: str
) -> None:
    """One that does not call what its configuration names, so that the texts of a line would see each other, or does
    not tell it how far to look back."""
    named = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    settings = sizes | {"initializer_range": 0.2}
    monkeypatch.setitem(SHAPES, "other", Shape(kind, settings, ("<|endoftext|>", "<pad>"), named, tied=True))
    write_shape("other", tmp_path / "base")
    words = load_tokenizer(tmp_path / "base")
    words.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(UserError, match=f"base`: {said}"):
        new_actor(config.Model(base=str(tmp_path / "base")), words, 0)


def test_a_model_whose_scores_come_near_their_cap_is_taken(tmp_path: Path) -> None:
    """As Gemma 2's do; transformers' own default for it leaves the cap out, ours does not."""
    base = tmp_path / "base"
    model = write_shape("gemma2", base)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.mul_(8)
    model.save_pretrained(base)
    new_actor(config.Model(base=str(base)), load_tokenizer(base), 0)

"""What a run is refused for before it begins, and that hours are not spent first on what its last stage cannot use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import with_params
from shapes import write_shape

from rlhf_tasks.ahead import FAR, PRETRAINED, check_before, check_preparable, check_prepared, high_rates
from rlhf_tasks.config import Params, load_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace

REPOSITORY = Path(__file__).resolve().parent.parent
ALL = list(STAGES.values())


@pytest.fixture
def new(workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A project in which nothing has run, as the working folder."""
    project = workspace()
    monkeypatch.chdir(project.root)
    return project


def look(params: Params, root: Path) -> None:
    """As a run does that is to write a parameter."""
    check_before(params, root, ALL)
    check_preparable(params, ALL)


def test_nothing_speaks_against_a_project_that_is_right(new: Workspace) -> None:
    look(new.params, new.root)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["data.template=chat"], r"`data\.template: chat`: the tokenizer has no chat template"),
        (
            ["data.sources=[{kind: sft, path: data/raw/ratings.jsonl}]"],
            r"no source of kind preference, ratings or labels",
        ),
        (["reward.trainable_layers=2"], r"reward\.trainable_layers: found 2, but the model has 2 layers"),
        (
            ["generation.max_new_tokens=2048"],
            r"generation\.max_new_tokens: 2048 make 2064 tokens, but .* 2048 positions",
        ),
        (["reward_function.name=nowhere:score"], r"reward_function\.name: 'nowhere:score' cannot be imported"),
        (["model.base=gpt2"], r"`model\.base: gpt2`: no such folder or file"),
        (["model.base=folder"], r"`model\.base: folder`: no config\.json in this folder"),
        (["model.base=notes.txt"], r"`model\.base: notes\.txt`: no GGUF file"),
        (["model.base=bare"], r"`model\.base: bare`: no tokenizer in this folder"),
    ],
)
def test_what_is_known_at_once_is_told_at_once(new: Workspace, assignments: list[str], said: str) -> None:
    (new.root / "folder").mkdir()
    (new.root / "notes.txt").write_text("notes")
    write_shape("llama", new.root / "bare")
    for file in (new.root / "bare").glob("tokenizer*"):
        file.unlink()
    params = with_params(new, *assignments).params
    with pytest.raises(UserError, match=said) as caught:
        look(params, new.root)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_at_once(new: Workspace) -> None:
    params = with_params(new, "runtime.device=cuda").params
    with pytest.raises(UserError, match=r"runtime\.device: found `cuda`, but torch sees no GPU"):
        check_before(params, new.root, ALL)
    check_before(params, new.root, ALL[:1])  # prepare uses none


def test_layers_that_cannot_be_cut_are_told_at_once(new: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before SFT has trained a model of which no Reward on a frozen trunk can be made."""
    write_shape("llama", new.root / "base")
    params = with_params(new, "model.base=base", "reward.trainable_layers=1").params
    check_before(params, new.root, ALL)

    def refuse(layers: Any) -> None:
        raise ValueError("these layers are no chain")

    monkeypatch.setattr("rlhf_tasks.trunk.make_trunk", refuse)
    with pytest.raises(
        UserError, match=r"reward\.trainable_layers: llama models cannot be cut .*: these layers are no"
    ):
        check_before(params, new.root, ALL)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (
            "evaluate.prompts=9999",
            r"evaluate\.prompts: found 9999, but the data has only \d+ held-out prompts; lower it",
        ),
        ("generation.stop=two words", r"generation\.stop: found 'two words', which is \d+ tokens"),
        ("generation.max_new_tokens=2048", r"generation\.max_new_tokens: 2048 make 2064 tokens"),
    ],
)
def test_what_prepare_left_is_looked_at_before_training(
    finished_copy: Workspace, monkeypatch: pytest.MonkeyPatch, assignment: str, said: str
) -> None:
    monkeypatch.chdir(finished_copy.root)
    check_prepared(finished_copy.params, finished_copy.root, ALL)
    params = with_params(finished_copy, assignment).params
    with pytest.raises(UserError, match=said):
        check_prepared(params, finished_copy.root, ALL)
    check_prepared(params, finished_copy.root, ALL[:1])  # prepare itself needs none of it


def test_a_pretrained_base_at_the_rates_of_a_model_from_scratch_is_warned_of(new: Workspace) -> None:
    shipped = load_params(REPOSITORY / "params.yaml")
    assert high_rates(shipped, ALL) is None
    base = shipped.model.model_copy(update={"base": "base"})
    own = shipped.model_copy(update={"model": base})
    said = high_rates(own, ALL) or ""
    for name in PRETRAINED:
        assert f"{name}: {shipped.section(name):g}" in said
    assert "profiles/smollm2.yaml has 5e-05, 4e-05, 2e-05, 2e-05" in said
    lower = [f"{name}={rate * (FAR - 1)}" for name, rate in PRETRAINED.items()]
    assert high_rates(with_params(new, "model.base=base", *lower).params, ALL) is None
    only = high_rates(own, [STAGES["sft"]]) or ""
    assert only.startswith("sft.learning_rate: 0.002: high for a pretrained model")
    assert only.endswith("has 5e-05")
    assert high_rates(own, [STAGES["prepare"], STAGES["evaluate"]]) is None


def test_rates_for_a_pretrained_model_are_those_of_the_profile() -> None:
    profile = load_params(REPOSITORY / "profiles/smollm2.yaml")
    assert {name: profile.section(name) for name in PRETRAINED} == PRETRAINED

"""A score that is a Python function: in the key, in the score that PPO maximises, and refused when it is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_tasks import config, keying
from rlhf_tasks.closure import user_closure
from rlhf_tasks.errors import UserError
from rlhf_tasks.ppo.experience import Episodes, ScoreFunction, shape_scores
from rlhf_tasks.reward_function import load_reward_function
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import Entry
from rlhf_tasks.workspace import Workspace

SOURCE = """
from helper_of_rewards import LETTER

def letters(prompts, responses):
    return [response.count(LETTER) for response in responses]

def short(prompts, responses):
    return [1.0]

def words(prompts, responses):
    return ["good"] * len(responses)

def broken(prompts, responses):
    return 1 / 0

def with_gradient(prompts, responses):
    import torch
    return torch.ones(len(responses), requires_grad=True) * 2

def infinite(prompts, responses):
    return [float("inf")] * len(responses)

number = 3
"""
NAMES = ("my_rewards", "helper_of_rewards")


class Tokenizer:
    """Letters by their place in the alphabet."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(ord("a") + i) for i in row) for row in rows]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "helper_of_rewards.py").write_text("LETTER = 'a'\n")
    (tmp_path / "raises_at_once.py").write_text("raise ValueError('no')\n")
    (tmp_path / "time.py").write_text("")
    (tmp_path / "json.py").write_text("def dumps(prompts, responses): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in NAMES:
        sys.modules.pop(name, None)


def load(name: str) -> Any:
    return load_reward_function(config.RewardFunction(name=name), Tokenizer())


def test_it_sees_texts_and_its_scores_come_back(project: Path) -> None:
    score = load("my_rewards:letters")
    assert score([[1], [2]], [[0, 0, 3], [4]]).tolist() == [2.0, 0.0]
    assert load_reward_function(config.RewardFunction(), Tokenizer()) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_rewards:short", "expected 2 finite numbers"),
        ("my_rewards:words", "expected 2 finite numbers"),
        ("my_rewards:infinite", "expected 2 finite numbers"),
        ("my_rewards:broken", r"raised ZeroDivisionError: division by zero \(.*my_rewards.py:\d+\)"),
        ("my_rewards:absent", "cannot be imported"),
        ("raises_at_once:score", "cannot be imported .* ValueError: no"),
        ("time:score", "Python's own 'time' .built in."),
        ("json:dumps", "Python's own 'json' .* give that file another name"),
        ("no_such_module:letters", "cannot be imported"),
        ("my_rewards:number", "is int, expected a function"),
    ],
)
def test_what_is_no_score_is_refused(project: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(name)([[1], [2]], [[0], [3]])


def test_an_edit_is_read_also_by_the_process_that_had_it_loaded(project: Path) -> None:
    """One run makes ppo and evaluate; each is keyed by what is on disk then."""
    assert load("my_rewards:letters")([[1]], [[0, 0, 3]]).tolist() == [2.0]
    (project / "helper_of_rewards.py").write_text("LETTER = 'd' # another\n")
    assert load("my_rewards:letters")([[1]], [[0, 0, 3]]).tolist() == [1.0]


def test_a_model_of_the_users_own_is_not_trained(project: Path) -> None:
    assert not load("my_rewards:with_gradient")([[1]], [[0]]).requires_grad


def test_weight_and_place(project: Path) -> None:
    """Beside the reward model's score or instead of it; the missing-EOS rule and the clip come after."""
    episodes = Episodes([[1], [2]], [[0, 0, 0], [4]], [True, False])
    raw, letters = torch.tensor([1.0, 2.0]), load("my_rewards:letters")
    rule = config.MissingEOS(mode="replace", value=-1.0)
    ppo = config.PPO(score=config.Score(kind="raw", clip=2.0), missing_eos=rule)
    for instead, expected in ((False, [2.0, -1.0]), (True, [1.5, -1.0])):
        function = ScoreFunction(letters, 0.5, instead)
        found = shape_scores(raw, episodes.ended, ppo, (0.0, 1.0), lambda s, f=function: f.combine(s, episodes))
        assert found.tolist() == expected


def test_its_source_and_what_that_imports_are_in_the_key(
    workspace: Callable[..., Workspace], run_stages: Callable[..., dict[str, Entry]]
) -> None:
    project = workspace("reward_function.name=my_rewards:letters")
    (project.root / "my_rewards.py").write_text(SOURCE)
    (project.root / "helper_of_rewards.py").write_text("LETTER = 'a'\n")
    assert user_closure("my_rewards", project.root) == ("helper_of_rewards.py", "my_rewards.py")
    for stage in ("ppo", "evaluate"):
        assert "my_rewards.py" in keying.external_inputs(project.params, project.root, STAGES[stage])
    assert keying.external_inputs(project.params, project.root, STAGES["reward"]) == []
    run_stages(project, "prepare", "sft", "reward")
    before = keying.plan(project, STAGES["ppo"])
    (project.root / "helper_of_rewards.py").write_text("LETTER = 'bc'\n")
    assert keying.plan(project, STAGES["ppo"]).key != before.key


@pytest.mark.parametrize(
    ("code", "reached"),
    [
        ("from my.tastes import words", ["my/tastes/words.py"]),
        ("from .tastes import words", ["my/tastes/words.py"]),
        ("from . import near", ["my/near.py"]),
        ("import beside.inner", ["beside/inner.py"]),
        ("from rlhf_tasks.evaluate import vader", ["rlhf_tasks/evaluate.py"]),
        ("import json, torch", []),
    ],
)
def test_what_a_users_module_imports(tmp_path: Path, code: str, reached: list[str]) -> None:
    """Packages with and without __init__.py, relative imports, and this project's own modules."""
    for file in ("my/near", "my/tastes/words", "beside/inner", "rlhf_tasks/evaluate"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{file}.py").write_text("")
    (tmp_path / "my/rewards.py").write_text(code)
    assert user_closure("my.rewards", tmp_path) == tuple(sorted(["my/rewards.py", *reached]))


def test_a_module_that_is_no_python_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def score(:\n")
    with pytest.raises(UserError, match=r"wrong\.py:1: not readable as Python: invalid syntax"):
        user_closure("wrong", tmp_path)


def test_an_installed_function_is_keyed_by_its_source(
    workspace: Callable[..., Workspace],
    run_stages: Callable[..., dict[str, Entry]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "site/judges").mkdir(parents=True)
    for name, text in (("__init__", ""), ("words", "GOOD = 1\n"), ("taste", "from judges.words import GOOD\n")):
        (tmp_path / f"site/judges/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    project = workspace("reward_function.name=judges.taste:score")
    run_stages(project, "prepare", "sft", "reward")
    before = keying.plan(project, STAGES["ppo"])
    assert {name for name in before.identity["code"] if name.startswith("installed")} == {
        f"installed: judges/{name}.py" for name in ("__init__", "taste", "words")
    }
    (tmp_path / "site/judges/words.py").write_text("GOOD = 2\n")
    assert keying.plan(project, STAGES["ppo"]).key != before.key

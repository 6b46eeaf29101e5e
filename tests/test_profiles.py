"""`rlhf use`: a file of profiles/ becomes params.yaml, and what was there is not lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf_tasks.config import load_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.profiles import FOLDER, profile_names, use_profile

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copyfile(REPOSITORY / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(REPOSITORY / FOLDER, tmp_path / FOLDER, ignore=shutil.ignore_patterns("previous.yaml"))
    return tmp_path


@pytest.mark.parametrize("name", profile_names(REPOSITORY))
def test_every_profile_is_valid(name: str) -> None:
    load_params(REPOSITORY / FOLDER / f"{name}.yaml")


def test_there_and_back_again(root: Path) -> None:
    before = (root / "params.yaml").read_bytes()
    changes = use_profile(root, "smollm2")
    assert "model.base: scratch -> " in "\n".join(changes)
    assert (root / "params.yaml").read_bytes() == (root / FOLDER / "smollm2.yaml").read_bytes()
    assert use_profile(root, "smollm2") == []  # and does not lose what is kept as the previous one
    assert len(use_profile(root, "previous")) == len(changes)
    assert (root / "params.yaml").read_bytes() == before


def test_a_params_yaml_that_is_wrong_or_gone_is_no_obstacle(root: Path) -> None:
    (root / "params.yaml").write_text("ppo: [")
    use_profile(root, "smollm2")
    assert (root / FOLDER / "previous.yaml").read_text() == "ppo: ["
    (root / "params.yaml").unlink()
    use_profile(root, "smollm2")
    load_params(root / "params.yaml")


def test_what_is_no_profile_is_a_sentence_and_changes_nothing(root: Path) -> None:
    before = (root / "params.yaml").read_bytes()
    (root / FOLDER / "mine.yaml").write_text("data: {sources: [{kind: sft}]}")
    with pytest.raises(UserError, match=r"profiles/smollm.yaml: not found; there is .*did you mean smollm2"):
        use_profile(root, "smollm")
    with pytest.raises(UserError, match=r"mine.yaml: `data.sources.0`"):
        use_profile(root, "mine")
    with pytest.raises(UserError, match="not found"):
        use_profile(root, "../params")
    assert (root / "params.yaml").read_bytes() == before

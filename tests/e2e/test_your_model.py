"""A stranger's model: from the Hub's cache through all six stages, and one that cannot be trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from e2e.conftest import Project, make_project
from e2e.test_doors import STAGES, states
from hub import COMMIT, NAME, environment, write_cache
from shapes import write_shape


@pytest.mark.slow
def test_a_model_of_the_hub_goes_all_the_way(tmp_path: Path, prefect_home: Path) -> None:
    """Qwen2 as published: a chat template, grouped queries, a tied head, two EOS ids of which one is its pad token."""
    write_shape("qwen2", tmp_path / "qwen2")
    write_cache(tmp_path / "hf", tmp_path / "qwen2")
    project = make_project(tmp_path / "own", prefect_home)
    hub = environment(tmp_path / "hf", offline=True)
    project = Project(
        project.root, project.environment | {name: value for name, value in hub.items() if name.startswith("HF_")}
    )
    project.set(
        model__base=NAME, model__revision=COMMIT, data__template="auto", data__max_prompt_tokens=64, ppo__iterations=1
    )
    done = project.rlhf("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.metrics("evaluate")["prompts"] == 24
    assert states(project.rlhf("run").stdout) == dict.fromkeys(STAGES, "cached")
    assert project.dvc("status").stdout.strip() == "Data and pipelines are up to date."
    words = json.loads((project.root / "checkpoints/actor/tokenizer_config.json").read_text())
    ends = json.loads((project.root / "checkpoints/actor/generation_config.json").read_text())
    assert (words["eos_token"], words["pad_token"]) == ("<|im_end|>", "<pad>")
    assert sorted(ends["eos_token_id"]) == [0, 2]

    shutil.rmtree(tmp_path / "hf")
    gone = project.rlhf("run")
    assert states(gone.stdout) == dict.fromkeys(STAGES, "cached"), "what is done needs no Hub"
    project.set(model__revision=COMMIT[::-1])
    wrong = project.rlhf("run")
    assert wrong.returncode == 2
    assert f"`model.base: {NAME}` at `model.revision: {COMMIT[::-1]}`: not in the cache" in wrong.stderr
    warning, sentence = wrong.stderr.strip().splitlines()
    assert "high for a pretrained model" in warning
    assert sentence.startswith("rlhf: `model.base")

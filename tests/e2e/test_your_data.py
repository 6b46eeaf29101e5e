"""A stranger's data and model: alpaca and preference files, a local Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from e2e.conftest import Project, make_project
from e2e.test_doors import STAGES, states
from e2e.test_metrics import documented_metrics

NOUNS = ["tea", "rain", "chess", "bread", "jazz", "snow", "maps", "clocks", "rivers", "owls", "glass", "ships"]
VERBS = ["describe", "praise", "explain", "compare", "sketch", "recall", "imagine", "count", "draw", "name"]


def write_feedback(root: Path) -> None:
    """120 alpaca rows and 120 preferences for kind answers, in two files."""
    rows = [(f"{verb.title()} {noun}", noun) for verb in VERBS for noun in NOUNS]
    alpaca = [{"instruction": f"{ask}.", "input": "", "output": f"Here is a word on {noun}."} for ask, noun in rows]
    pairs = [
        {"prompt": f"{ask}, please.", "chosen": f"Gladly: {noun} is lovely.", "rejected": f"No. {noun} is dull."}
        for ask, noun in rows
    ]
    (root / "data/raw/alpaca.json").write_text(json.dumps(alpaca))
    (root / "data/raw/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.mark.slow
def test_alpaca_and_preference_files_on_a_local_model_go_all_the_way(
    finished: Project, tmp_path: Path, prefect_home: Path
) -> None:
    project = make_project(tmp_path / "own", prefect_home)
    write_feedback(project.root)
    shutil.copytree(finished.root / "checkpoints/sft", project.root / "base")
    project.set(
        data__sources=[
            {"kind": "sft", "path": "data/raw/alpaca.json"},
            {"kind": "preference", "path": "data/raw/pairs.jsonl"},
        ],
        data__template="alpaca",
        data__max_prompt_tokens=64,
        model__base="base",
        ppo__iterations=1,
        evaluate__judge=None,
    )
    done = project.rlhf("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dvc.yaml: brought up to date" in done.stdout
    assert "data/raw/pairs.jsonl" in (project.root / "dvc.yaml").read_text()
    assert project.metrics("evaluate")["prompts"] == 24
    assert "sft_judge" not in project.metrics("evaluate")
    assert project.dvc("status").stdout.strip() == "Data and pipelines are up to date."
    sample = json.loads((project.root / "samples/evaluate.jsonl").read_text().splitlines()[0])
    assert "### Instruction:" in sample["prompt"]

    (project.root / "data/raw/pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "yes"}\n')
    wrong = project.rlhf("run")
    assert wrong.returncode == 2
    assert "data/raw/pairs.jsonl:1" in wrong.stderr
    assert "`rejected`" in wrong.stderr


@pytest.mark.slow
def test_a_reward_function_of_ones_own(copy_of: Project) -> None:
    """It steers PPO through either door, and an edit of what it imports runs PPO again, and nothing before it."""
    (copy_of.root / "my_rewards").mkdir()
    (copy_of.root / "my_rewards/__init__.py").write_text("")
    (copy_of.root / "my_rewards/taste.py").write_text("LETTER = 'e'\n")
    (copy_of.root / "my_rewards/letters.py").write_text(
        "from my_rewards.taste import LETTER\n\n"
        "def liked(prompts, responses):\n    return [response.count(LETTER) for response in responses]\n"
    )
    steer = ("--set", "reward_function.name=my_rewards.letters:liked", "--set", "reward_function.instead=true")
    done = copy_of.rlhf("run", *steer)
    later = dict.fromkeys(("ppo", "evaluate", "register"), "done")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached") | later, done.stdout + done.stderr
    names = {name.removeprefix("evaluate/") for name in documented_metrics(with_function=True)}
    assert names == {name for name in copy_of.metrics("evaluate") if "function" in name}
    assert "Data and pipelines are up to date." in copy_of.dvc("status").stdout

    (copy_of.root / "my_rewards/taste.py").write_text("LETTER = 'o'\n")
    before = copy_of.lock()
    again = copy_of.dvc("repro")
    assert again.returncode == 0, again.stdout + again.stderr
    after = copy_of.lock()
    assert after["reward"] == before["reward"]
    assert after["ppo"] != before["ppo"]

    (copy_of.root / "my_rewards/letters.py").write_text("def liked(prompts, responses):\n    return 1 / 0\n")
    broken = copy_of.rlhf("run")
    assert broken.returncode == 2, broken.stdout
    assert "my_rewards.letters:liked" in broken.stderr
    assert "ZeroDivisionError" in broken.stderr
    assert len(broken.stderr.strip().splitlines()) == 1, broken.stderr

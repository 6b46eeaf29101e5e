"""Every Actor explains itself, down to the raw rows, and can be made again from git and DVC alone."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import Project, commit, git
from e2e.test_doors import STAGES
from ruamel.yaml import YAML

RAW = "data/raw/movie_reviews.jsonl.gz"
VERSION = "models:/rlhf-actor@challenger"


def told(project: Project, *name: str) -> dict[str, Any]:
    done = project.rlhf("lineage", *name, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_version_tells_its_tree(finished: Project) -> None:
    document = told(finished, VERSION)
    stages = document["stages"]
    assert sorted(stages) == sorted(STAGES)
    assert document["git"]["dirty"] is False
    assert len(document["git"]["commit"]) == 40
    assert document["model"]["version"] == 1
    assert document["libraries"]["torch"].startswith("2.13")
    assert document["machine"]["cores"] >= 1
    raw = hashlib.sha256((finished.root / RAW).read_bytes()).hexdigest()
    assert stages["prepare"]["identity"]["inputs"] == {RAW: raw}
    assert stages["ppo"]["identity"]["parameters"]["ppo"]["kl"]["coef"] == 0.05
    for name in ("sft", "reward", "ppo", "evaluate"):
        for path, digest in stages[name]["identity"]["inputs"].items():
            (maker,) = [stage for stage in stages if path in stages[stage]["digests"]]
            assert stages[maker]["digests"][path] == digest, "the tree holds together"
        assert stages[name]["dvc"] == finished.lock()[name]
        assert stages[name]["seconds"] > 0
        assert len(stages[name]["runs"]["MLflow"]) == 32
        assert stages[name]["runs"]["Prefect"]
    tree = " ".join(re.sub("[│├└─]", " ", finished.rlhf("lineage", VERSION).stdout).split())
    assert "rlhf-actor version 1" in tree
    assert "ppo.kl.coef=0.05" in tree
    assert f"{RAW} sha256 {raw[:12]}" in tree
    assert "broken" not in tree


def test_a_checkout_and_a_revision_tell_the_same(copy_of: Project) -> None:
    here = told(copy_of)
    missing = copy_of.rlhf("lineage", "HEAD")
    assert missing.returncode == 2
    assert "HEAD: has no dvc.lock; commit it after a run" in missing.stderr
    commit(copy_of, "dvc.lock")
    there = told(copy_of, "HEAD")
    for name in STAGES:
        assert {k: there["stages"][name][k] for k in ("key", "identity", "dvc")} == {
            k: here["stages"][name][k] for k in ("key", "identity", "dvc")
        }
        assert len(there["stages"][name]["runs"]["MLflow"]) == 32
        assert there["stages"][name]["runs"]["Prefect"]
    assert len(there["git"]["commit"]) == 40
    assert there["environment"]["torch"].startswith("2.13")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "models:/rlhf-actor@nobody",
            "models:/rlhf-actor@nobody: rlhf-actor has no alias nobody in the MLflow registry",
        ),
        ("models:/rlhf-actor", "models:/rlhf-actor: expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("nowhere", "nowhere: no git revision of"),
    ],
)
def test_what_is_not_there_is_a_sentence(finished: Project, name: str, sentence: str) -> None:
    for command in ("lineage", "reproduce"):
        done = finished.rlhf(command, name)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_version_of_a_changed_checkout_is_made_again_from_its_patch(copy_of: Project, tmp_path: Path) -> None:
    """params.yaml changed, a reward function that git does not know; then the checkout moves on."""
    (copy_of.root / "mine.py").write_text(
        "def short(prompts, responses):\n    return [-len(response) / 10 for response in responses]\n"
    )
    copy_of.set(reward_function__name="mine:short")
    done = copy_of.rlhf("run")
    assert done.returncode == 0, done.stdout + done.stderr
    document = told(copy_of, VERSION)
    assert document["git"]["dirty"] is True
    assert "mine.py" in document["stages"]["ppo"]["identity"]["inputs"]
    (copy_of.root / "mine.py").unlink()
    git(copy_of.root, "checkout", "-q", "params.yaml", "dvc.yaml")
    again = copy_of.rlhf("reproduce", VERSION, "--into", str(tmp_path / "again"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "with source.patch" in again.stdout
    assert "reproduced: every digest agrees" in again.stdout
    assert (tmp_path / "again/mine.py").exists()


@pytest.mark.slow
def test_a_revision_that_comes_out_different_is_told(copy_of: Project, tmp_path: Path) -> None:
    """From a clone that shares only git and DVC's remote; the lock says of SFT what it is not."""
    copy_of.dvc("remote", "add", "-d", "storage", str(tmp_path / "remote"))
    yaml, path = YAML(), copy_of.root / "dvc.lock"
    lock = yaml.load(path.read_text())
    (out,) = [out for out in lock["stages"]["sft"]["outs"] if out["path"] == "checkpoints/sft"]
    out["md5"] = "0" * 32 + ".dir"
    with path.open("w") as file:
        yaml.dump(lock, file)
    commit(copy_of, "dvc.lock", ".dvc/config")
    clone = Project(tmp_path / "clone", copy_of.environment)
    git(copy_of.root, "clone", "-q", ".", str(clone.root))
    again = clone.rlhf("reproduce", "HEAD", "--into", str(tmp_path / "again"))
    assert again.returncode == 1, again.stdout + again.stderr
    lines = dict(
        line.split(maxsplit=1) for line in again.stdout.splitlines() if "equal  " in line or "differs  " in line
    )
    assert lines["sft"] == "differs  checkpoints/sft"
    assert all(line.startswith("equal") for name, line in lines.items() if name != "sft")
    assert "not reproduced; the environment of then is not known here" in " ".join(again.stdout.split())
    assert "found something there" in clone.rlhf("reproduce", "HEAD", "--into", str(tmp_path / "again")).stderr

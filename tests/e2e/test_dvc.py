"""What a DVC user does, with the real DVC: nothing surprises."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from e2e.conftest import Project
from e2e.test_doors import STAGES, states

CLEAN = "Data and pipelines are up to date."


def commit_all(project: Project, message: str) -> None:
    for command in (("add", "-A"), ("commit", "-qm", message)):
        subprocess.run(["git", *command], cwd=project.root, env=project.environment, check=True, capture_output=True)


def skipped(output: str) -> list[str]:
    return re.findall(r"Stage '(\w+)' didn't change, skipping", output)


def ran(output: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", output)


@pytest.mark.slow
def test_force_does_the_work_again_and_gets_the_same(copy_of: Project) -> None:
    before = copy_of.lock()
    done = copy_of.dvc("repro", "--force", "sft")
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout) == {"prepare": "done", "sft": "done"}
    assert copy_of.lock() == before


def test_a_single_stage_takes_the_earlier_ones_as_they_are(copy_of: Project) -> None:
    copy_of.set(sft__learning_rate=0.003, ppo__kl__coef=0.2)
    before = copy_of.lock()
    done = copy_of.dvc("repro", "-s", "ppo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout) == {"ppo": "done"}
    assert [stage for stage in STAGES if copy_of.lock()[stage] != before[stage]] == ["ppo"]


def test_looking_changes_nothing(copy_of: Project) -> None:
    """`--dry`, `dag`, and the diffs against the last commit."""
    commit_all(copy_of, "finished")
    lock, old = (copy_of.root / "dvc.lock").read_bytes(), copy_of.metrics("evaluate")
    copy_of.set(ppo__kl__coef=0.9)
    dry = copy_of.dvc("repro", "--dry")
    assert ran(dry.stdout) == STAGES[3:] or ran(dry.stdout) == ["ppo"], dry.stdout
    assert (copy_of.root / "dvc.lock").read_bytes() == lock
    dag = copy_of.dvc("dag", "--mermaid").stdout
    assert all(stage in dag for stage in STAGES)
    params = json.loads(copy_of.dvc("params", "diff", "--json").stdout)
    change = params["params.yaml"]["ppo.kl.coef"]
    assert (change["old"], change["new"]) == (0.05, 0.9)

    assert copy_of.rlhf("run").returncode == 0
    metrics = json.loads(copy_of.dvc("metrics", "diff", "--json").stdout)
    changed = metrics["metrics/evaluate.json"]["kl_sequence"]
    assert (changed["old"], changed["new"]) == (old["kl_sequence"], copy_of.metrics("evaluate")["kl_sequence"])
    assert changed["old"] != changed["new"]
    plots = copy_of.dvc("plots", "diff", "HEAD")
    assert plots.returncode == 0, plots.stderr
    page = (copy_of.root / "dvc_plots/index.html").read_text()
    assert "objective/kl" in page
    assert "workspace" in page


@pytest.mark.slow
def test_an_older_commit_checked_out_trains_nothing(copy_of: Project) -> None:
    commit_all(copy_of, "finished")
    old = copy_of.lock()
    assert copy_of.rlhf("run", "--set", "ppo.kl.coef=0.9").returncode == 0
    commit_all(copy_of, "other coefficient")
    assert copy_of.lock() != old
    copy_of.run("git", "checkout", "-q", "HEAD~1")
    assert copy_of.dvc("checkout").returncode == 0
    done = copy_of.rlhf("run")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached"), done.stdout + done.stderr
    assert copy_of.lock() == old
    assert copy_of.dvc("status").stdout.strip() == CLEAN


def experiments(project: Project) -> list[dict[str, str]]:
    shown = project.dvc("exp", "show", "--csv")
    assert shown.returncode == 0, shown.stderr
    return list(csv.DictReader(io.StringIO(shown.stdout)))


@pytest.mark.slow
def test_experiments_in_the_workspace_and_beside_it(copy_of: Project) -> None:
    """`dvc exp run -S`, `--temp`, `--queue` and `dvc exp show`; beside the workspace, on the project's own store."""
    commit_all(copy_of, "finished")
    here = copy_of.dvc("exp", "run", "-n", "here", "-S", "ppo.kl.coef=0.2")
    assert here.returncode == 0, here.stdout + here.stderr
    assert skipped(here.stdout + here.stderr) == STAGES[:3]
    temp = copy_of.dvc("exp", "run", "--temp", "-n", "temp", "-S", "ppo.kl.coef=0.3")
    assert temp.returncode == 0, temp.stdout + temp.stderr
    for name, coefficient in (("queued-a", 0.4), ("queued-b", 0.2)):
        queued = copy_of.dvc("exp", "run", "--queue", "-n", name, "-S", f"ppo.kl.coef={coefficient}")
        assert queued.returncode == 0, queued.stdout + queued.stderr
    worked = copy_of.dvc("exp", "run", "--run-all")
    assert worked.returncode == 0, worked.stdout + worked.stderr
    rows = {row["Experiment"]: row for row in experiments(copy_of) if row["Experiment"]}
    assert set(rows) == {"here", "temp", "queued-a", "queued-b"}
    assert {name: row["ppo.kl.coef"] for name, row in rows.items()} == {
        "here": "0.2", "temp": "0.3", "queued-a": "0.4", "queued-b": "0.2",
    }  # fmt: skip
    column = (
        "metrics/evaluate.json:kl_sequence" if "metrics/evaluate.json:kl_sequence" in rows["here"] else "kl_sequence"
    )
    assert rows["here"][column] == rows["queued-b"][column] != rows["temp"][column]
    assert not list(Path(copy_of.root, ".rlhf").glob("server.json")), "no server stays behind"


def test_a_clone_that_pulls_trains_nothing_through_either_door(copy_of: Project, tmp_path: Path) -> None:
    remote = copy_of.dvc("remote", "add", "--default", "storage", str(tmp_path / "remote"))
    assert remote.returncode == 0, remote.stderr
    commit_all(copy_of, "finished, with a remote")
    pushed = copy_of.dvc("push")
    assert pushed.returncode == 0, pushed.stderr
    clone = Project(tmp_path / "clone", copy_of.environment)
    subprocess.run(["git", "clone", "-q", str(copy_of.root), str(clone.root)], check=True)
    pulled = clone.dvc("pull")
    assert pulled.returncode == 0, pulled.stderr
    assert clone.rlhf("status").stdout.count(" done ") == len(STAGES)
    repro = clone.dvc("repro")
    assert skipped(repro.stdout) == STAGES, repro.stdout + repro.stderr
    done = clone.rlhf("run")
    assert states(done.stdout) == dict.fromkeys(STAGES, "cached"), done.stdout + done.stderr
    assert clone.lock() == copy_of.lock()


@pytest.mark.parametrize("door", [("rlhf", "run"), ("dvc", "repro")])
def test_no_git_and_no_dvc_are_sentences(copy_of: Project, door: tuple[str, str]) -> None:
    (copy_of.root / ".git").rename(copy_of.root / "git-elsewhere")
    no_git = copy_of.run(*door)
    assert no_git.returncode != 0
    assert "git" in no_git.stderr
    assert "Traceback" not in no_git.stderr + no_git.stdout
    (copy_of.root / ".dvc").rename(copy_of.root / "dvc-elsewhere")
    no_dvc = copy_of.run(*door)
    assert no_dvc.returncode != 0
    assert "dvc" in no_dvc.stderr.lower()
    assert "Traceback" not in no_dvc.stderr + no_dvc.stdout
    if door[0] == "rlhf":
        assert (no_git.returncode, no_dvc.returncode) == (2, 2)
        assert "git init" in no_git.stderr
        assert "dvc init" in no_dvc.stderr

"""Folders and patterns as sources: a new file makes `prepare` out of date through both doors."""

import shutil
import subprocess
import sys

import pytest
from changes import stage_keys, with_params

from rlhf_tasks import keying, versioning
from rlhf_tasks.data.files import source_files, watched_path
from rlhf_tasks.errors import UserError
from rlhf_tasks.stages import STAGES

PREPARE = STAGES["prepare"]


def sources_at(workspace, path):
    return with_params(workspace, f"data.sources=[{{kind: ratings, path: '{path}'}}]")


@pytest.mark.parametrize("path", ["data/raw", "data/raw/*.jsonl", "data/*/r*.jsonl", "data/raw/**/*.jsonl"])
def test_a_new_file_is_an_input_of_prepare(sketch, path):
    if path.startswith("data/*/"):
        shutil.move(sketch.root / "data/prepared", sketch.root / "prepared")  # else the pattern is refused
    project = sources_at(sketch, path)
    before = stage_keys(project) if path != "data/*/r*.jsonl" else None
    assert keying.external_inputs(project.params, project.root, PREPARE) == ["data/raw/ratings.jsonl"]
    (project.root / "data/raw/r2.jsonl").write_text("{}")
    inputs = ["data/raw/r2.jsonl", "data/raw/ratings.jsonl"]
    assert keying.external_inputs(project.params, project.root, PREPARE) == inputs
    if before:
        assert keying.differing(before, stage_keys(project)) == {"prepare"}
        (project.root / "data/raw/notes.txt").write_text("no data")
        assert keying.external_inputs(project.params, project.root, PREPARE) == inputs


def test_changing_one_row_changes_one_digest(sketch):
    project = sources_at(sketch, "data/raw")
    for name in "abc":
        (project.root / f"data/raw/{name}.jsonl").write_text('{"text": "a", "rating": 1}\n' * 3)
    before = keying.plan(project, PREPARE).identity["inputs"]
    (project.root / "data/raw/b.jsonl").write_text('{"text": "a", "rating": 1}\n' * 2 + '{"text": "b", "rating": 1}\n')
    after = keying.plan(project, PREPARE).identity["inputs"]
    assert keying.differing(before, after) == {"data/raw/b.jsonl"}


@pytest.mark.parametrize(
    ("path", "watched"),
    [
        ("data/raw/a.jsonl", "data/raw/a.jsonl"),
        ("data/raw", "data/raw"),
        ("data/raw/*.jsonl", "data/raw"),
        ("data/raw/**/x/*.csv", "data/raw"),
        ("data/r?w/a.csv", "data"),
        ("*.jsonl", "."),
        ("/srv/feedback/*.jsonl", "/srv/feedback"),
    ],
)
def test_dvc_watches_the_folder_of_a_pattern(path, watched):
    assert watched_path(path) == watched


@pytest.mark.parametrize("path", ["data", "data/*/*.jsonl", "*.jsonl", "."])
def test_a_folder_with_the_pipelines_own_files_is_refused(sketch, path):
    (sketch.root / "x.jsonl").write_text("{}")
    project = sources_at(sketch, path)
    with pytest.raises(UserError, match=r"a folder that also holds what the pipeline writes \(.*\); put the files of"):
        keying.check_sources(project.params, project.root, [PREPARE])


def test_dvc_sees_a_new_file_of_a_pattern(sketch):
    project = sources_at(sketch, "data/raw/*.jsonl")
    for name in ("rlhf_tasks", "flows"):
        shutil.copytree(keying.SOURCE_ROOT / name, project.root / name)
    for command in (("git", "init", "-q"), (sys.executable, "-m", "dvc", "init", "-q")):
        subprocess.run(command, cwd=project.root, check=True)
    assert versioning.update_pipeline(project.root, project.params)
    assert "      - data/raw\n" in (project.root / "dvc.yaml").read_text()
    versioning.record(project.root, PREPARE)
    assert "prepare" not in versioning.outdated_stages(project.root)
    (project.root / "data/raw/more.jsonl").write_text("{}")
    assert not versioning.update_pipeline(project.root, project.params), "dvc.yaml needs no change for it"
    assert "prepare" in versioning.outdated_stages(project.root)


def test_the_order_of_files_is_that_of_their_names(tmp_path):
    names = ["b/a.csv", "a.csv", "b.csv", "B.csv", "ä.csv", "b-1.csv"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert source_files(".", tmp_path) == sorted(names)
    assert source_files("**/*.csv", tmp_path) == sorted(names)

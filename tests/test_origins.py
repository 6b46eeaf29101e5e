"""What registered versions, git revisions and dvc.lock files tell, against a real MLflow: whole and damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_source import git

from flows import lineage as shown
from flows.reproduce import reproduce
from rlhf_tasks import gc, versioning
from rlhf_tasks.errors import UserError
from rlhf_tasks.lineage import lineage_of, locked_outs
from rlhf_tasks.origins import Origin, keys_of_versions, log_origin, origin_of_version
from rlhf_tasks.reproduction import Wanted, make_again
from rlhf_tasks.source import source_of
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import digest_json
from rlhf_tasks.tracking import Tracker, Unreachable

LOCKED = "stages:\n  sft:\n    outs:\n    - path: lineage/sft.json\n      md5: abc\n"
CONFLICT = f"<<<<<<< HEAD\n{LOCKED}=======\n{LOCKED}>>>>>>> other\n"


pytestmark = pytest.mark.usefixtures("own_mlflow")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MLflow's database: making it takes seconds."""
    root = tmp_path_factory.mktemp("made")
    Tracker(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copyfile(made / "mlflow.db", tmp_path / "mlflow.db")
    return tmp_path


def identity(stage: str, **environment: str) -> dict[str, Any]:
    return {"stage": stage, "parameters": {}, "inputs": {}, "code": {}, "environment": {"torch": "2"} | environment}


def register(tracker: Tracker, name: str, key: str | None, **tags: str) -> str:
    """A version with the lineage of one stage, or with none. Returns its run."""
    run = tracker.start_pipeline({}, {}, "try")
    if key:
        document = {"stages": {"sft": {"key": key, "identity": identity("sft")}}}
        log_origin(tracker, run, Origin(document, b"", b""))
    if not tracker.client.search_registered_models(f"name = '{name}'"):
        tracker.client.create_registered_model(name)
    tracker.client.create_model_version(name, "file:///nowhere", run, tags)
    return run


def artifacts(root: Path, tracker: Tracker, run: str) -> Path:
    return Path(tracker.client.get_run(run).info.artifact_uri.removeprefix("file://"))


# What `rlhf gc` must keep --------------------------------------------------------------------------------------------


def test_versions_under_every_name_are_needed(root: Path) -> None:
    tracker = Tracker(root)
    register(tracker, "one", "k1", actor_digest="a")
    register(tracker, "other", "k2", actor_digest="b")
    register(tracker, "stranger", None)
    assert keys_of_versions(root) == {"k1", "k2"}


def test_a_deleted_run_needs_nothing_but_one_that_lost_its_lineage_is_said(root: Path) -> None:
    tracker = Tracker(root)
    register(tracker, "one", "k1", actor_digest="a")
    tracker.client.create_model_version("one", "file:///nowhere", "0" * 32, {"actor_digest": "gone"})
    assert keys_of_versions(root) == {"k1"}
    lost = register(tracker, "one", "k2", actor_digest="b")
    shutil.rmtree(artifacts(root, tracker, lost))
    with pytest.raises(UserError, match=rf"models:/one/3: found no lineage with its MLflow run {lost}, .* or delete"):
        keys_of_versions(root)


@pytest.mark.parametrize("method", ["list_artifacts", "download_artifacts"])
def test_artifacts_that_cannot_be_read_are_not_taken_for_none(
    root: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    register(Tracker(root), "one", "k1", actor_digest="a")

    def fail(*_: Any) -> None:
        raise RuntimeError("no credentials for https://me:secret@bucket")

    monkeypatch.setattr(f"mlflow.MlflowClient.{method}", fail)
    for ask in (lambda: keys_of_versions(root), lambda: origin_of_version(root, "models:/one/1")):
        with pytest.raises(Unreachable, match=r"its artifacts cannot be read .*no credentials") as caught:
            ask()
        assert "secret" not in str(caught.value)


def test_without_a_database_none_is_made(tmp_path: Path) -> None:
    assert keys_of_versions(tmp_path) == set()
    with pytest.raises(UserError, match=r"has no mlflow\.db"):
        origin_of_version(tmp_path, "models:/one@champion")
    assert list(tmp_path.iterdir()) == []


def test_a_project_may_be_a_folder_of_its_repository(tmp_path: Path) -> None:
    project = tmp_path / "deep/project"
    project.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    (project / "dvc.lock").write_text(LOCKED)
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "-qm", "a run")
    (project / "dvc.lock").unlink()
    assert versioning.committed_lock(project, "HEAD") == LOCKED.encode()
    assert gc._locked_lineages(project) == {"abc"}
    assert gc._locked_lineages(tmp_path) == set()


# Damaged input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [CONFLICT, "stages:\n", "- one\n", "stages: {sft: [1]}\n", "\x00", "stages: {sft: {outs: 3}}"]
)
def test_a_damaged_lock_is_a_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"^dvc\.lock of main: found .*, expected the stages") as caught:
        locked_outs(text.encode(), "dvc.lock of main")
    assert ("conflict markers" in str(caught.value)) == (text == CONFLICT)


def test_a_whole_lock_is_read() -> None:
    assert locked_outs(LOCKED.encode()) == {"sft": {"lineage/sft.json": "abc"}}
    assert locked_outs(b"") == locked_outs(b"stages: {}") == {}


@pytest.mark.parametrize("text", ['{"stage": "sft", "par', "{}", "[]", '{"parameters": 1}', "\xff"])
def test_a_damaged_lineage_is_a_sentence(text: str) -> None:
    def read(path: str) -> bytes:
        if path == "dvc.lock":
            raise FileNotFoundError
        return text.encode("latin-1") if path == STAGES["sft"].lineage else json.dumps(identity("any")).encode()

    with pytest.raises(UserError, match=r"^lineage/sft\.json: found .*, expected what a stage depends on"):
        lineage_of(read)


def test_a_version_with_a_damaged_lineage_is_a_sentence(root: Path) -> None:
    tracker = Tracker(root)
    run = register(tracker, "one", "k1", actor_digest="a")
    (artifacts(root, tracker, run) / "lineage/lineage.json").write_text("{}")
    for ask in (lambda: keys_of_versions(root), lambda: origin_of_version(root, "models:/one/1")):
        with pytest.raises(UserError, match=r"^lineage/lineage\.json of MLflow run \w+: found JSON of another kind"):
            ask()


def test_what_cannot_be_reproduced_is_a_sentence_at_once(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("mine")
    for text, sentence in ((CONFLICT, "dvc.lock of HEAD: found the conflict markers"), (LOCKED, "found a file")):
        (tmp_path / "dvc.lock").write_text(text)
        git(tmp_path, "add", "--all")
        git(tmp_path, "commit", "-qm", "a run")
        with pytest.raises(UserError, match=sentence):
            reproduce(tmp_path, "HEAD", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# What a git revision tells -------------------------------------------------------------------------------------------


@pytest.fixture
def revision(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose stages' lineage needs no DVC to be had."""
    git(root, "init", "-q")
    git(root, "commit", "-q", "--allow-empty", "-m", "a run")

    def read(root: Path, revision: str, path: str) -> bytes:
        stage = Path(path).stem
        return LOCKED.encode() if path == "dvc.lock" else json.dumps(identity(stage, numpy=stage[0])).encode()

    monkeypatch.setattr(versioning, "read_at", read)
    return root


def test_a_revision_tells_its_commit_its_environment_and_its_makers(
    revision: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, key = Tracker(revision), digest_json(identity("sft", numpy="s"))
    parent = tracker.start_pipeline({}, {}, "run")
    tags = {
        "rlhf.key": key,
        "prefect.flow_run_id": "flow-run-id",
        "mlflow.source.git.commit": "c",
        "rlhf.cached": "false",
    }
    run = tracker.start_stage(parent, "sft", tags, start_ms=1_700_000_000_000)
    tracker.finish(run, "FINISHED", 1_700_000_002_000)
    document = shown.find_lineage(revision, "HEAD")
    assert document["git"] == {"commit": git(revision, "rev-parse", "HEAD"), "dirty": False}
    assert document["environment"] == {"torch": "2", "numpy": ["p", "s", "r", "e"]}
    facts = document["stages"]["sft"]
    assert facts["runs"] == {"MLflow": run, "Prefect": "flow-run-id"}
    assert (facts["started"], facts["made"], facts["seconds"]) == ("2023-11-14T22:13:20Z", "2023-11-14T22:13:22Z", 2.0)
    assert facts["git"]["commit"] == "c"
    assert "runs" not in document["stages"]["ppo"]
    shown.say_lineage(revision, "HEAD", as_json=True)
    assert json.loads(capsys.readouterr().out) == document


@pytest.mark.parametrize("server", [None, "gopher://nowhere"])
def test_a_revision_needs_no_mlflow(
    revision: Path, server: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (revision / "mlflow.db").unlink()
    if server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    document = shown.find_lineage(revision, "HEAD")
    assert len(document["git"]["commit"]) == 40
    assert not any("runs" in facts for facts in document["stages"].values())
    assert not (revision / "mlflow.db").exists()


# A project in a folder of its repository, with DVC -------------------------------------------------------------------


@pytest.fixture(scope="module")
def monorepo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose one stage leaves a folder, pushed to a remote; its pipeline writes where it ran."""
    root = tmp_path_factory.mktemp("monorepo")
    project = root / "deep/project"
    (project / "flows").mkdir(parents=True)
    (project / "flows/__init__.py").touch()
    (project / "flows/cli.py").write_text("open('ran', 'w').write(open('text').read())\n")
    (project / "text").write_text("committed")
    stage = "mkdir out && echo 1 > out/a && echo 2 > out/b"
    (project / "dvc.yaml").write_text(f"stages:\n  sft:\n    cmd: {stage}\n    outs: [out]\n")
    git(root, "init", "-q")
    remote = str(root.with_name("remote"))
    for command in (("init", "--subdir"), ("remote", "add", "-d", "store", remote), ("repro",), ("push",)):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=project, check=True, capture_output=True)
    git(root, "add", "--all")
    git(root, "commit", "-qm", "a run")
    return project


def test_an_out_is_read_from_a_folder_of_the_repository(monorepo: Path) -> None:
    assert versioning.read_at(monorepo, "HEAD", "out/a") == b"1\n"


def test_a_clone_asks_the_remote_what_a_folder_held(monorepo: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", str(monorepo.parents[1]), "clone")
    clone = tmp_path / "clone/deep/project"
    md5 = locked_outs((clone / "dvc.lock").read_bytes())["sft"]["out"]
    files = versioning.files_of(clone, md5)
    assert files == versioning.files_of(monorepo, md5)
    assert sorted(files) == ["a", "b"]
    assert not list((clone / ".dvc").rglob("*.dir")), "the files stay where they are"
    assert versioning.files_of(clone, "0" * 32 + ".dir") == {}


def test_a_project_in_a_folder_is_made_again_there(monorepo: Path, tmp_path: Path) -> None:
    (monorepo / "text").write_text("changed")
    source = source_of(monorepo)
    wanted = Wanted(source.commit, source.patch, b"", None)
    project = make_again(monorepo, tmp_path / "again", wanted)
    assert project == tmp_path / "again/deep/project"
    assert (project / "ran").read_text() == "changed"

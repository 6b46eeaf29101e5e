"""Keys say what a result depends on; work is done once, resumes to the bit, and survives damage."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import flip_bit, stage_keys, with_params

from rlhf_tasks import engine, keying, training
from rlhf_tasks.engine import Recorder
from rlhf_tasks.errors import UserError
from rlhf_tasks.explain import standings
from rlhf_tasks.stages import STAGES, stages_between
from rlhf_tasks.store import DamagedEntry, Entry
from rlhf_tasks.workspace import Workspace, alone, state_folder

Make = Callable[..., Workspace]
Run = Callable[..., dict[str, Entry]]
TRAINED = ("prepare", "sft", "reward", "ppo", "evaluate")


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "stages"),
    [("ppo.iterations=3", {"ppo"}), ("ppo.kl.coef=0.05", set())],  # its default, now written out
)
def test_a_parameter_changes_the_keys_of_the_stages_that_read_it(
    sketch: Workspace, assignment: str, stages: set[str]
) -> None:
    """The table of all groups of parameters is docs/caching.md's (test_caching_table.py)."""
    before = stage_keys(sketch)
    assert keying.differing(before, stage_keys(with_params(sketch, assignment))) == stages


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("data/raw/ratings.jsonl", {"prepare"}),
        ("data/prepared/prompts/file", {"reward", "ppo", "evaluate"}),
        ("data/prepared/pairs/file", {"reward"}),
        ("checkpoints/sft/file", {"reward", "ppo", "evaluate"}),
        ("checkpoints/sft/another", {"reward", "ppo", "evaluate"}),
        ("checkpoints/reward/file", {"ppo", "evaluate"}),
        ("checkpoints/actor/file", {"evaluate", "register"}),
        ("metrics/evaluate.json", {"register"}),
        ("metrics/sft.json", set()),
        ("README.md", set()),
    ],
)
def test_an_input_changes_the_keys_of_the_stages_that_read_it(sketch: Workspace, path: str, stages: set[str]) -> None:
    before = stage_keys(sketch)
    (sketch.root / path).write_text("changed")
    assert keying.differing(before, stage_keys(sketch)) == stages


def test_keys_do_not_depend_on_the_place(sketch: Workspace, tmp_path: Path) -> None:
    shutil.copytree(sketch.root, tmp_path / "elsewhere")
    assert stage_keys(Workspace(tmp_path / "elsewhere", sketch.params)) == stage_keys(sketch)


def test_the_code_that_a_stage_runs_is_in_its_key(sketch: Workspace) -> None:
    code = keying.plan(sketch, STAGES["ppo"]).identity["code"]
    assert {"rlhf_tasks/ppo/functional.py", "rlhf_tasks/ppo_stage.py"} <= set(code)
    assert "rlhf_tasks/report.py" not in code


def test_another_gpu_or_cuda_version_is_another_environment(sketch: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be none here, so torch is told what to say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = []
    for gpu, cuda in (("H100", "12.8"), ("H100", "13.0"), ("H200", "13.0")):
        keying._environment.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=gpu: name)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        found.append(stage_keys(with_params(sketch, "runtime.device=cuda")))
    keying._environment.cache_clear()
    trained = {"sft", "reward", "ppo", "evaluate"}
    assert keying.differing(found[0], found[1]) == keying.differing(found[1], found[2]) == trained


def test_a_missing_input_names_the_stage_that_makes_it(workspace: Make) -> None:
    project = workspace()
    with pytest.raises(UserError, match=r"data/prepared/sft: not found.*made by the stage prepare"):
        keying.plan(project, STAGES["sft"])
    (project.root / "data/raw/ratings.jsonl").unlink()
    with pytest.raises(UserError, match=r"data/raw/ratings\.jsonl: not found.*correct the path in params\.yaml"):
        keying.plan(project, STAGES["prepare"])


def test_the_store_of_a_dvc_experiment_is_its_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_folder(tmp_path) == tmp_path / ".rlhf"
    monkeypatch.setenv("DVC_ROOT", "/repository")
    assert state_folder(tmp_path) == tmp_path / ".rlhf"
    monkeypatch.setenv("DVC_STAGE", "sft")
    assert state_folder(tmp_path) == Path("/repository/.rlhf")


# Work ----------------------------------------------------------------------------------------------------------------


def test_two_runs_from_scratch_give_equal_digests(finished: Any, workspace: Make, run_stages: Run) -> None:
    """Elsewhere and later: so neither a place nor a clock is in any result."""
    other = run_stages(workspace())
    assert {name: entry.digest for name, entry in other.items()} == {
        name: entry.digest for name, entry in finished.entries.items()
    }
    assert {name: entry.manifest["key"] for name, entry in other.items()} == {
        name: entry.manifest["key"] for name, entry in finished.entries.items()
    }


def test_no_result_holds_a_place_or_a_clock(finished: Any) -> None:
    root = finished.workspace.root
    traces = [str(root), str(Path.home()), "time_ms"]
    for stage in TRAINED:
        for path in STAGES[stage].outs.values():
            target = root / path
            for file in target.rglob("*") if target.is_dir() else [target]:
                if file.is_file():
                    assert not [trace for trace in traces if trace.encode() in file.read_bytes()], file


def test_results_are_safetensors_arrow_and_text(finished: Any) -> None:
    names = [path.name for path in (finished.workspace.store.root).rglob("*") if path.is_file()]
    suffixes = {Path(name).suffix for name in names if not re.fullmatch("[0-9a-f]{64}", name)}
    assert suffixes <= {".safetensors", ".arrow", ".json", ".jsonl", ".csv"}


def test_work_that_is_done_is_not_done_again(finished: Any) -> None:
    def watch(row: dict[str, Any], total: int) -> None:
        raise AssertionError("it runs again")

    for name in ("sft", "reward", "evaluate"):
        job = keying.plan(finished.workspace, STAGES[name])
        assert engine.perform(finished.workspace, job, watch) == finished.entries[name]


def test_two_at_once_do_the_work_once(workspace: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    project, rows, entries = workspace(), [], []
    monkeypatch.chdir(project.root)
    job = keying.plan(project, STAGES["prepare"])

    def work() -> None:
        entries.append(engine.perform(project, job, lambda row, total: rows.append(row["step"])))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries) == 3
    assert entries[0] == entries[1] == entries[2]
    assert len(rows) == len(set(rows))


class Kill(BaseException):
    """As sudden as a signal."""


@pytest.fixture
def saves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "next_save", lambda *_: 0.0)


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("kills", [[3], [4, 6], [2, 3, 4]])
def test_a_stage_that_was_killed_goes_on_to_the_same_bits(
    finished: Any, finished_copy: Workspace, saves_every_step: None, stage: str, kills: list[int]
) -> None:
    """The curve included: what was recorded before a kill is neither lost nor told twice."""
    job = keying.plan(finished_copy, STAGES[stage])
    finished_copy.store.discard(job.key)
    steps: list[int] = []

    def watch(row: dict[str, Any], total: int) -> None:
        steps.append(row["step"])
        if kills and row["step"] == kills[0]:
            kills.pop(0)
            raise Kill

    for _ in list(kills):
        with pytest.raises(Kill):
            engine.perform(finished_copy, job, watch)
        assert finished_copy.store.find(job.key) is None
    entry = engine.perform(finished_copy, job, watch)
    assert entry.digest == finished.entries[stage].digest
    assert [row["step"] for row in entry.manifest["series"]] == list(range(1, max(steps) + 1))
    assert len(steps) < 2 * max(steps)
    assert not finished_copy.store.has_partial(job.key)


# The recorder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def series_file(tmp_path: Path) -> Path:
    return tmp_path / "series.jsonl"


def record(path: Path, *steps: int) -> list[tuple[int, float]]:
    """A process that records steps and is killed, or ends; what its series is then."""
    with Recorder(lambda row, total: None, path) as recorder:
        for step in steps:
            recorder(done=step, total=9, loss=1 / step)
        return [(row["step"], row["values"]["loss"]) for row in recorder.series]


@pytest.mark.parametrize(
    "processes",
    [
        [[1, 2, 3]],
        [[1, 2], [3]],
        [[1, 2, 3], [2, 3]],
        [[1, 2], [1, 2, 3]],
        [[1, 2, 3], [2], [3]],  # the second is killed after saving step 2, before it came as far as the first
        [[1, 2, 3], [1], [2], [], [3]],
    ],
)
def test_the_recorder_keeps_each_step_once(series_file: Path, processes: list[list[int]]) -> None:
    for steps in processes:
        series = record(series_file, *steps)
    assert series == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]


def test_the_recorder_drops_a_line_that_a_kill_cut(series_file: Path) -> None:
    record(series_file, 1, 2)
    with series_file.open("a") as file:
        file.write('{"step": 3, "time')
    assert [step for step, _ in record(series_file, 3)] == [1, 2, 3]


def test_the_recorder_shows_what_it_does_not_keep(series_file: Path) -> None:
    shown: list[tuple[int, int]] = []
    with Recorder(lambda row, total: shown.append((row["step"], total)), series_file) as recorder:
        recorder(done=0, total=2)
        recorder(done=1, total=2, loss=0.5)
    assert shown == [(0, 2), (1, 2)]
    assert [row["step"] for row in recorder.series] == [1]


# Workspace -----------------------------------------------------------------------------------------------------------


def test_exporting_puts_back_what_was_changed_and_nothing_else(finished: Any, finished_copy: Workspace) -> None:
    entry, root = finished_copy.store.find(finished.entries["sft"].folder.name), finished_copy.root
    assert entry is not None
    assert engine.exported(finished_copy, entry)
    kept = (root / "metrics/sft.json").stat()
    (root / "checkpoints/sft/config.json").unlink()
    (root / "plots/sft.csv").unlink()
    assert not engine.exported(finished_copy, entry)
    engine.export(finished_copy, entry)
    assert engine.exported(finished_copy, entry)
    assert (root / "metrics/sft.json").stat().st_ino == kept.st_ino


def test_a_damaged_result_is_not_exported(finished: Any, finished_copy: Workspace) -> None:
    entry = finished_copy.store.find(finished.entries["sft"].folder.name)
    assert entry is not None
    flip_bit(entry.payload / "checkpoint/model.safetensors")
    engine.export(finished_copy, entry)  # the workspace has it already: nobody reads the payload
    shutil.rmtree(finished_copy.root / "checkpoints/sft")
    with pytest.raises(DamagedEntry):
        engine.export(finished_copy, entry)
    assert not (finished_copy.root / "checkpoints/sft").exists()


def test_a_store_that_was_deleted_adopts_what_the_workspace_holds(finished: Any, finished_copy: Workspace) -> None:
    """As in a clone that pulled from DVC: nothing is trained, and later stages have the keys that they had."""
    shutil.rmtree(finished_copy.root / ".rlhf")
    project = Workspace(finished_copy.root, finished_copy.params)
    for name in TRAINED:
        entry = engine.adopt(project, keying.plan(project, STAGES[name]))
        assert entry.digest == finished.entries[name].digest
        assert entry.folder.name == finished.entries[name].folder.name
        assert engine.exported(project, entry)
        entry.verify()
        numbers = {
            k: v for k, v in entry.manifest["metrics"].items() if k in finished.entries[name].manifest["metrics"]
        }
        assert all(numbers[k] == finished.entries[name].manifest["metrics"][k] for k in numbers)


@pytest.fixture
def pulled(finished_copy: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A clone that pulled, on a machine with another instruction set."""
    shutil.rmtree(finished_copy.root / ".rlhf")
    monkeypatch.setattr(keying, "_simd", lambda: ["another"])
    keying._environment.cache_clear()
    yield Workspace(finished_copy.root, finished_copy.params)
    keying._environment.cache_clear()


def test_what_another_machine_made_is_adopted_as_that(pulled: Workspace, finished: Any) -> None:
    """It serves here, under its own key: nobody on a shared store takes it for this machine's."""
    job, maker = keying.plan(pulled, STAGES["sft"]), finished.entries["sft"]
    entry = engine.adopt(pulled, job)
    assert entry is not None
    assert entry.manifest["key"] == maker.manifest["key"] != job.key
    assert entry.manifest["identity"]["environment"]["simd"] != ["another"]
    assert engine.find(pulled, job) == entry
    assert pulled.store.find(job.key) is None


def test_what_was_adopted_can_be_forgotten(pulled: Workspace) -> None:
    """To be done again, when it was asked for or when it is damaged."""
    job = keying.plan(pulled, STAGES["sft"])
    entry = engine.adopt(pulled, job)
    assert entry
    engine.forget(pulled, job)
    assert engine.find(pulled, job) is None
    assert not entry.folder.exists()


def test_what_was_adopted_is_not_adopted_for_yet_another_environment(
    pulled: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that is upgraded here trains again here."""
    assert engine.adopt(pulled, keying.plan(pulled, STAGES["sft"]))
    monkeypatch.setattr(keying, "_simd", lambda: ["upgraded"])
    keying._environment.cache_clear()
    job = keying.plan(pulled, STAGES["sft"])
    assert engine.find(pulled, job) is None
    assert engine.adopt(pulled, job) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_outs_that_do_not_say_what_they_were_made_of_are_not_adopted(pulled: Workspace, content: str | None) -> None:
    path, stage = pulled.root / "lineage/sft.json", STAGES["sft"]
    text = content or json.dumps(json.loads(path.read_text()) | {"parameters": {}})
    path.unlink()
    path.write_text(text if content is None else content)
    assert engine.adopt(pulled, keying.plan(pulled, stage)) is None


def test_an_entry_with_other_files_than_the_stage_makes_is_none(
    finished_copy: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    job = keying.plan(finished_copy, STAGES["sft"])
    with finished_copy.store.writing(job.key) as out:
        (out / "notes.txt").write_text("not a checkpoint")
        finished_copy.store.commit(job.key, out, job.identity, metrics={}, series=[], perf={})
    assert engine.find(finished_copy, job) is None
    assert "holds notes.txt, not what the stage makes" in caplog.text
    entry = engine.perform(finished_copy, job, lambda row, total: None)
    assert entry == engine.find(finished_copy, job)


def test_what_chooses_instructions_is_in_the_key(sketch: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage_keys(sketch)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    keying._environment.cache_clear()
    after = stage_keys(sketch)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    keying._environment.cache_clear()
    assert keying.differing(before, after) == {"sft", "reward", "ppo", "evaluate"}


def test_back_to_an_earlier_value_nothing_is_to_do(workspace: Make, run_stages: Run) -> None:
    """Also while the workspace still holds what the other value made."""
    project = workspace("sft.weight_decay=0.01")
    run_stages(project, "prepare", "sft", "reward")
    run_stages(with_params(project, "sft.weight_decay=0.5"), "prepare", "sft")
    back = with_params(project, "sft.weight_decay=0.01")
    assert [s.stage.name for s in standings(back) if s.done] == ["prepare", "sft", "reward"]
    other = with_params(project, "sft.weight_decay=0.7")
    assert [s.stage.name for s in standings(other) if s.done] == ["prepare"]


@pytest.fixture
def another_clone(workspace: Make) -> Iterator[Workspace]:
    project = workspace()
    with alone(project.root):
        yield project


def test_one_checkout_has_one_pipeline_at_a_time(another_clone: Workspace, workspace: Make) -> None:
    second = Workspace(another_clone.root, another_clone.params)
    with pytest.raises(UserError, match=f"process {os.getpid()}"), alone(second.root):
        pass
    third = workspace()
    with alone(third.root):
        pass
    with alone(third.root):
        pass


def test_metrics_files_are_json_that_others_read(finished: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for stage in TRAINED:
        json.loads((finished.workspace.root / STAGES[stage].metrics).read_text(), parse_constant=refuse)


def test_an_input_that_was_replaced_and_put_back_is_not_trusted(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows which of the two the stage read."""
    project = workspace()
    monkeypatch.chdir(project.root)
    source = project.root / "data/raw/ratings.jsonl"
    content, job = source.read_bytes(), keying.plan(project, STAGES["prepare"])

    def watch(row: object, total: int) -> None:
        other = source.with_name("other")
        other.write_bytes(content)
        other.replace(source)

    with pytest.raises(UserError, match="its inputs or its code changed while it ran"):
        engine.perform(project, job, watch)
    assert project.store.find(job.key) is None
    assert engine.perform(project, job, lambda row, total: None).has_payload()


def test_code_edited_before_it_is_imported_is_not_run_under_the_old_key(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = workspace()
    job = keying.plan(project, STAGES["prepare"])
    monkeypatch.setitem(keying._CODE, "rlhf_tasks/data/pairs.py", "0" * 64)
    with pytest.raises(UserError, match="its inputs or its code changed while it ran"):
        engine.perform(project, job, lambda row, total: None)
    assert project.store.find(job.key) is None


def test_a_run_that_begins_in_the_middle_says_at_once_what_it_lacks(sketch: Workspace) -> None:
    """Before any server is started; what the run itself makes is not asked for."""
    (sketch.root / "data/prepared/prompts/file").unlink()
    (sketch.root / "data/prepared/prompts").rmdir()
    check = partial(keying.check_sources, sketch.params, sketch.root)
    check(stages_between("prepare", "register"))
    check(stages_between("sft", "sft"))
    with pytest.raises(UserError, match="data/prepared/prompts: not found, but the stage reward reads it; it is made"):
        check(stages_between("sft", "register"))

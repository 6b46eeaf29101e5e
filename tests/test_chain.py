"""PPO's iterations as a chain: known before it runs, gone on with from any saved state, done once."""

from __future__ import annotations

import csv
import itertools
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from changes import flip_bit, with_params
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rlhf_tasks import chain, ppo_stage
from rlhf_tasks.store import DamagedEntry, Entry, digest_path
from rlhf_tasks.workspace import Workspace

Run = Callable[..., dict[str, Entry]]


def ignore(entry: Entry) -> None:
    """A watch that does not look."""


def keys(workspace: Workspace) -> list[str]:
    return [job.key for job in chain.plan(workspace)]


@pytest.fixture(scope="module")
def done(finished: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, list[Entry]]:
    """A copy of the finished project with three iterations that were done in one go, in memory."""
    root = tmp_path_factory.mktemp("chain") / "project"
    shutil.copytree(finished.workspace.root, root)
    project = with_params(Workspace(root, finished.workspace.params), "ppo.iterations=3", "ppo.kl.controller=adaptive")
    entries: list[Entry] = []
    while len(entries) < 3:
        entries = chain.advance(project, entries, ignore)
    return project, entries


@pytest.fixture
def copy(done: tuple[Workspace, list[Entry]], tmp_path: Path) -> Workspace:
    shutil.copytree(done[0].root, tmp_path / "chain")
    return Workspace(tmp_path / "chain", done[0].params)


@pytest.fixture
def unbegun(copy: Workspace) -> Workspace:
    """The same, with no iteration done."""
    for entry in chain.known(copy):
        copy.store.discard(entry.folder.name)
    return copy


def test_the_chain_is_known_before_it_runs(copy: Workspace) -> None:
    three = keys(copy)
    assert len(set(three)) == 3
    assert keys(with_params(copy, "ppo.iterations=5"))[:3] == three
    assert keys(with_params(copy, "ppo.iterations=2")) == three[:2]
    assert keys(with_params(copy, "saving.iterations_per_task=2")) == three[:2]
    assert not set(keys(with_params(copy, "ppo.kl.coef=0.7"))) & set(three)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 1], [1, 2], [3]])
def test_however_it_is_cut_into_tasks_and_processes_the_bits_are_the_same(
    done: tuple[Workspace, list[Entry]], unbegun: Workspace, lengths: list[int]
) -> None:
    found: list[Entry] = []
    for length in lengths:
        fresh = with_params(unbegun, f"saving.iterations_per_task={length}")
        found = chain.advance(fresh, chain.usable(chain.known(fresh)), ignore)
        assert found[-1].has_payload()
    assert [entry.manifest["metrics"] for entry in found] == [entry.manifest["metrics"] for entry in done[1]]
    assert [entry.manifest["key"] for entry in found] == [entry.manifest["key"] for entry in done[1]]
    assert found[-1].digest == done[1][-1].digest
    assert len({entry.manifest["metrics"]["objective/kl_coef"] for entry in found}) == 3


@pytest.mark.slow
def test_twenty_iterations_are_ten_and_ten_more(unbegun: Workspace, tmp_path: Path) -> None:
    """In processes of their own, as they come in: the second ten go on from the saved state alone."""
    digests = []
    for name, goals in {"one": [20], "other": [10, 20]}.items():
        shutil.copytree(unbegun.root, tmp_path / name)
        for goal in goals:
            project = with_params(Workspace(tmp_path / name, unbegun.params), f"ppo.iterations={goal}")
            entries = chain.usable(chain.known(project))
            while len(entries) < goal:
                entries = chain.advance(project, entries, ignore)
        assert [entry.manifest["identity"]["iteration"] for entry in entries] == list(range(1, 21))
        digests.append([entry.digest for entry in entries])
    assert digests[0] == digests[1]


def test_within_a_task_only_the_last_state_is_saved(unbegun: Workspace) -> None:
    project, told = with_params(unbegun, "saving.iterations_per_task=2"), list[int]()
    found = chain.advance(project, [], lambda entry: told.append(entry.manifest["identity"]["iteration"]))
    assert told == [1, 2]
    assert [entry.has_payload() for entry in found] == [False, True]
    assert ["save_seconds" in entry.manifest["perf"] for entry in found] == [False, True]
    assert chain.saved(found) == 2
    found[1].prune()
    assert chain.usable(chain.known(project)) == []


def saved_iterations(iterations: int, save: float, seconds: float = 10.0) -> list[int]:
    """After which iterations `auto` saves, where an iteration and a save take so long."""
    params = SimpleNamespace(
        ppo=SimpleNamespace(iterations=iterations), saving=SimpleNamespace(iterations_per_task="auto")
    )
    workspace: Any = SimpleNamespace(params=params)
    done: list[Entry] = []
    saved = []
    while len(done) < iterations:
        length = chain.task_length(workspace, done)
        done += [Entry(Path(), {"perf": {"seconds": seconds}}) for _ in range(length)]
        done[-1].manifest["perf"]["save_seconds"] = save
        saved.append(len(done))
    return saved


@pytest.mark.parametrize(
    ("iterations", "save", "expected"),
    [
        (4, 0.1, [1, 2, 3, 4]),
        (28, 4.0, [1, 15, 28]),  # 14 s of the 280 may go into saving: three times
        (10, 50.0, [1, 10]),  # no way to do it cheaply
    ],
)
def test_auto_saves_as_often_as_is_cheap(iterations: int, save: float, expected: list[int]) -> None:
    assert saved_iterations(iterations, save) == expected


@settings(deadline=None)
@given(iterations=st.integers(1, 200), save=st.floats(0.01, 100))
def test_auto_spends_its_share_and_risks_no_more_than_needed(iterations: int, save: float) -> None:
    saved = saved_iterations(iterations, save)
    assert saved[-1] == iterations
    assert len(saved) <= max(2, chain.SAVING_SHARE * 10 * iterations / save)
    assert max(after - before for before, after in itertools.pairwise([0, *saved])) <= 3 * math.ceil(save / 0.5)


def test_an_iteration_that_failed_half_way_leaves_no_half_trained_model_behind(
    done: tuple[Workspace, list[Entry]], unbegun: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second try in the same process starts from the parent's state, not from what the first made of it."""
    first = chain.advance(unbegun, [], ignore)
    with monkeypatch.context() as disk:
        disk.setattr(ppo_stage, "save_file", Mock(side_effect=OSError("the disk is broken")))
        with pytest.raises(OSError, match="broken"):
            chain.advance(unbegun, first, ignore)
    assert len(chain.known(unbegun)) == 1
    assert chain.advance(unbegun, first, ignore)[-1].digest == done[1][1].digest


def test_a_state_that_is_still_in_memory_is_not_read_back(unbegun: Workspace) -> None:
    first = chain.advance(unbegun, [], ignore)
    first[0].prune()  # there is nothing to read
    assert len(chain.advance(unbegun, first, ignore)) == 2


def test_an_iteration_is_stored_with_its_parent_and_its_metrics(done: tuple[Workspace, list[Entry]]) -> None:
    first, second, _ = (entry.manifest for entry in done[1])
    assert first["identity"]["parent"] is None
    assert second["identity"]["parent"] == first["key"]
    assert [row["step"] for row in second["series"]] == [2]
    assert second["series"][0]["values"] == second["metrics"]
    assert "objective/kl" in second["metrics"]
    assert second["perf"]["seconds"] > 0
    assert second["perf"]["save_seconds"] > 0


@pytest.mark.parametrize(
    ("damaged", "pruned", "usable"),
    [([], [], 3), ([3], [], 2), ([2], [], 3), ([2, 3], [1], 0), ([3], [2], 0), ([1, 2, 3], [], 0), ([], [1, 2], 3)],
)
def test_going_on_starts_from_the_last_whole_state(
    done: tuple[Workspace, list[Entry]],
    copy: Workspace,
    run_stages: Run,
    damaged: list[int],
    pruned: list[int],
    usable: int,
) -> None:
    """Two states are kept: the first is gone already."""
    known = chain.known(copy)
    assert [entry.digest for entry in known] == [entry.digest for entry in done[1]]
    for iteration in set(damaged) - {1}:
        flip_bit(known[iteration - 1].payload / "actor_optimizer.safetensors")
    for iteration in pruned:
        known[iteration - 1].prune()
    assert len(chain.usable(known)) == usable
    entry = run_stages(copy, "ppo")["ppo"]
    assert [row["step"] for row in entry.manifest["series"]] == [1, 2, 3]
    assert entry.parts["actor"] == digest_path(copy.root / "checkpoints/actor")
    again = chain.known(copy)
    assert [entry.digest for entry in again] == [entry.digest for entry in done[1]]
    again[-1].verify()


def test_a_damaged_parent_is_not_trained_on(copy: Workspace) -> None:
    known = chain.known(copy)
    copy.store.discard(known[2].folder.name)
    flip_bit(known[1].payload / "critic.safetensors")
    with pytest.raises(DamagedEntry):
        chain.advance(copy, known[:2], ignore)


def test_a_state_of_another_model_is_not_gone_on_from(copy: Workspace, done: tuple[Workspace, list[Entry]]) -> None:
    """Its digests are right: somebody else on the same store wrote it. Adam would write past the end of its memory."""
    known = chain.known(copy)
    second = known[1].manifest
    copy.store.discard(known[2].folder.name)
    with copy.store.writing(second["key"]) as out:
        shutil.copytree(known[1].payload, out, dirs_exist_ok=True)
        path = out / "actor_optimizer.safetensors"
        path.unlink()
        save_file({"0.step": torch.tensor(1.0), "0.exp_avg": torch.ones(1), "0.exp_avg_sq": torch.ones(1)}, path)
        record = {name: second[name] for name in ("metrics", "series", "perf")}
        copy.store.commit(second["key"], out, second["identity"], **record)
    found = chain.usable(chain.known(copy))
    assert len(found) == 2
    with pytest.raises(DamagedEntry, match="not a state to go on from"):
        chain.advance(Workspace(copy.root, copy.params), found, ignore)
    assert len(chain.usable(chain.known(copy))) < 2  # so the next try starts from an earlier one


def test_a_manifest_of_somebody_else_may_tell_no_times() -> None:
    told = [Entry(Path(), {"perf": {"save_seconds": 0.0}})]
    assert chain._cheap_length([entry.manifest["perf"] for entry in told], 5) >= 1


def test_the_chain_ends_where_an_iteration_is_missing(copy: Workspace) -> None:
    copy.store.discard(chain.known(copy)[1].folder.name)
    assert len(chain.known(copy)) == 1


def test_old_states_are_pruned_and_their_manifests_kept(copy: Workspace) -> None:
    assert [entry.has_payload() for entry in chain.known(copy)] == [False, True, True]


def test_two_on_one_store_do_every_iteration_once(
    done: tuple[Workspace, list[Entry]], unbegun: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told of all three; whoever comes second takes what the other has done."""
    trained, told, found = list[int](), list[list[int]](), list[list[str]]()
    step = ppo_stage.Trainer.step

    def counted(trainer: ppo_stage.Trainer) -> Any:
        trained.append(trainer.state.iteration + 1)
        return step(trainer)

    monkeypatch.setattr(ppo_stage.Trainer, "step", counted)

    def pipeline() -> None:
        mine, entries = list[int](), list[Entry]()
        project = Workspace(unbegun.root, unbegun.params)
        while len(entries) < 3:
            entries = chain.advance(
                project, entries, lambda entry: mine.append(entry.manifest["identity"]["iteration"])
            )
        told.append(mine)
        found.append([entry.digest for entry in entries])

    both = [threading.Thread(target=pipeline) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(trained) == [1, 2, 3]
    assert told == [[1, 2, 3]] * 2
    assert found == [[entry.digest for entry in done[1]]] * 2


def test_an_iteration_that_comes_out_different_is_told(unbegun: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    first = chain.advance(unbegun, [], ignore)[0]
    manifest = first.folder / "manifest.json"
    score = str(first.manifest["metrics"]["objective/score"])
    text = manifest.read_text()
    manifest.unlink()
    manifest.write_text(text.replace(score, "0.125"))
    first.prune()
    chain.advance(Workspace(unbegun.root, unbegun.params), [], ignore)
    assert "iteration 1: done again, it came out different" in caplog.text


def test_the_curve_has_a_row_for_every_iteration_also_after_a_critic_warm_up(copy: Workspace, run_stages: Run) -> None:
    project = with_params(copy, "ppo.critic_warmup=1")
    entry = run_stages(project, "ppo")["ppo"]
    with (entry.payload / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["objective/kl"] for row in rows] == [
        repr(row["values"]["objective/kl"]) for row in entry.manifest["series"]
    ]
    assert rows[1]["policy/loss"]

"""Who is champion: recorded moves, races, kills, and ways back; on a real MLflow registry."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tiny import PARAMS

from flows.cli import app
from rlhf_tasks import champion
from rlhf_tasks.champion import Ledger, Move, champion_before, move_champion, promote, roll_back
from rlhf_tasks.errors import UserError

NAME = "actor"
# moves the champion to and fro for ever: to be killed
RESTLESS = """
import itertools, sys
from rlhf_tasks.champion import promote

for version in itertools.cycle((2, 1)):
    promote("actor", version, "restless", sys.argv[1])
    print(version, flush=True)
"""


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").create_experiment("rlhf")
    return database


@pytest.fixture
def uri(empty: Path, tmp_path: Path) -> str:
    """A registry with three versions of one model, each with the run that registered it, and no champion."""
    (tmp_path / "mlflow.db").write_bytes(empty.read_bytes())
    client = MlflowClient(uri := f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model(NAME)
    for _ in range(3):
        run = client.create_run("1").info.run_id
        client.create_model_version(NAME, "file:///nowhere", run)
        client.set_terminated(run)
    return uri


def present(uri: str) -> int | None:
    return champion.version_at(MlflowClient(uri), NAME, "champion")


def test_a_move_says_who_when_why_and_from_what(uri: str) -> None:
    client = MlflowClient(uri)
    assert promote(NAME, 1, "the first", uri) is None
    assert promote(NAME, 3, "kinder | shorter", uri) == 1
    assert present(uri) == 3
    version = client.get_model_version(NAME, "3")
    tags = {name: value for name, value in version.tags.items() if name.startswith("champion.")}
    said = {"champion.from": "1", "champion.to": "3", "champion.kind": "promote", "champion.why": "kinder | shorter"}
    assert said.items() <= tags.items()
    assert "@" in tags["champion.who"]
    time.strptime(tags["champion.when"], "%Y-%m-%dT%H:%M:%SZ")
    run = client.get_run(version.run_id)
    assert tags.items() <= run.data.tags.items()
    assert client.get_model_version(NAME, "1").tags["champion.ended"].endswith("kinder | shorter")
    assert [move.version for move in Ledger.open(client, NAME).moves] == [1, 3]


def test_back_and_back_again(uri: str) -> None:
    for version in (1, 2, 3):
        promote(NAME, version, "better", uri)
    assert roll_back(NAME, "it shouts", uri) == (3, 2)
    assert roll_back(NAME, "it shouts too", uri) == (2, 1)
    assert MlflowClient(uri).get_model_version(NAME, "1").tags["champion.why"] == "it shouts too"
    with pytest.raises(UserError, match="no @champion to go back to: version 1 is the first"):
        roll_back(NAME, "and now?", uri)
    assert present(uri) == 1


@pytest.mark.parametrize(
    ("moves", "now", "before"),
    [
        ([], None, None),
        ([], 4, None),
        ([(1, None)], 1, None),
        ([(2, 1)], 2, 1),  # 1 was champion before there was a ledger
        ([(1, None), (2, 1), (1, 2)], 1, 2),
        ([(1, None), (2, 1), (3, 2), (2, 3, "rollback")], 2, 1),
        ([(1, None), (2, 1), (1, 2, "rollback"), (3, 1)], 3, 1),
        ([(1, None), (2, 1)], 7, 2),  # 7 was set by hand in MLflow
        ([(1, None), (2, 7)], 2, 7),
    ],
)
def test_what_came_before(moves: list[tuple], now: int | None, before: int | None) -> None:
    made = [Move(to, was, kind[0] if kind else "promote", "") for to, was, *kind in moves]
    assert champion_before(made, now) == before


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda uri: promote(NAME, 9, "why not", uri), "actor: no version 9 in the MLflow registry"),
        (lambda uri: promote(NAME, 2, "again", uri), "actor version 2 is @champion already"),
        (lambda uri: promote(NAME, 1, "  ", uri), "--why: found nothing, expected a reason"),
        (lambda uri: promote(NAME, 1, "x" * 1001, uri), "--why: found 1,001 characters, expected a reason of at most"),
        (lambda uri: roll_back(NAME, "x", uri), "no @champion to go back to: version 2 is the first"),
        (lambda uri: roll_back("nothing", "x", uri), "nothing: no version in the MLflow registry has a run"),
    ],
)
def test_what_cannot_be_is_a_sentence(uri: str, act, said: str) -> None:
    promote(NAME, 2, "the first", uri)
    with pytest.raises(UserError) as caught:
        act(uri)
    assert said in str(caught.value)
    assert present(uri) == 2


def test_a_version_that_was_deleted_is_not_gone_back_to(uri: str) -> None:
    client = MlflowClient(uri)
    promote(NAME, 1, "first", uri)
    promote(NAME, 2, "second", uri)
    client.delete_model_version(NAME, "1")
    with pytest.raises(UserError, match=r"version 1, @champion before version 2, was deleted"):
        roll_back(NAME, "x", uri)
    assert present(uri) == 2
    assert promote(NAME, 3, "third", uri) == 2
    assert roll_back(NAME, "no", uri) == (3, 2)


def test_a_ledger_whose_run_was_deleted_begins_anew(uri: str) -> None:
    client = MlflowClient(uri)
    promote(NAME, 1, "first", uri)
    promote(NAME, 2, "second", uri)
    client.delete_run(client.get_model_version(NAME, "1").run_id)
    assert promote(NAME, 1, "again", uri) == 2
    assert present(uri) == 1
    assert [move.version for move in Ledger.open(client, NAME).moves] == [1]
    assert roll_back(NAME, "no", uri) == (1, 2)


def test_of_many_at_once_one_wins(uri: str) -> None:
    """Each goes ahead only if the champion is still the one that it was compared with."""
    promote(NAME, 1, "the first", uri)
    start, won = threading.Barrier(6), list[int]()

    def finish_a_pipeline(number: int) -> None:
        asked = list[int | None]()

        def decide(now: int | None, moves: list[Move]) -> Move | None:
            asked.append(now)
            if len(asked) == 1:
                start.wait(60)  # until all have seen the same champion
            return Move(2 + number % 2, now, "gate", f"better than 1, says {number}") if now == 1 else None

        before, after = move_champion(NAME, uri, decide)
        assert asked[0] == 1
        if before != after:
            won.append(number)

    threads = [threading.Thread(target=finish_a_pipeline, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = won
    assert present(uri) == 2 + winner % 2
    moves = Ledger.open(MlflowClient(uri), NAME).moves
    assert [move.why for move in moves[1:]] == [f"better than 1, says {winner}"]


def test_a_move_that_was_cut_short_is_finished_by_whoever_comes_next(uri: str) -> None:
    client = MlflowClient(uri)
    promote(NAME, 1, "the first", uri)
    assert Ledger.open(client, NAME).add(Move(2, 1, "promote", "cut short"))  # and here the power fails
    assert present(uri) == 1
    assert move_champion(NAME, uri, lambda now, moves: None) == (2, 2)
    assert client.get_model_version(NAME, "2").tags["champion.why"] == "cut short"


def test_many_may_finish_it_at_once(uri: str) -> None:
    assert Ledger.open(MlflowClient(uri), NAME).add(Move(2, None, "promote", "cut short"))
    start = threading.Barrier(8)

    def look(_: int) -> tuple[int | None, int | None]:
        start.wait(60)
        return move_champion(NAME, uri, lambda now, moves: None)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(look, range(8))) == [(2, 2)] * 8


def test_a_slow_process_does_not_undo_what_came_after_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote its move, slept; another one finished the move and made the next."""
    client = MlflowClient(uri)
    slow = Ledger.open(client, NAME)
    assert slow.add(Move(1, None, "promote", "slow"))
    original = Ledger._done

    def then_sleep(ledger: Ledger) -> bool:
        done = original(ledger)
        monkeypatch.setattr(Ledger, "_done", original)
        promote(NAME, 2, "quick", uri)
        return done

    monkeypatch.setattr(Ledger, "_done", then_sleep)
    slow.finish()
    assert present(uri) == 2


def test_an_alias_that_was_set_by_hand_is_respected(uri: str) -> None:
    client = MlflowClient(uri)
    promote(NAME, 1, "the first", uri)
    client.set_registered_model_alias(NAME, "champion", "3")
    assert move_champion(NAME, uri, lambda now, moves: None) == (3, 3)
    assert promote(NAME, 2, "next", uri) == 3
    assert roll_back(NAME, "no", uri) == (2, 3)


def test_the_command_line(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS + f"register: {{name: {NAME}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for command, said in (
        ("promote 1 --why first", "actor version 1 is @champion; there was none before"),
        ("promote 3 --why better", "actor version 3 is @champion; before, it was version 1"),
        ("rollback --why worse", "actor version 1 is @champion; before, it was version 3"),
    ):
        app(command.split(), standalone_mode=False)
        assert capsys.readouterr().out.strip() == said
    (tmp_path / "mlflow.db").unlink()
    with pytest.raises(UserError, match=r"actor: .* has no mlflow.db, so nothing is registered"):
        app(["rollback", "--why", "x"], standalone_mode=False)


@pytest.fixture
def restless(uri: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", RESTLESS, uri], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_a_kill_leaves_a_champion(uri: str, restless: subprocess.Popen[str]) -> None:
    assert restless.stdout is not None
    for _ in range(2):
        restless.stdout.readline()
    time.sleep(random.random() / 5)
    restless.send_signal(signal.SIGKILL)
    restless.wait()
    told = [2, 1, *map(int, restless.stdout.read().split())]
    assert present(uri) in (1, 2)
    before, _ = move_champion(NAME, uri, lambda now, moves: None)
    moves = Ledger.open(MlflowClient(uri), NAME).moves
    assert before == moves[-1].version
    assert len(told) <= len(moves) <= len(told) + 1
    assert promote(NAME, 3, "after all", uri) == before

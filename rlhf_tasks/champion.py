"""Which version of a registered model is `@champion`: a ledger of moves, and the alias that follows it.

MLflow sets an alias without looking what it was, but lets nobody change a run's parameter. So a move is first written
into the next free place of a ledger: the parameters `champion.000001`, `champion.000002`, ... of the run that made the
oldest version then. Of two processes, on any machines, one finds the place taken; it looks again at who is champion
and decides anew. Then the alias moves, in one transaction of MLflow's; the version and its run are tagged. A process
that dies in between leaves the old champion or the new one, and who looks next finishes what it began.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import random
import re
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

from rlhf_tasks.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)

CHAMPION, LEDGER = "champion", "champion.ledger"
LONGEST_REASON = 1000  # characters; MLflow's tags and parameters hold 5,000
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the second where only an alias is missing
CLASHES = ("BAD_REQUEST", "TEMPORARILY_UNAVAILABLE")  # of two writers of one row, one
TRIES = 9

Kind = Literal["gate", "promote", "rollback"]


@dataclass(frozen=True)
class Move:
    """`@champion` goes to a version.

    Attributes:
        version: the champion from then on.
        before: the champion until then.
        kind: who decided: the gate, or a person who promoted or rolled back.
        who: user and host.
        when: UTC.
        id: makes every move another one, also if two processes decide the same in the same second.
    """

    version: int
    before: int | None
    kind: Kind
    why: str
    who: str = field(default_factory=lambda: f"{_user()}@{socket.gethostname()}")
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def tags(self) -> dict[str, str]:
        """What the version and its run say of the move; `champion.id`, written last, says that it has been made."""
        facts = {"from": self.before or "none", "to": self.version, "kind": self.kind, "who": self.who}
        facts |= {"when": self.when, "why": self.why, "id": self.id}
        return {f"{CHAMPION}.{name}": str(value) for name, value in facts.items()}


#: of the champion and the moves so far: what to do now, None for nothing
Decide = Callable[[int | None, list[Move]], Move | None]


def move_champion(name: str, tracking_uri: str, decide: Decide) -> tuple[int | None, int | None]:
    """Move `@champion` as `decide` says of what it finds; asked again if somebody else moves it meanwhile.

    Returns:
        The champion before and after.
    """
    client = MlflowClient(tracking_uri)
    while True:
        ledger = Ledger.open(client, name)
        ledger.finish()
        present = version_at(client, name, CHAMPION)
        move = decide(present, ledger.moves)
        if move is None:
            return present, present
        if ledger.add(move):
            ledger.finish()
            log.info("%s version %d is @%s now: %s", name, move.version, CHAMPION, move.why)
            return present, move.version


def promote(name: str, version: int, why: str, tracking_uri: str) -> int | None:
    """Make a version champion because a person says so. Returns the one before.

    Raises:
        UserError: it is champion already, there is no such version, or no reason is given.
    """
    _check_reason(why)

    def decide(present: int | None, moves: list[Move]) -> Move:
        if version == present:
            raise UserError(f"{name} version {version} is @{CHAMPION} already")
        return Move(version, present, "promote", why)

    return move_champion(name, tracking_uri, decide)[0]


def roll_back(name: str, why: str, tracking_uri: str) -> tuple[int | None, int | None]:
    """Make the version champion that was it before the present one. Returns the two, the one that went first.

    Raises:
        UserError: there was none before, it was deleted, or no reason is given.
    """
    _check_reason(why)
    client = MlflowClient(tracking_uri)

    def decide(present: int | None, moves: list[Move]) -> Move:
        version = champion_before(moves, present)
        if version is None:
            found = f"version {present} is the first" if present else "there is none"
            raise UserError(f"{name}: no @{CHAMPION} to go back to: {found}; `rlhf promote VERSION` names another one")
        if not _exists(client, name, version):
            raise UserError(
                f"{name} version {version}, @{CHAMPION} before version {present}, was deleted from the MLflow "
                "registry; `rlhf promote VERSION` names another one"
            )
        return Move(version, present, "rollback", why)

    return move_champion(name, tracking_uri, decide)


def champion_before(moves: list[Move], present: int | None) -> int | None:
    """The version that was champion before the present one came; what was rolled back is forgotten."""
    line: list[int] = []
    for move in moves:
        if move.before is not None and line[-1:] != [move.before]:  # moved by hand, or before there was a ledger
            line.append(move.before)
        while move.kind == "rollback" and line and line[-1] != move.version:
            line.pop()
        if line[-1:] != [move.version]:
            line.append(move.version)
    if line[-1:] == [present]:
        line.pop()
    return line[-1] if line else None


@dataclass
class Ledger:
    """The moves of a registered model's champion so far.

    Attributes:
        run_id: the run whose parameters they are.
    """

    client: MlflowClient
    name: str
    run_id: str
    moves: list[Move]

    @classmethod
    def open(cls, client: MlflowClient, name: str) -> Ledger:
        """Read it.

        Raises:
            UserError: no version's run is left to hold it.
        """
        run = _ledger_run(client, name)
        if run is None:
            raise UserError(
                f"{name}: no version in the MLflow registry has a run, so nobody could say why one is @{CHAMPION}; "
                "restore a run (`mlflow runs restore`), or `rlhf run`"
            )
        places = sorted(key for key in run.data.params if re.fullmatch(rf"{CHAMPION}\.\d{{6}}", key))
        return cls(client, name, run.info.run_id, [Move(**json.loads(run.data.params[key])) for key in places])

    def add(self, move: Move) -> bool:
        """Write a move into the next place; False if that was taken since the ledger was read."""
        if not _exists(self.client, self.name, move.version):
            raise UserError(f"{self.name}: no version {move.version} in the MLflow registry")
        try:
            text = json.dumps(move.__dict__, ensure_ascii=False)
            self.client.log_param(self.run_id, f"{CHAMPION}.{len(self.moves) + 1:06}", text)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or self._reread() == self.moves:
                raise
            return False
        self.moves.append(move)
        return True

    def finish(self) -> None:
        """Do what the last move says, unless that has been done: then the alias may have been moved by hand."""
        if not self.moves or self._done():
            return
        while True:
            _again_after_a_clash(self._carry_out)
            latest = self._reread()
            if latest == self.moves:
                return
            self.moves = latest  # somebody finished our move and made the next: the alias must be theirs

    def _carry_out(self) -> None:
        """The last move: alias and tags. Doing it twice changes nothing."""
        client, name, move = self.client, self.name, self.moves[-1]
        version = client.get_model_version(name, str(move.version))
        client.set_registered_model_alias(name, CHAMPION, version.version)
        if move.before is not None and _exists(client, name, move.before):
            ended = f"{move.when}: version {move.version}, {move.kind} by {move.who}: {move.why}"
            client.set_model_version_tag(name, str(move.before), f"{CHAMPION}.ended", ended)
        tags = move.tags()
        if run := _active_run(client, version.run_id):
            client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)

    def _done(self) -> bool:
        """Whether the last move needs nothing more: its version says so, or was deleted."""
        move = self.moves[-1]
        if not _exists(self.client, self.name, move.version):
            return True
        return self.client.get_model_version(self.name, str(move.version)).tags.get(f"{CHAMPION}.id") == move.id

    def _reread(self) -> list[Move]:
        return Ledger.open(self.client, self.name).moves


def version_at(client: MlflowClient, name: str, alias: str) -> int | None:
    """The version that an alias names."""
    try:
        return int(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ABSENT:
            return None
        raise


def _ledger_run(client: MlflowClient, name: str) -> Run | None:
    """The run that holds the ledger: once chosen the model names it, whatever becomes of the versions."""
    versions = client.search_model_versions(f"name = '{name}'")
    chosen = client.get_registered_model(name).tags.get(LEDGER) if versions else None
    if run := _active_run(client, chosen):
        return run
    for version in sorted(versions, key=lambda version: int(version.version)):  # all processes choose the same
        if run := _active_run(client, version.run_id):
            _again_after_a_clash(partial(client.set_registered_model_tag, name, LEDGER, version.run_id))
            return run
    return None


def _active_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """A run that can be written to."""
    try:
        run = client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None
    return run if run and run.info.lifecycle_stage == "active" else None


def _again_after_a_clash(work: Callable[[], None]) -> None:
    """Do what may be done twice; where two processes write the same new row of its database at once, MLflow refuses one
    of them."""
    for _ in range(TRIES - 1):
        try:
            return work()
        except MlflowException as error:
            if error.error_code not in CLASHES:
                raise
        time.sleep(random.random() / 5)
    return work()


def _exists(client: MlflowClient, name: str, version: int) -> bool:
    try:
        client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code in ABSENT:
            return False
        raise
    return True


def _check_reason(why: str) -> None:
    if not why.strip() or len(why) > LONGEST_REASON:
        found = f"{len(why):,} characters" if why.strip() else "nothing"
        raise UserError(f"--why: found {found}, expected a reason of at most {LONGEST_REASON:,} characters")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())

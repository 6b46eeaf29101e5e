"""The Prefect server that a run owns: started when needed, shared while anyone needs it, gone with the last of them.

Its owners are processes: the command line itself, or, inside a DVC stage, the `dvc` command that runs the stages, so
that all stages of one `dvc repro` share one server. `.rlhf/server.json` names the server and its owners; whoever reads
or writes it holds the lock on `.rlhf/server.lock`. The server process itself looks after them: a thread in it (see
`_watch`) ends it once no owner lives, even if all were killed.

Prefect is imported inside functions: its settings are read on import, so `flows.environment.configure` goes first.
"""

import fcntl
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from rlhf_tasks.errors import UserError, without_secrets
from rlhf_tasks.processes import process_started

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

START_LIMIT = 180.0  # seconds; the first start in a project makes the database: 20 s on two idle cores
STOP_LIMIT = 2.0  # seconds from SIGTERM to SIGKILL
POLL = 0.5  # seconds between two looks at the owners

# A run needs the API and the recorder of task runs. The rest serves deployments and automations, which have a server
# of their own; here it would cost a start's time, idle CPU and rows that nobody reads.
LIGHT = {
    **{
        f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false"
        for service in (
            "CANCELLATION_CLEANUP",
            "CLEANUP_RECONCILER",
            "EVENT_PERSISTER",
            "FOREMAN",
            "LATE_RUNS",
            "PAUSE_EXPIRATIONS",
            "SCHEDULER",
            "TRIGGERS",
        )
    },
    # Slots of a concurrency limit are leases; the repossessor frees those whose holder was killed. Kept in files, since
    # this server ends with its run.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_EVENTS_STREAM_OUT_ENABLED": "false",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",  # 1 to 4 s; a block type is registered when one is saved
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


@dataclass(frozen=True)
class Process:
    """A process of this machine. `start` tells it from a later one with the same id."""

    pid: int
    start: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The living process `pid`."""
        start = process_started(pid)
        if start is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, start)

    def alive(self) -> bool:
        return process_started(self.pid) == self.start


@dataclass(frozen=True)
class ServerRecord:
    """`.rlhf/server.json`."""

    url: str
    host: str
    process: Process
    owners: tuple[Process, ...]

    def serving(self) -> bool:
        return self.host == socket.gethostname() and self.process.alive()

    def living_owners(self) -> tuple[Process, ...]:
        return tuple(owner for owner in self.owners if owner.alive())


@contextmanager
def server(state: Path, meanwhile: Callable[[], object] = lambda: None) -> Iterator[str]:
    """A Prefect server to run flows on: yields its API URL, which is also in `PREFECT_API_URL` and Prefect's settings.

    A server that the user named in `PREFECT_API_URL` is used as it is. Otherwise the project's own is joined or
    started. On leaving, what Prefect has queued is sent, and the server stops unless another owner lives.

    Args:
        state: the project's folder `.rlhf`.
        meanwhile: what takes seconds and needs no server, such as imports; done while the server starts.

    Raises:
        UserError: the server does not start, or the one that the user named does not answer.
    """
    if named := os.environ.get("PREFECT_API_URL"):
        _check_named(named)
        meanwhile()
        yield named
        return
    state, owner = state.resolve(), _owner()
    record, child = _join(state, owner)
    os.environ["PREFECT_API_URL"] = record.url
    try:
        from prefect.settings import PREFECT_API_URL, temporary_settings  # takes seconds, in which the server starts

        meanwhile()
        _await(record, state)
        with temporary_settings({PREFECT_API_URL: record.url}):  # in case it was imported before
            try:
                yield record.url
            finally:
                _drain()
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        if owner.pid == os.getpid():
            _leave(state, owner, child)


def owner_tag() -> str:
    """The tag for flow runs of this process, by which `close_dead_flow_runs` knows that nobody runs them any more."""
    me = Process.of(os.getpid())
    return f"owner:{me.pid}:{me.start}:{socket.gethostname()}"


def session() -> str:
    """One name for all stages of one `dvc repro`; outside DVC, this process's own."""
    owner = _owner()
    return f"{owner.pid}:{owner.start}:{socket.gethostname()}"


def close_dead_flow_runs() -> int:
    """Mark flow runs whose process has died as Crashed, with their task runs: Prefect leaves them RUNNING for ever.

    Looks at runs with an `owner_tag` of this machine, on the server of the present settings. Returns how many flow
    runs it closed.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
    from prefect.states import Crashed

    unfinished = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    state: State[None] = Crashed(message="The process that ran it has died.")
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(unfinished),
            sort=FlowRunSort.START_TIME_DESC,  # the synchronous client leaves no default to the server
            limit=200,
        )
        dead = [run for run in runs if _owner_is_dead(run.tags)]
        for run in dead:
            task_runs = client.read_task_runs(
                flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id]}}),
                task_run_filter=TaskRunFilter.model_validate(unfinished),
                sort=TaskRunSort.ID_DESC,
                limit=200,
            )
            for task_run in task_runs:
                client.set_task_run_state(task_run.id, state, force=True)
            client.set_flow_run_state(run.id, state, force=True)
    return len(dead)


def _owner_is_dead(tags: list[str]) -> bool:
    for tag in tags:
        match tag.split(":", 3):
            case ["owner", pid, start, host] if pid.isdigit() and host == socket.gethostname():
                return not Process(int(pid), start).alive()
    return False


# Who owns, who lives


def _owner() -> Process:
    """The `dvc` command above this process if this is a DVC stage, else this process."""
    dvc = _dvc_above()
    with suppress(ProcessLookupError):
        if dvc:
            return Process.of(dvc.pid)
    return Process.of(os.getpid())


def forced_by_dvc() -> bool:
    """Whether this is a stage of `dvc repro --force` or `dvc exp run --force`. DVC tells its stages nothing of it."""
    dvc = _dvc_above()
    with suppress(psutil.Error):
        return dvc is not None and any(_forces(word) for word in dvc.cmdline())
    return False


def _forces(word: str) -> bool:
    """Whether an argument of `dvc` is `-f`, alone or among others as in `-fs`, `--force` or `--force-downstream`."""
    return word.startswith("--forc") or re.fullmatch(r"-[fsmipPRkvq]*f[fsmipPRkvq]*", word) is not None


def _dvc_above() -> psutil.Process | None:
    if os.environ.get("DVC_STAGE"):
        for parent in psutil.Process().parents():
            with suppress(psutil.Error):
                if _is_dvc(parent.cmdline()):
                    return parent
    return None


def _is_dvc(command: list[str]) -> bool:
    """Whether it is `dvc …`, `python …/dvc …`, `python -m dvc …` or `python …/dvc/__main__.py …`."""
    return any(Path(word).name == "dvc" or word.endswith("dvc/__main__.py") for word in command[:4])


# The record


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """Hold the lock on the record. It is gone with its process."""
    with (state / "server.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(state: Path) -> ServerRecord | None:
    """The record, or None if there is none or it is not one."""
    try:
        found = json.loads((state / "server.json").read_text())
        process, owners = Process(**found.pop("process")), tuple(Process(**owner) for owner in found.pop("owners"))
        return ServerRecord(**found, process=process, owners=owners)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(state: Path, record: ServerRecord) -> None:
    """Write the record so that no reader finds half of it."""
    temporary = state / "server.json.new"
    temporary.write_text(json.dumps(asdict(record), indent=1))
    temporary.replace(state / "server.json")


# Starting and stopping


def _join(state: Path, owner: Process) -> tuple[ServerRecord, subprocess.Popen[bytes] | None]:
    """Add `owner` to the owners of the server that runs, or start one (then its process is returned too)."""
    (state / "logs").mkdir(parents=True, exist_ok=True)
    child = None
    with _locked(state):
        record = _read(state)
        if record is None or not record.serving():
            record, child = _start(state, owner)
        elif owner not in record.owners:
            record = replace(record, owners=(*record.living_owners(), owner))
        _write(state, record)
    return record, child


def _start(state: Path, owner: Process) -> tuple[ServerRecord, subprocess.Popen[bytes]]:
    """Start a server. It inherits a port that listens already: no other can take it, and early requests just wait."""
    home = Path(os.environ.get("PREFECT_HOME") or state / "prefect").resolve()
    home.mkdir(parents=True, exist_ok=True)
    packages = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
    environment = {**LIGHT, **os.environ, "PREFECT_HOME": str(home), "PYTHONPATH": path}
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener, (state / "logs/server.log").open("wb") as log:
        arguments = [str(state), str(listener.fileno()), str(owner.pid), owner.start]
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.server", *arguments],
            cwd=home,  # Prefect reads settings from files in the working folder
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for the run, which still has to tell the server
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    return ServerRecord(url, socket.gethostname(), Process.of(child.pid), (owner,)), child


def _await(record: ServerRecord, state: Path) -> None:
    """Wait until the server answers. The request waits in the port's queue, and fails at once if the server dies."""
    connection = http.client.HTTPConnection(urlsplit(record.url).netloc, timeout=START_LIMIT)
    try:
        connection.request("GET", "/api/health")
        if connection.getresponse().status == 200:
            return
        problem = "is not healthy"
    except TimeoutError:
        problem = f"did not answer within {START_LIMIT:.0f} s"
    except (OSError, http.client.HTTPException):
        problem = "ended"
    finally:
        connection.close()
    if record.process.alive():
        _stop(record.process)
    log = state / "logs/server.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:]) if log.exists() else ""
    raise UserError(
        f"The project's Prefect server {problem} while it was started. Its log, {log}, ends with:\n{tail}\n"
        "Mend what it says and run again, or set PREFECT_API_URL to a Prefect server of yours."
    )


def _check_named(url: str) -> None:
    """Whether Prefect answers at the URL that the user set.

    Raises:
        UserError: it does not.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    # in case Prefect was imported, and has read its settings, before the variable was set
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem:
        reason = without_secrets(" ".join(str(problem).split()))
        raise UserError(
            f"PREFECT_API_URL: found {without_secrets(url)}, which does not answer as a Prefect server ({reason}); "
            "start it with `prefect server start`, or unset the variable for a server of the project's own"
        )


def _drain() -> None:
    """Send the logs and events that Prefect has queued. It would do so at exit, when the server is gone."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=STOP_LIMIT)
    APILogWorker.drain_all(timeout=STOP_LIMIT)


def _leave(state: Path, owner: Process, child: subprocess.Popen[bytes] | None) -> None:
    """Take `owner` from the owners; stop the server if that was the last, locked so that nobody joins it now."""
    with _locked(state):
        record = _read(state)
        if record is None or owner not in record.owners:
            return
        others = tuple(other for other in record.living_owners() if other != owner)
        if others:
            _write(state, replace(record, owners=others))
            return
        if record.serving():
            _stop(record.process)
        (state / "server.json").unlink(missing_ok=True)
    if child is not None:
        child.wait()  # reap it


def _stop(process: Process) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
        limit = time.monotonic() + STOP_LIMIT
        while process.alive():
            if time.monotonic() > limit:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.02)


# The server process


def _watch(state: Path, owner: Process) -> None:
    """End this process when no owner lives. If the record is gone or another's, the owners known last count."""
    me = Process.of(os.getpid())
    owners: tuple[Process, ...] = (owner,)
    while True:
        time.sleep(POLL)
        if any(owner.alive() for owner in owners):
            continue
        with suppress(OSError), _locked(state):  # the folder may be gone
            record = _read(state)
            if record is not None and record.process == me:
                owners = record.living_owners()
                if owners:
                    continue
                (state / "server.json").unlink(missing_ok=True)
        break
    os.kill(me.pid, signal.SIGTERM)
    time.sleep(STOP_LIMIT)
    os.kill(me.pid, signal.SIGKILL)


def _serve(state: str, descriptor: str, owner_pid: str, owner_start: str) -> None:
    """Serve Prefect's API on the port of `descriptor`, as `prefect server start` does, while an owner lives."""
    owner = Process(int(owner_pid), owner_start)
    threading.Thread(target=_watch, args=(Path(state), owner), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    config = uvicorn.Config(create_app(final=True), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(descriptor))])


if __name__ == "__main__":
    _serve(*sys.argv[1:])

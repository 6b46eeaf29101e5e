"""The Prefect server that a run owns, with real servers and real processes.

A start takes 6 s, and 20 s more where the database has to be made: so all tests share one PREFECT_HOME, while each has
a project folder of its own.
"""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows import environment, server
from rlhf_tasks.errors import UserError

PACKAGES = Path(server.__file__).parent.parent

ENTER = """
import logging, sys, time
from pathlib import Path
from flows.environment import configure_prefect
from flows.server import close_dead_flow_runs, owner_tag, server
root = Path(sys.argv[1])
configure_prefect(root / ".rlhf")
"""

# Says the server's URL, then stays until its standard input is closed.
HOLD = f"""{ENTER}
with server(root / ".rlhf") as url:
    print(url, flush=True)
    sys.stdin.read()
"""

FLOW = f"""{ENTER}
with server(root / ".rlhf"):
    from prefect import flow, get_run_logger, task

    @task(cache_key_fn=lambda context, inputs: f"key-{{inputs['n']}}", persist_result=True)
    def work(n):
        logging.getLogger("rlhf_tasks.somewhere").info("working on %d", n)
        return {{"n": n}}

    @flow
    def run():
        get_run_logger().info("running")
        print(*(work(n, return_state=True).name for n in range(3)))

    run()
"""

# Closes dead runs, then works until it is killed.
STUCK = f"""{ENTER}
with server(root / ".rlhf"):
    from prefect import flow, tags, task
    print("closed", close_dead_flow_runs(), flush=True)

    @task
    def work():
        print("working", flush=True)
        time.sleep(300)

    @flow
    def run():
        work()

    with tags(owner_tag()):
        run()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect-home")


@pytest.fixture
def project(home: Path, tmp_path: Path) -> Iterator["Project"]:
    project = Project(tmp_path, home)
    yield project
    for process in project.started:
        process.kill()
        process.communicate()
    assert gone(project.server_pid()), "the server outlived everyone"


class Project:
    """A project folder, and the processes that a test starts in it."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root, self.home = root, home
        self.started: list[subprocess.Popen[str]] = []

    def start(self, script: str, *, program: str = "program.py", **variables: str) -> subprocess.Popen[str]:
        """Run a script as `python FOLDER/program ROOT`, with nothing of ours or of Prefect's in the environment."""
        file = self.root / program
        file.write_text(script)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "DVC"))}
        process = subprocess.Popen(
            [sys.executable, str(file), str(self.root)],
            env={**kept, "PYTHONPATH": str(PACKAGES), "PREFECT_HOME": str(self.home), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, script: str, **variables: str) -> str:
        """What a script that must end well prints. It must not complain about anything."""
        out, err = self.start(script, **variables).communicate(timeout=240)
        assert err == ""
        return out

    def server_pid(self) -> int | None:
        """The process id of the server in the record, if there is a record."""
        try:
            pid: int = json.loads((self.root / ".rlhf/server.json").read_text())["process"]["pid"]
            return pid
        except FileNotFoundError:
            return None

    def column(self, query: str) -> list[str]:
        """The first column of a query to Prefect's database."""
        with closing(sqlite3.connect(self.home / "prefect.db")) as database:
            return [row[0] for row in database.execute(query)]

    def states(self, table: str) -> Counter[str]:
        """How many runs in `flow_run` or `task_run` are in which state."""
        return Counter(self.column(f"SELECT state_name FROM {table}"))


def line(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def soon(condition: Callable[[], bool], within: float = 6.0) -> bool:
    """Whether it holds, or does within that many seconds."""
    limit = time.monotonic() + within
    while not (holds := condition()) and time.monotonic() < limit:
        time.sleep(0.05)
    return holds


def gone(pid: int | None, within: float = 6.0) -> bool:
    """Whether there is no such process, or soon is not."""
    return soon(lambda: pid is None or server.process_started(pid) is None, within)


def answers(url: str) -> bool:
    host, _, port = url.removeprefix("http://").removesuffix("/api").partition(":")
    with socket.socket() as connection:
        return connection.connect_ex((host, int(port))) == 0


def test_runs_flows_without_a_word_and_keeps_what_they_did(project: Project) -> None:
    assert project.run(FLOW) == "Completed Completed Completed\n"
    assert project.server_pid() is None
    assert project.run(FLOW) == "Cached Cached Cached\n"
    assert project.states("flow_run")["Completed"] == 2
    assert (project.states("task_run")["Completed"], project.states("task_run")["Cached"]) == (3, 3)
    messages = project.column("SELECT message FROM log WHERE level = 20")
    assert {"running", "working on 2"} <= set(messages)
    assert (project.root / ".rlhf/logs/server.log").read_text() == ""


def test_two_terminals_share_a_server_until_both_have_left(project: Project) -> None:
    first = project.start(HOLD)
    url = line(first)
    second = project.start(HOLD)
    assert line(second) == url
    pid = project.server_pid()
    first.kill()
    time.sleep(3 * server.POLL)
    assert answers(url)
    assert second.communicate(timeout=60) == ("", "")
    assert gone(pid, within=0)
    assert not answers(url)


def test_stages_of_one_dvc_command_share_a_server_that_dies_with_it(project: Project) -> None:
    (project.root / "stage.py").write_text(HOLD)
    stage = [sys.executable, str(project.root / "stage.py"), str(project.root)]
    fake = f"""
import os, subprocess, sys
for name in ("sft", "reward"):
    env = {{**os.environ, "DVC_STAGE": name}}
    subprocess.run({" ".join(stage)!r}, shell=True, env=env, stdin=subprocess.DEVNULL, check=True)
sys.stdin.read()
"""
    dvc = project.start(fake, program="dvc")
    url = line(dvc)
    pid = project.server_pid()
    assert line(dvc) == url
    assert answers(url)
    dvc.kill()
    assert gone(pid)
    assert project.server_pid() is None


def test_killed_and_interrupted_runs_end_as_crashed(project: Project) -> None:
    killed = project.start(STUCK)
    assert [line(killed), line(killed)] == ["closed 0", "working"]
    assert soon(lambda: project.states("flow_run")["Running"] == project.states("task_run")["Running"] == 1)
    pid = project.server_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)  # so that its record stays
    killed.kill()
    assert gone(pid)

    interrupted = project.start(STUCK)
    assert [line(interrupted), line(interrupted)] == ["closed 1", "working"]
    pid = project.server_pid()
    since = time.monotonic()
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=60)
    assert time.monotonic() - since < 6
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert gone(pid, within=0)
    for table in ("flow_run", "task_run"):
        assert (project.states(table)["Crashed"], project.states(table)["Running"]) == (2, 0)


def test_a_server_that_does_not_start_is_explained(project: Project) -> None:
    broken = project.root / "home"
    broken.mkdir()
    (broken / "prefect.db").write_text("no database, but long enough to be looked at " * 100)
    process = project.start(HOLD, PREFECT_HOME=str(broken))
    out, err = process.communicate(timeout=120)
    assert out == ""
    assert "UserError: The project's Prefect server ended while it was started." in err
    assert str(project.root / ".rlhf/logs/server.log") in err
    assert "file is not a database" in err
    assert project.server_pid() is None


@pytest.mark.parametrize("listens", [False, True])
def test_a_named_server_that_is_none_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    """Nobody listens at PREFECT_API_URL, or something that is no Prefect server."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501 to everything
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    if listens:
        thread.start()
    else:
        http.server_close()
    monkeypatch.setenv("PREFECT_API_URL", f"http://user:hidden@127.0.0.1:{http.server_port}/api")
    with (
        pytest.raises(UserError, match=r"PREFECT_API_URL: found http://127\.0\.0\.1.*prefect server start") as caught,
        server.server(tmp_path / ".rlhf"),
    ):
        raise AssertionError
    if listens:
        http.shutdown()
    assert "hidden" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_process_is_known_by_its_start_as_well() -> None:
    me = server.Process.of(os.getpid())
    assert me.alive()
    assert not server.Process(me.pid, me.start + "0").alive()
    child = subprocess.Popen(["true"])
    pid = child.pid
    assert gone(pid)  # though a zombie until someone waits for it
    child.wait()
    with pytest.raises(ProcessLookupError):
        server.Process.of(pid)


def test_only_dead_processes_of_this_machine_count_as_dead_owners() -> None:
    pid, start, host = server.owner_tag().split(":", 3)[1:]
    assert not server._owner_is_dead(["other", f"owner:{pid}:{start}:{host}"])
    assert server._owner_is_dead(["other", f"owner:{pid}:{start}0:{host}"])
    assert not server._owner_is_dead([f"owner:{pid}:{start}0:{host}.elsewhere"])
    assert not server._owner_is_dead(["owner:me", "owner"])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /venv/bin/dvc repro", True),
        ("/usr/bin/dvc exp run", True),
        ("python -m dvc repro", True),
        ("python -X dev /venv/site-packages/dvc/__main__.py exp queue-worker", True),
        ("python -m flows.cli stage sft", False),
        ("python /projects/dvc/train.py", False),
    ],
)
def test_the_dvc_command_is_recognised(command: str, expected: bool) -> None:
    assert server._is_dvc(command.split()) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *[(word, True) for word in ("-f", "-fs", "-sf", "--force", "--forc", "--force-downstream")],
        *[(word, False) for word in ("-s", "-S", "--file", "ppo.kl.coef=0.2", "-nfirst")],
    ],
)
def test_force_is_recognised(word: str, expected: bool) -> None:
    assert server._forces(word) == expected


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"process": {"pid": 1}}', '{"url": "u", "host": "h", "proc'])
def test_a_record_that_is_none_reads_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text(text)
    assert server._read(tmp_path) is None


def test_configure_keeps_what_the_user_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"PREFECT_HOME": "/theirs", "PREFECT_LOGGING_LEVEL": "DEBUG", "NO_PROXY": "intern"}
    monkeypatch.setattr(os, "environ", variables)
    environment.configure_libraries()
    environment.configure_prefect(tmp_path / ".rlhf")
    assert variables["PREFECT_HOME"] == "/theirs"
    assert "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL" not in variables
    assert variables["NO_PROXY"] == variables["no_proxy"] == "intern,127.0.0.1"
    assert variables["PREFECT_LOCAL_STORAGE_PATH"] == str(tmp_path / ".rlhf/results")
    assert variables["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_libraries_listen_to_what_is_configured(project: Project) -> None:
    script = f"""{ENTER}
from huggingface_hub import constants
from mlflow.telemetry.utils import is_telemetry_disabled
from mlflow.utils.logging_utils import get_mlflow_log_level
from prefect.analytics import is_telemetry_enabled
from prefect.settings import get_current_settings
settings = get_current_settings()
assert settings.results.local_storage_path == root / ".rlhf/results"
assert not settings.server.analytics_enabled and not is_telemetry_enabled()
assert is_telemetry_disabled() and get_mlflow_log_level() == "ERROR"
assert constants.HF_HUB_DISABLE_TELEMETRY and constants.HF_HUB_DISABLE_PROGRESS_BARS
"""
    assert project.run(script) == ""

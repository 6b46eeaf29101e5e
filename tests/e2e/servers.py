"""Real servers on loopback, on free ports, that end with the test that started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

BINARIES = Path(sys.executable).parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(
    *command: str, log: Path, health: str | None = None, cwd: Path | None = None, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, ready when `health` (a URL) answers; ended with all its children."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(BINARIES / command[0]), *command[1:]],
            cwd=cwd,
            env=dict(environment),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        if health:
            wait_until(lambda: answers(health), 120, lambda: f"{command}: {log.read_text()}", process)
        yield process
    finally:
        end(process)


def wait_until(ready, seconds: float, what, process: subprocess.Popen[bytes] | None = None):  # type: ignore[no-untyped-def]
    """What `ready` returns, once that is true."""
    limit = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < limit, what() if callable(what) else what
        assert process is None or process.poll() is None, what() if callable(what) else what
        time.sleep(0.3)
    return found


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process group, SIGKILL for what is left of it after five seconds."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@contextmanager
def prefect_server(home: Path, log: Path) -> Iterator[str]:
    """A Prefect server as a user starts one; yields its API URL."""
    port = free_port()
    unwanted = ("PREFECT_", "MLFLOW_", "DVC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    command = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui")
    url = f"http://127.0.0.1:{port}/api"
    with running(*command, log=log, health=f"{url}/health", environment=environment):
        yield url

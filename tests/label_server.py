"""`rlhf label` as a process of its own, and what a page would ask of it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


class LabelServer:
    """A running `rlhf label`.

    Attributes:
        said: what it printed until it listened.
    """

    def __init__(self, root: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "flows.cli", "label", *(arguments or ("--port", "0"))]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said = ""
        assert self.process.stdout is not None
        while not (address := re.search(r"http://\S+:(\d+)", self.said)):
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            self.said += line
        self.url, self.port = address[0], int(address[1])

    def ask(self, path: str, said: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the page would get."""
        status, _, body = self.request("GET" if said is None else "POST", path, said)
        assert status == 200, body
        return json.loads(body)

    def request(
        self, method: str, path: str, said: Any = None, headers: dict[str, str | None] | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers and body of one request; `headers` in place of what a browser sends, None for not at all."""
        sent: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}"}
        body = said if isinstance(said, str) else json.dumps(said)
        if method == "POST":
            sent |= {"Origin": self.url, "Content-Type": "application/json", "Content-Length": str(len(body.encode()))}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in (sent | (headers or {})).items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body.encode() if method == "POST" else None)
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
        connection.close()
        return found

    def end(self, signal: int) -> tuple[str, str]:
        """Send a signal, wait; what else it printed, and its errors."""
        self.process.send_signal(signal)
        return self.process.communicate(timeout=30)


@contextmanager
def labelling(root: Path, *arguments: str) -> Iterator[LabelServer]:
    """`rlhf label` until the end of the block, on a free port unless `arguments` name one."""
    server = LabelServer(root, *arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()

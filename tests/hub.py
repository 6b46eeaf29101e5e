"""A small Hub: a server of one model's files at one commit, and the cache that huggingface_hub makes of them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME, COMMIT = "somebody/tiny-llama", "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"


def blob(content: bytes) -> str:
    """The id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_cache(home: Path, model: Path, name: str = NAME, commit: str = COMMIT) -> Path:
    """The cache as `from_pretrained` leaves it: blobs, a snapshot of links to them, a ref. Gives the snapshot."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for path in (folder / "blobs", folder / "refs", snapshot):
        path.mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    for file in model.iterdir():
        content = file.read_bytes()
        (folder / "blobs" / blob(content)).write_bytes(content)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob(content)}")
    return snapshot


@contextmanager
def serve(model: Path) -> Iterator[tuple[str, list[str]]]:
    """A Hub at an address of this machine that has the files of `model`; yields it, and what it was asked for."""
    asked: list[str] = []
    files = {file.name: file.read_bytes() for file in model.iterdir()}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if path == f"/api/models/{NAME}/tree/{COMMIT}":
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": blob(content)}
                    for name, content in files.items()
                ]
                self.answer(json.dumps(listed).encode(), {"Content-Type": "application/json"})
            elif (file := path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")) in files:
                self.answer(files[file], {"ETag": f'"{blob(files[file])}"', "X-Repo-Commit": COMMIT})
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def environment(home: Path, *, endpoint: str = NOWHERE, offline: bool = False) -> dict[str, str]:
    """This process's, with a cache of its own and this Hub."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    return own | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
    }

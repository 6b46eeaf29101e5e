"""`rlhf serve`: a registered Actor behind OpenAI's API, on this machine unless told otherwise."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flows.console import console
from rlhf_tasks.config import Params
from rlhf_tasks.errors import UserError
from rlhf_tasks.tracking import Tracker, answered, is_recorded

SECONDS_TO_FINISH = 5  # what is being answered when the server is told to end


@dataclass(frozen=True)
class Found:
    """A registered Actor, and where its files are.

    Attributes:
        name: what requests call it: `NAME@ALIAS` or `NAME@VERSION`.
        template: how prompts were written for it; empty if its version does not say.
        tags: what it came from.
    """

    name: str
    version: int
    template: str
    tags: Mapping[str, str]
    folder: Path


@contextmanager
def registered(root: Path, params: Params, uri: str) -> Iterator[Found]:
    """The Actor that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names; empty: the project's champion.

    Raises:
        UserError: there is none, or its files cannot be had.
    """
    from rlhf_tasks.logged_models import fetch_actor
    from rlhf_tasks.registry import DIGEST, TEMPLATE, find_registered

    uri = uri or f"models:/{params.register_.name}@champion"
    if not is_recorded(root):
        raise UserError(f"{uri}: {root} has no mlflow.db, so nothing is registered; `rlhf run`, or MLFLOW_TRACKING_URI")
    tracker = Tracker(root)
    with tempfile.TemporaryDirectory() as target:
        with answered(tracker.uri):
            version = find_registered(uri, tracker.uri)
        if DIGEST not in version.tags:
            raise UserError(f"{uri}: found no Actor, expected one that this pipeline registered")
        folder = fetch_actor(version.name, version.version, tracker.uri, Path(target))
        name = f"{version.name}@{uri.rpartition('@')[2]}" if "@" in uri else f"{version.name}@{version.version}"
        yield Found(name, version.version, version.tags.get(TEMPLATE, ""), version.tags, folder)


def serve(root: Path, params: Params, uri: str, host: str, port: int) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    if find_spec("openai") is None:
        raise UserError(
            "rlhf serve: found no `openai`, whose types the server uses; run `make lint`, which installs it"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here looks there; read when transformers is imported
    with _listen(host, port) as listener, registered(root, params, uri) as found:
        import uvicorn

        from rlhf_tasks.models import set_up_torch
        from rlhf_tasks.serving import Served, build_app

        served = Served.load(found.name, found.folder, found.template, set_up_torch(params.runtime))
        app = build_app(served, local=_is_local(host))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_FINISH)
        _say(found, served, host, listener.getsockname()[1])
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            sys.exit(130)


def _say(found: Found, served: Any, host: str, port: int) -> None:
    where = f"[{host}]" if ":" in host else host
    console.print(
        f"{found.name.partition('@')[0]} version {found.version} answers at http://{where}:{port}/v1 "
        f"as {found.name}; Ctrl-C ends it",
        soft_wrap=True,
        markup=False,
    )
    if served.continues:
        console.print(
            "It was trained without a template, to continue texts: /v1/completions takes any text, "
            "/v1/chat/completions one message of the user's, which it continues",
            soft_wrap=True,
            markup=False,
        )
    if not _is_local(host):
        console.print(f"Whoever reaches {host} may use it: there is no password", soft_wrap=True, markup=False)


def _listen(host: str, port: int) -> socket.socket:
    """A socket, taken before anything is loaded.

    Raises:
        UserError: the address is none of this machine's, or taken.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another one") from None


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Answering OpenAI's requests from one registered Actor, by the server of transformers (`transformers serve`).

Theirs are HTTP, sampling and streaming. Ours is what that server is held to: one model, loaded as everywhere here
(safetensors, no code of others), whatever a request names; and a gate before it, which answers with 4xx and a sentence
what it would answer with a fault.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from rlhf_tasks.chat_template import jinja_of
from rlhf_tasks.models import load_actor, load_tokenizer
from rlhf_tasks.openai_requests import BadRequest, Chat, Completion, Kind, Known, checked

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LARGEST_BODY = 4 << 20  # bytes
LOCAL = ("localhost", "127.0.0.1", "::1")
ASKED: dict[str, Kind] = {"/v1/chat/completions": Chat, "/v1/completions": Completion}
LOOKED_AT = ("/v1/models", "/health")


@dataclass(frozen=True)
class Served:
    """A model under the name that requests give it, `NAME@ALIAS` or `NAME@VERSION`.

    Attributes:
        continues: it was trained without a template, so it takes one text.
    """

    name: str
    model: Any
    tokenizer: Any
    continues: bool

    @classmethod
    def load(cls, name: str, folder: Path, template: str, device: torch.device) -> Served:
        """From an Actor's folder.

        Args:
            template: how prompts were written for it; empty: its tokenizer's template if it has one.
        """
        tokenizer = load_tokenizer(folder)
        continues = template == "none" or not tokenizer.chat_template
        if continues:
            tokenizer.chat_template = jinja_of("none", tokenizer)
        return cls(name, load_actor(folder, device), tokenizer, continues)

    @property
    def known(self) -> Known:
        """What requests to it are checked against."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return Known(self.name, self.tokenizer, positions, self.model.generation_config.max_new_tokens)


class OneModel(ModelManager):
    """transformers' store of models, with one in it that is there from the start and stays; it can load no other."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.force_model = served.name  # of `_resolve_model`: other names are refused there too

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model, which goes by `NAME@...` in transformers' server too."""
        assert model_id_and_revision == self.served.name
        return self.served.model, self.served.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """For `/v1/models`: not what the user's Hub cache holds."""
        return [{"id": self.served.name, "object": "model", "created": 0, "owned_by": "rlhf"}]

    def shutdown(self) -> None:
        """The model leaves memory with the process."""


def build_app(served: Served, *, local: bool) -> App:
    """transformers' server for one model, behind the gate.

    Args:
        local: it is reached on this machine only, so a request for another host's name is some web page's doing.
    """
    manager, state = OneModel(served), GenerationState()
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        generation_state=state,
    )
    return Gate(app, served.known, local)


class Gate:
    """Lets through what the server behind it can answer, and answers the rest itself."""

    def __init__(self, app: App, known: Known, local: bool) -> None:
        self.app, self.known, self.local = app, known, local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check_head(scope)
            if scope["method"] == "POST":
                body = checked(_parsed(await _read(receive)), ASKED[scope["path"]], self.known)
                receive = _replay(json.dumps(body).encode(), receive)
        except BadRequest as error:
            return await _refuse(error, send)
        return await self.app(scope, receive, send)

    def _check_head(self, scope: Message) -> None:
        path, method = scope["path"], scope["method"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.local and _host(headers.get("host", "")) not in LOCAL:
            raise BadRequest(403, "this server answers this machine only, under the name localhost or 127.0.0.1")
        if path not in (*ASKED, *LOOKED_AT):
            raise BadRequest(404, f"{path}: expected one of {', '.join((*ASKED, *LOOKED_AT))}")
        expected = "POST" if path in ASKED else "GET"
        if method != expected:
            raise BadRequest(405, f"{path}: found {method}, expected {expected}")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise BadRequest(415, f"Content-Type: found {kind or 'nothing'}, expected application/json")


def _host(header: str) -> str | None:
    """The name that a request was made to, without its port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


async def _read(receive: Receive) -> bytes:
    """A request's whole body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > LARGEST_BODY:
            raise BadRequest(413, f"found a body of more than {LARGEST_BODY:,} bytes; send less")
    return body


def _parsed(body: bytes) -> Any:
    try:
        document = json.loads(body)
        json.dumps(document, ensure_ascii=False).encode()  # half a character makes no token
    except (ValueError, RecursionError):
        raise BadRequest(400, "the body is no JSON in UTF-8") from None
    return document


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body in place of the one that was read; after it, what the client does, such as going away."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def _refuse(error: BadRequest, send: Send) -> None:
    """An error as OpenAI's clients read it."""
    told = {"message": str(error), "type": "invalid_request_error", "param": None, "code": error.code}
    body = json.dumps({"error": told}, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

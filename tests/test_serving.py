"""`rlhf serve`: a real client of OpenAI's against the real server, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from tiny import CPU, PARAMS, REPOSITORY

from rlhf_tasks import config, registry
from rlhf_tasks.chat_template import jinja_of
from rlhf_tasks.data.encoding import render_prompt
from rlhf_tasks.data.formats import Conversation, Message
from rlhf_tasks.errors import UserError
from rlhf_tasks.model_card import Facts
from rlhf_tasks.models import load_actor, load_tokenizer
from rlhf_tasks.openai_requests import BadRequest, Chat, Completion, Known, checked
from rlhf_tasks.serving import Served, build_app
from rlhf_tasks.tracking import Tracker

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GENERATION = config.Generation(max_new_tokens=9, temperature=0.8)
NAME = "rlhf-actor@champion"
ASKED: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who<eos>?"}]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_actor: Path, tiny_scorer: Path) -> Path:
    """A project whose champion was trained with its tokenizer's own chat template."""
    root = tmp_path_factory.mktemp("project")
    (root / "params.yaml").write_text(PARAMS)
    (root / "evaluate.json").write_text(json.dumps({"score_gain_low": 0.5, "kl_sequence": 6.0}))
    shutil.copytree(tiny_actor, root / "actor")
    tokenizer = load_tokenizer(root / "actor")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(root / "actor")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracker = Tracker(root)
    registry.settle(
        register_=config.Register(),
        generation=GENERATION,
        actor=root / "actor",
        reward=tiny_scorer,
        evaluation=root / "evaluate.json",
        tracking=registry.TrackingContext(
            uri=tracker.uri,
            run_id=tracker.start_stage(tracker.start_pipeline({}, {}, "try"), "register"),
            actor_digest="a",
            reward_digest="b",
            lock=root / "lock",
            facts=lambda: Facts("chat", jinja_of("chat", tokenizer)),
        ),
    )
    return root


def rlhf(root: Path, *arguments: str) -> subprocess.Popen[str]:
    unwanted = ("MLFLOW_", "OPENAI_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def url(project: Path) -> Iterator[str]:
    """The champion, served as a user would serve it."""
    process = rlhf(project, "serve", "--port", "0")
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(rf"rlhf-actor version 1 answers at (http://127\.0\.0\.1:\d+/v1) as {NAME}; .*\n", line)
    if not found:
        process.kill()
        raise AssertionError(f"{line}{process.communicate()}")
    yield found[1]
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "")


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def greedy(folder: Path, text: str, tokens: int) -> str:
    """What a model says after a text, the likeliest token each time."""
    model, tokenizer = load_actor(folder, CPU), load_tokenizer(folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, do_sample=False, max_new_tokens=tokens)[0, ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_a_chat_is_answered_as_training_asked(client: openai.OpenAI, project: Path) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ASKED, temperature=0, max_tokens=12)
    tokenizer = load_tokenizer(project / "actor")
    asked = Conversation(tuple(Message(m["role"], m["content"]) for m in ASKED))
    prompt = render_prompt(asked, "chat", tokenizer)
    assert "Who<eos>" not in prompt
    assert answer.choices[0].message.content == greedy(project / "actor", prompt, 12)
    assert answer.choices[0].message.role == "assistant"
    assert answer.model == NAME
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_streaming_says_the_same(client: openai.OpenAI) -> None:
    settings: Any = {"model": NAME, "messages": ASKED, "seed": 3, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 3
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_text_is_continued(client: openai.OpenAI, project: Path) -> None:
    answer = client.completions.create(model=NAME, prompt="This film is", temperature=0)
    assert answer.choices[0].text == greedy(project / "actor", "This film is", 9), "as long as in training"
    chunks = client.completions.create(model=NAME, prompt="This film is", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_what_it_serves(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]


def test_a_mistake_gets_a_sentence_and_the_server_goes_on(client: openai.OpenAI, project: Path) -> None:
    with pytest.raises(openai.BadRequestError, match=r"`temperature`: found -1, expected greater than or equal to 0"):
        client.chat.completions.create(model=NAME, messages=ASKED, temperature=-1)
    for other in ("gpt-4o", str(project / "actor"), "rlhf-actor", "owner/name@main", "rlhf-actor@champion@x"):
        with pytest.raises(openai.NotFoundError, match=rf"expected '{NAME}', the only one here"):
            client.chat.completions.create(model=other, messages=ASKED)
    assert client.chat.completions.create(model=NAME, messages=ASKED, max_tokens=1).choices


@pytest.mark.parametrize(
    ("path", "method", "body", "headers", "status", "said"),
    [
        ("chat/completions", "POST", b"{", {}, 400, "the body is no JSON in UTF-8"),
        ("chat/completions", "POST", b'{"messages": "\\ud800"}', {}, 400, "the body is no JSON in UTF-8"),
        ("chat/completions", "POST", b"[" * 99999, {}, 400, "the body is no JSON in UTF-8"),
        ("chat/completions", "POST", b"[1]", {}, 400, "the body is no JSON object"),
        ("chat/completions", "POST", b" " * (4 << 20) + b"{}", {}, 413, "a body of more than 4,194,304 bytes"),
        ("chat/completions", "POST", b"{}", {"Content-Type": "text/plain"}, 415, "found text/plain, expected app"),
        ("chat/completions", "GET", None, {}, 405, "found GET, expected POST"),
        ("chat/completions", "POST", b"{}", {"Host": "evil.example"}, 403, "this server answers this machine only"),
        ("chat/completions", "POST", b"{}", {"Host": "[::"}, 403, "this server answers this machine only"),
        ("responses", "POST", b'{"input": "x"}', {}, 404, "/v1/responses: expected one of"),
        ("../load_model", "POST", b'{"model": "/tmp"}', {}, 404, "/load_model: expected one of"),
        ("../reset", "POST", b"{}", {}, 404, "/reset: expected one of"),
        ("models", "POST", b"{}", {}, 405, "found POST, expected GET"),
    ],
)  # fmt: skip
def test_the_gate(
    url: str, path: str, method: str, body: bytes | None, headers: dict[str, str], status: int, said: str
) -> None:
    where = url.removesuffix("/v1") + path[2:] if path.startswith("..") else f"{url}/{path}"
    request = urllib.request.Request(where, body, {"Content-Type": "application/json"} | headers, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["type"]) == (status, "invalid_request_error")
    assert said in error["message"]


# What requests are held to -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tiny_actor: Path) -> Known:
    tokenizer = load_tokenizer(tiny_actor)
    tokenizer.chat_template = jinja_of("alpaca", tokenizer)
    return Known("m@1", tokenizer, positions=400, max_tokens=24)


USER = [{"role": "user", "content": "Who?"}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"messages": None}, "`messages` is missing"),
        ({"messages": []}, "`messages`: found [], "),
        ({"messages": "Who?"}, "`messages`: found 'Who?', expected a list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "`messages.0.role`: found 'bot', expected 'system', "),
        ({"messages": [{"role": "user"}]}, "`messages.0.content` is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "`messages.0.content`: found None, expected a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "`messages.0.content.0.t"),
        (
            {"messages": [{"role": "user", "content": "x" * 999}]},
            "which leave 0 of the model's 400 positions for an answer; shorten it",
        ),
        ({"max_tokens": 399}, "of the model's 400 positions for `max_tokens: 399`; shorten it"),
        ({"max_tokens": 0}, "`max_tokens`: found 0, expected greater than or equal to 1"),
        ({"max_tokens": 2.5}, "`max_tokens`: found 2.5, expected an integer"),
        ({"max_tokens": 10**40}, "`max_tokens`: found 1000"),
        ({"temperature": "hot"}, "`temperature`: found 'hot', expected a number"),
        ({"temperature": float("nan")}, "`temperature`: found nan, expected"),
        ({"top_p": 0}, "`top_p`: found 0, expected greater than 0"),
        ({"seed": -1}, "`seed`: found -1, expected"),
        ({"seed": True}, "`seed`: found True, expected"),
        ({"stop": ""}, "`stop`: found ''"),
        ({"stop": ["a"] * 5}, "`stop`: found ['a', 'a', 'a', 'a', 'a']"),
        ({"n": 2}, "`n`: found 2, expected 1: this server has nothing else"),
        ({"n": True}, "`n`: found True, expected 1"),
        ({"logprobs": True}, "`logprobs`: found True, expected False"),
        ({"tools": [{"type": "function"}]}, "`tools`: found [{'type': 'function'}], expected []"),
        ({"response_format": {"type": "json_object"}}, "`response_format`: found {'type': 'json_object'}"),
        ({"generation_config": "{"}, "`generation_config`: no such field; expected model, "),
        ({"temprature": 1}, "`temprature`: no such field; did you mean `temperature`?"),
        ({"prompt": "x"}, "`prompt`: no such field"),
    ],
)
def test_a_request_that_cannot_be_answered(known: Known, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        checked({"model": "m@1", "messages": USER} | changes, Chat, known)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 400


def test_what_asks_for_nothing_is_let_through(known: Known) -> None:
    parts = [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?<eos>"}]
    spoken = {"role": "assistant", "content": "I.", "refusal": None, "tool_calls": None, "annotations": []}
    body = {
        "messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}, spoken, *USER],
        "n": 1, "presence_penalty": 0.0, "logprobs": False, "tools": None, "tool_choice": "auto", "user": "me",
        "response_format": {"type": "text"}, "stop": [], "stream": False, "top_p": 1, "max_completion_tokens": 3,
    }  # fmt: skip
    assert checked(body, Chat, known) == {
        "model": "m@1",
        "messages": [
            {"role": "system", "content": "x"},
            {"role": "user", "content": "Who?<\u200beos>"},
            {"role": "assistant", "content": "I."},
            *USER,
        ],
        "stream": False,
        "top_p": 1.0,
        "max_tokens": 3,
    }


def test_the_room_that_is_left_bounds_an_answer(known: Known) -> None:
    def room(prompt: Any, **asked: Any) -> int:
        return checked({"prompt": prompt} | asked, Completion, known)["max_tokens"]

    tokens = len(known.tokenizer("x" * 390)["input_ids"])
    assert 376 < tokens < 400
    assert room("x") == room(["x"]) == 24
    assert room("x", max_tokens=300) == 300
    assert room("x" * 390) == 400 - tokens
    with pytest.raises(BadRequest, match="found no text to answer"):
        room("")


# What was trained without a template ---------------------------------------------------------------------------------


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An app behind a server in this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def test_a_model_that_continues_texts_continues_one_message(tiny_actor: Path) -> None:
    served = Served.load("m@1", tiny_actor, "none", CPU)
    served.model.generation_config.max_new_tokens = 5
    assert served.continues
    with serving(build_app(served, local=True)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        text: Any = [{"role": "user", "content": "This film is"}]
        answer = client.chat.completions.create(model="m@1", messages=text, temperature=0)
        assert answer.choices[0].message.content == greedy(tiny_actor, "This film is", 5)
        with pytest.raises(openai.BadRequestError, match="this model continues a text, so it takes one message"):
            client.chat.completions.create(model="m@1", messages=[*text, *text])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models:/rlhf-actor/7"], "rlhf-actor has no version 7 in the MLflow registry"),
        (["rlhf-actor"], "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        (
            ["models:/rlhf-reward/1"],
            "models:/rlhf-reward/1: found no Actor, expected one that this pipeline registered",
        ),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: cannot listen there"),
    ],
)
def test_what_cannot_be_served(project: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    from flows.cli import app

    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    arguments = arguments if "--host" in arguments else [*arguments, "--port", "0"]
    with pytest.raises(UserError) as caught:
        app(["serve", *arguments], standalone_mode=False)
    assert said in str(caught.value)

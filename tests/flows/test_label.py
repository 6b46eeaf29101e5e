"""`rlhf label` with a real server: what it keeps, what it shows, whom it refuses, how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from label_server import REPOSITORY, LabelServer, labelling

from flows import cli
from rlhf_tasks.data.judgements import standing
from rlhf_tasks.label_file import LabelFile

PAIRS = 40


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the shipped params.yaml and samples of forty prompts, as `evaluate` leaves them."""
    (tmp_path / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    (tmp_path / "samples").mkdir()
    with (tmp_path / "samples/evaluate.jsonl").open("w") as file:
        for number in range(PAIRS):
            row = {"prompt": f"Prompt {number}", "sft": f" sft {number}", "actor": f" actor {number}"}
            file.write(json.dumps(row | {"sft_score": 0.5, "actor_score": 1.5, "kl": 0.0}) + "\n")
    return tmp_path


@pytest.fixture
def server(project: Path) -> Iterator[LabelServer]:
    with labelling(project) as running:
        yield running


def judge(server: LabelServer, rater: str, choice: str) -> dict[str, Any]:
    """Say something of the pair that is next."""
    pair = server.ask(f"/state?rater={rater}")["pair"]
    return server.ask("/judge", {"rater": rater, "pair": pair["id"], "choice": choice})


def kept(project: Path) -> list[tuple[str, str]]:
    return [(one.rater, one.choice) for one in standing(LabelFile(project / "data/labels.jsonl").judged())]


def test_a_rater_is_led_from_pair_to_pair(server: LabelServer, project: Path) -> None:
    seen = list[str]()
    for choice in ("first", "tie", "both bad", "skip", "second"):
        pair = server.ask("/state?rater=ada")["pair"]
        seen.append(pair["prompt"])
        assert sorted(pair["answers"]) == [f" {name} {len(seen) - 1}" for name in ("actor", "sft")]
        state = server.ask("/judge", {"rater": "ada", "pair": pair["id"], "choice": choice})
        assert [state["done"], state["total"]] == [len(seen), PAIRS]
    assert seen == [f"Prompt {number}" for number in range(5)]
    assert kept(project) == [("ada", choice) for choice in ("first", "tie", "both bad", "skip", "second")]

    back = server.ask("/undo", {"rater": "ada"})
    assert [back["done"], back["pair"]["prompt"]] == [4, "Prompt 4"]
    assert server.ask("/undo", {"rater": "ada"})["pair"]["prompt"] == "Prompt 3"
    assert kept(project) == [("ada", choice) for choice in ("first", "tie", "both bad")]


def test_what_was_taken_back_is_shown_again_at_once(server: LabelServer) -> None:
    """Also where it was judged before its turn, in a tab that was old."""
    third = [judge(server, "bob", "skip") for _ in range(2)][-1]["pair"]
    assert server.ask("/judge", {"rater": "ada", "pair": third["id"], "choice": "tie"})["pair"]["prompt"] == "Prompt 0"
    assert server.ask("/undo", {"rater": "ada"})["pair"]["prompt"] == third["prompt"] == "Prompt 2"


def test_what_is_kept_is_the_answer_that_was_clicked(server: LabelServer, project: Path) -> None:
    """The Actor's comes first for about half of the pairs, for others with another rater, the same after a reload."""
    firsts = dict[str, list[str]]()
    for rater in ("ada", "bob"):
        for _ in range(PAIRS):
            shown, again = (server.ask(f"/state?rater={rater}")["pair"] for _ in range(2))
            assert shown == again
            firsts.setdefault(rater, []).append(shown["answers"][0].split()[0])
            state = server.ask("/judge", {"rater": rater, "pair": shown["id"], "choice": "first"})
    assert state["pair"] is None
    judged = LabelFile(project / "data/labels.jsonl").judged()
    assert [one.answers[0].split()[0] for one in judged] == firsts["ada"] + firsts["bob"]
    assert all(one.models and one.models[0] == one.answers[0].split()[0] for one in judged)
    assert all(one.scores == ((1.5, 0.5) if one.models == ("actor", "sft") else (0.5, 1.5)) for one in judged)
    for rater in ("ada", "bob"):
        assert 8 <= firsts[rater].count("actor") <= 32
    assert firsts["ada"] != firsts["bob"]


def test_agreement_is_shown_as_it_grows(server: LabelServer) -> None:
    def better(rater: str, name: str) -> dict[str, Any]:
        pair = server.ask(f"/state?rater={rater}")["pair"]
        first = pair["answers"][0].split()[0] == name
        return server.ask("/judge", {"rater": rater, "pair": pair["id"], "choice": "first" if first else "second"})

    for rater, names in (("ada", ("actor", "actor", "sft")), ("bob", ("actor", "sft"))):
        for name in names:
            state = better(rater, name)
    assert state["raters"] == 2
    found = state["agreement"]
    assert (found["pairs"], found["raters"]) == (2, {"part": 1, "count": 2})
    assert found["reward"] == {"part": 3, "count": 5}
    assert "actor" not in found, "which answers are the Actor's is nobody's business who judges"


def test_raters_and_tabs_at_once_lose_nothing(server: LabelServer, project: Path) -> None:
    """Three raters, of whom one has two tabs open on the same pairs: there the later word stands."""

    def work(rater: str) -> None:
        state = server.ask(f"/state?rater={rater}")
        while pair := state["pair"]:
            state = server.ask("/judge", {"rater": rater, "pair": pair["id"], "choice": "tie"})

    threads = [threading.Thread(target=work, args=(rater,)) for rater in ("ada", "bob", "eve", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(rater for rater, _ in kept(project)) == {"ada": PAIRS, "bob": PAIRS, "eve": PAIRS}


def test_a_second_server_works_on_the_same_file(server: LabelServer, project: Path) -> None:
    with labelling(project) as other:
        judge(server, "ada", "first")
        judge(other, "ada", "second")
        assert judge(server, "ada", "tie")["done"] == 3
    assert kept(project) == [("ada", "first"), ("ada", "second"), ("ada", "tie")]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rater": "", "choice": "tie"}, "name: found none, expected yours, of 1 to 64 characters"),
        ({"rater": "x" * 65, "choice": "tie"}, "name: found one of 65 characters"),
        ({"rater": "a\ud800", "choice": "tie"}, "name: found one of 2 characters"),
        ({"rater": 7, "choice": "tie"}, "name: found 7, expected yours"),
        (
            {"rater": "ada", "choice": "withdrawn"},
            "choice: found 'withdrawn', expected one of first, second, tie, both",
        ),
        ({"rater": "ada", "choice": ["tie"]}, r"choice: found \['tie'\]"),
        (
            {"rater": "ada", "choice": "tie", "pair": "x"},
            "this pair is no longer among those to judge; reload the page",
        ),
        ({"rater": "ada", "choice": "tie", "pair": [1]}, "this pair is no longer among"),
        ("[1", "name: found none"),
        ("[" * 9000, "name: found none"),
        ([], "name: found none"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(said: Any, message: str, shared: LabelServer) -> None:
    if isinstance(said, dict) and "pair" not in said:
        said |= {"pair": shared.ask("/state?rater=ada")["pair"]["id"]}
    status, _, body = shared.request("POST", "/judge", said)
    assert status == 400
    assert re.match(message, json.loads(body)["error"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelServer]:
    """A server that keeps nothing that is sent to it."""
    root = tmp_path_factory.mktemp("shared")
    (root / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    (root / "pairs.jsonl").write_text('{"prompt": "p", "answers": ["a", "b"]}\n')
    with labelling(root, "--port", "0", "--pairs", "pairs.jsonl") as running:
        yield running
    assert LabelFile(root / "data/labels.jsonl").judged() == []


@pytest.mark.parametrize(
    ("method", "headers", "message"),
    [
        ("GET", {"Host": "evil.example"}, "Host: found 'evil.example'"),
        ("GET", {"Host": "127.0.0.1.evil.example:80"}, "Host: found"),
        ("GET", {"Host": None}, ""),
        ("GET", {"Host": "[::1"}, "Host: found"),
        ("POST", {"Host": "evil.example", "Origin": "http://evil.example"}, "Host: found"),
        ("POST", {"Origin": None}, "Origin: expected this page's own"),
        ("POST", {"Origin": "null"}, "Origin: expected"),
        ("POST", {"Origin": "http://["}, "Origin: expected"),
        ("POST", {"Origin": "http://evil.example"}, "Origin: expected"),
        ("POST", {"Origin": "http://127.0.0.1:1"}, "Origin: expected"),
        ("POST", {"Content-Type": "text/plain"}, "Content-Type: expected application/json"),
        ("POST", {"Content-Type": "application/x-www-form-urlencoded"}, "Content-Type: expected"),
        ("POST", {"Content-Length": "10001"}, "expected a short request"),
    ],
)
def test_only_its_own_page_is_let_in(
    shared: LabelServer, method: str, headers: dict[str, str | None], message: str
) -> None:
    pair = shared.ask("/state?rater=ada")["pair"]["id"]
    path = "/judge" if method == "POST" else "/state?rater=ada"
    status, _, body = shared.request(method, path, {"rater": "ada", "pair": pair, "choice": "tie"}, headers)
    assert status == (403 if message else 400), body
    assert body.startswith(message)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", socket.gethostname()])
def test_it_answers_to_the_names_of_this_machine(shared: LabelServer, host: str) -> None:
    assert shared.request("GET", "/", headers={"Host": f"{host}:{shared.port}"})[0] == 200


def test_the_page_is_whole_and_runs_nothing_but_its_own(shared: LabelServer) -> None:
    status, headers, body = shared.request("GET", "/")
    assert (status, headers["cache-control"], headers["x-content-type-options"]) == (200, "no-store", "nosniff")
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"].startswith("'sha256-")
    assert not any(name in body for name in ("://", "innerHTML", "src=", "@import", "url("))


def test_it_listens_on_this_machine_alone(shared: LabelServer) -> None:
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)} - {"127.0.0.1", "::1"}
    for address in (address for address in addresses if not str(address).startswith("127.")):
        with pytest.raises(ConnectionRefusedError), socket.create_connection((str(address), shared.port), timeout=5):
            pass


def test_what_was_told_as_kept_outlives_a_kill_and_the_rater_goes_on(project: Path) -> None:
    with labelling(project) as server:
        for _ in range(10):
            state = judge(server, "ada", "first")
        server.end(signal.SIGKILL)
    assert kept(project) == [("ada", "first")] * 10
    with labelling(project, "--port", str(server.port)) as again:
        assert again.ask("/state?rater=ada") == state
        assert "10 lines so far" in again.said


def test_ctrl_c_ends_it_with_what_there_is(server: LabelServer) -> None:
    for rater in ("ada", "bob"):
        judge(server, rater, "tie")
        judge(server, rater, "first")
    said, errors = server.end(signal.SIGINT)
    assert server.process.returncode == 0, errors
    assert "data/labels.jsonl: 4 judgements of 2 pairs by 2 raters" in said
    assert "raters agree: " in said
    assert "the reward model agrees with raters: " in said
    assert "raters prefer the Actor's answer: " in said
    assert errors == ""


def test_it_begins_with_what_it_shows_and_what_that_is_good_for(server: LabelServer, project: Path) -> None:
    assert f"samples/evaluate.jsonl: {PAIRS} pairs to judge" in server.said
    training, held = (int(word) for word in re.findall(r"  (\d+) have .* side, (\d+) held", server.said)[0])
    assert training + held == PAIRS
    assert 0 < held < training
    assert "- {kind: labels, path: data/labels.jsonl}" in server.said
    params = (project / "params.yaml").read_text()
    source = "  sources:\n    - {kind: labels, path: data/labels.jsonl}\n"
    (project / "params.yaml").write_text(params.replace("  sources:\n", source))
    with labelling(project) as again:
        assert "kind: labels" not in again.said
    (project / "params.yaml").write_text(params.replace("heldout: 0.2", "heldout: 0.999999"))
    with labelling(project, "--port", "0", "--host", "127.0.0.2") as again:
        assert "`rlhf label --draw 100` has 100 training prompts answered" in again.said
        assert "can judge, under any name" not in again.said
    with labelling(project, "--port", "0", "--host", "0.0.0.0") as again:
        assert "whoever reaches this address can judge, under any name" in again.said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "none.jsonl"], "none.jsonl: not found; `rlhf run --until evaluate` makes samples/evaluate.jsonl"),
        (["--port", "65536"], "--port: found 65536, expected 0 to 65535"),
        (["--host", "203.0.113.1"], "203.0.113.1:8765: cannot be listened on"),
        (["--into", "params.yaml/x"], "params.yaml/x: cannot be written"),
        (["--draw", "1"], "checkpoints/sft: not found; `rlhf run --until ppo` makes it, then draw again"),
        (["--draw", "1", "--pairs", "x"], "--draw: shows what it draws; leave --pairs out"),
    ],
)
def test_a_mistake_is_one_sentence(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert refused(*arguments).startswith(f"rlhf: {message}")


def test_a_port_that_is_taken_is_told(shared: LabelServer, refused: Callable[..., str]) -> None:
    message = f"rlhf: port {shared.port} of 127.0.0.1 is taken; `--port {shared.port + 1}` takes the next one\n"
    assert refused("--port", str(shared.port)) == message


@pytest.fixture
def refused(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Gives the one line that `rlhf label` ends with, and with status 2."""

    def call(*arguments: str) -> str:
        monkeypatch.chdir(project)
        monkeypatch.setattr(sys, "argv", ["rlhf", "label", *arguments])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1, errors
        return errors

    return call

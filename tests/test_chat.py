"""`rlhf chat`: two models asked as they were trained, with the same draws; lines through a pipe."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import CPU, REPOSITORY, Finished

from flows.chat import _lines
from rlhf_tasks import config, registry
from rlhf_tasks.chat import SFT, Speaker, find_sft, sampling_of
from rlhf_tasks.chat_template import jinja_of
from rlhf_tasks.data.encoding import encode_prompt, render_prompt
from rlhf_tasks.data.formats import Conversation, Message
from rlhf_tasks.errors import UserError
from rlhf_tasks.model_card import Facts
from rlhf_tasks.models import load_actor, load_tokenizer
from rlhf_tasks.ppo.rollout import Sampling, sample_responses
from rlhf_tasks.store import digest_path
from rlhf_tasks.tracking import Tracker
from rlhf_tasks.workspace import Workspace

SAMPLING = Sampling(length=6, temperature=1.0, top_k=None, top_p=None, stop_ids=(1,))
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def champion(finished: Finished, own_mlflow: None, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A copy of the finished project with its Actor as champion."""
    root = tmp_path_factory.mktemp("champion") / "project"
    shutil.copytree(finished.workspace.root, root)
    params = finished.workspace.params
    tracker, tokenizer = Tracker(root), load_tokenizer(root / "checkpoints/actor")
    registry.settle(
        register_=config.Register(gate=config.Gate(min_gain=-100, max_kl=1000)),
        generation=params.generation,
        actor=root / "checkpoints/actor",
        reward=root / "checkpoints/reward",
        evaluation=root / "metrics/evaluate.json",
        tracking=registry.TrackingContext(
            uri=tracker.uri,
            run_id=tracker.start_stage(tracker.start_pipeline({}, {}, "try"), "register"),
            actor_digest="a",
            reward_digest="b",
            lock=root / "lock",
            tags={f"{registry.INPUT}{SFT}": digest_path(root / SFT)},
            facts=lambda: Facts("none", jinja_of("none", tokenizer)),
        ),
    )
    return Workspace(root, params)


@pytest.fixture
def speaker(tiny_actor: Path) -> Any:
    """Makes a speaker that was trained with a template."""

    def make(template: Any) -> Speaker:
        tokenizer = load_tokenizer(tiny_actor)
        tokenizer.chat_template = CHATML
        return Speaker("it", load_actor(tiny_actor, CPU), tokenizer, template, SAMPLING)

    return make


def drawn(speaker: Speaker, prompt: str, markup: bool, turn: int) -> str:
    ids = encode_prompt(speaker.tokenizer, prompt, 999, markup=markup)
    [response] = sample_responses(speaker.model, [ids], SAMPLING, (0, turn)).responses
    return speaker.tokenizer.decode(response, skip_special_tokens=True)


def test_a_model_with_a_chat_template_remembers(speaker: Any) -> None:
    it = speaker("chat")
    first = it.answer("Who<eos>?", (0, 1))
    asked = [Message("user", "Who<eos>?")]
    assert first == drawn(it, render_prompt(Conversation(tuple(asked)), "chat", it.tokenizer), True, 1)
    asked += [Message("assistant", first.strip()), Message("user", "And?")]
    second = it.answer("And?", (0, 2))
    assert second == drawn(it, render_prompt(Conversation(tuple(asked)), "chat", it.tokenizer), True, 2)


@pytest.mark.parametrize("template", ["none", "alpaca"])
def test_others_take_each_line_by_itself(speaker: Any, template: Any) -> None:
    it = speaker(template)
    for turn in (1, 2):
        prompt = render_prompt("This film", template)
        assert it.answer("This film", (0, turn)) == drawn(it, prompt, False, turn)


def test_a_transcript_goes_on(speaker: Any) -> None:
    it = speaker("transcript")
    first = it.answer("Who?", (0, 1))
    prompt = f"\n\nHuman: Who?\n\nAssistant: {first.strip()}\n\nHuman: And?\n\nAssistant:"
    assert it.answer("And?", (0, 2)) == drawn(it, prompt, False, 2)


def test_the_same_draws_for_both(speaker: Any) -> None:
    one, other = speaker("none"), speaker("none")
    assert one.answer("This film", (0, 1)) == other.answer("This film", (0, 1))
    assert one.answer("This film", (0, 2)) != one.answer("This film", (0, 3))


def test_more_than_it_has_room_for_is_cut_from_the_left(absolute_actor: Path) -> None:
    it = Speaker("it", load_actor(absolute_actor, CPU), load_tokenizer(absolute_actor), "none", SAMPLING)
    assert it.answer("x" * 900, (0, 1)) == it.answer("x" * 500, (0, 1))


def test_the_sft_model_is_the_one_that_the_champion_came_from(champion: Workspace) -> None:
    here = champion.root / SFT
    digest = digest_path(here)
    assert find_sft(champion, digest, "it") == here
    here.rename(here.with_name("kept"))
    shutil.copytree(champion.root / "checkpoints/actor", here)
    found = find_sft(champion, digest, "it")
    assert digest_path(found) == digest
    assert found.is_relative_to(champion.store.root)
    with pytest.raises(
        UserError, match=r"checkpoints/sft: found another one, expected the SFT model that it came from"
    ):
        find_sft(champion, "0" * 64, "it")
    shutil.rmtree(here)
    here.with_name("kept").rename(here)


def test_it_samples_as_it_was_trained(champion: Workspace) -> None:
    client = Tracker(champion.root).client
    folder = Path(client.get_model_version("rlhf-actor", "1").source.removeprefix("file://")) / "model"
    assert sampling_of(folder, load_tokenizer(folder)) == Sampling.of(champion.params.generation, [1])


def test_lines_through_a_pipe(champion: Workspace) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "60"}

    def talk(stdin: bytes) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "flows.cli", "chat"]
        done = subprocess.run(command, input=stdin, cwd=champion.root, env=environment, capture_output=True)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    lines = b"The picture is\n\n  \n[b]\xffThis film\n"
    status, output, errors = talk(lines)
    assert (status, errors) == (0, "")
    assert output.startswith("SFT and rlhf-actor version 1, with the same draws. Both continue what you type")
    assert [line for line in output.splitlines() if line.startswith("> ")] == [
        "> The picture is",
        "> [b]\ufffdThis film",
    ]
    assert len([line for line in output.splitlines() if "SFT" in line and "rlhf-actor@champion" in line]) == 2
    sampling = Sampling.of(champion.params.generation, [1])
    for name in ("sft", "actor"):
        folder = champion.root / "checkpoints" / name
        it = Speaker(name, load_actor(folder, CPU), load_tokenizer(folder), "none", sampling)
        words = it.answer("The picture is", (champion.params.seed, "chat", 0)).split()
        assert all(word in output for word in words if len(word) < 20)


def test_a_person_types_and_ctrl_d_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    master, slave = pty.openpty()
    with open(slave, encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        os.write(master, b"This film\n\n\x04")
        assert list(_lines()) == ["This film"]
    os.close(master)
    assert capsys.readouterr().out == "> > > "


def test_without_a_champion_there_is_a_sentence(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import app

    monkeypatch.chdir(finished.workspace.root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"models:/rlhf-actor@champion: .* has no mlflow.db, so nothing is registered"):
        app(["chat"], standalone_mode=False)

"""Chats are written for a model as its training wrote prompts, by whoever applies its template."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import processors

from rlhf_tasks import config
from rlhf_tasks.chat_template import ONE_TEXT, jinja_of, trained_template
from rlhf_tasks.data.encoding import encode_prompt, render_prompt
from rlhf_tasks.data.prompts import Conversation, Message
from rlhf_tasks.models import load_tokenizer

CHATS = {
    "one turn": [("user", "What is\n a {{ film }}? \\n 'x' \"y\" é\n")],
    "with a system": [("system", "Be brief."), ("user", "Why?")],
    "a system in between": [("user", "Hi."), ("system", "Now rhyme."), ("user", "Why?")],
    "a conversation": [("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello!"), ("user", " Who?\n\n")],
}
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def own(tiny_actor: Path) -> Any:
    return load_tokenizer(tiny_actor)


@pytest.fixture
def with_bos(own: Any) -> Any:
    """The same, with a BOS of its own before every text."""
    own.add_special_tokens({"bos_token": "<bos>"})
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", own.bos_token_id)]
    )
    return own


def written(tokenizer: Any, template: Any, chat: list[tuple[str, str]]) -> str:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = jinja_of(template, tokenizer)
    messages = [{"role": role, "content": content} for role, content in chat]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("template", ["alpaca", "transcript"])
def test_a_chat_is_written_as_training_wrote_it(own: Any, template: str, chat: list[tuple[str, str]]) -> None:
    prompt = Conversation(tuple(Message(*turn) for turn in chat))
    expected = render_prompt(prompt, "none" if template == "transcript" else "alpaca")
    assert written(own, template, chat) == expected


def test_a_model_that_continues_takes_one_text(own: Any) -> None:
    [(_, text)] = CHATS["one turn"]
    assert written(own, "none", CHATS["one turn"]) == render_prompt(text, "none") == text
    for chat in ("with a system", "a conversation"):
        with pytest.raises(TemplateError, match=ONE_TEXT):
            written(own, "none", CHATS[chat])


@pytest.mark.parametrize("template", ["none", "alpaca", "transcript"])
def test_the_tokenizers_own_bos_comes_once(with_bos: Any, template: str) -> None:
    text = written(with_bos, template, CHATS["one turn"])
    assert text.startswith("<bos>")
    ids = with_bos(text, add_special_tokens=False)["input_ids"]
    assert ids == encode_prompt(with_bos, text.removeprefix("<bos>"), 999, markup=False)
    assert ids.count(with_bos.bos_token_id) == 1


def test_the_tokenizers_own_template_stays(own: Any) -> None:
    own.chat_template = CHATML
    chat = CHATS["a conversation"]
    prompt = Conversation(tuple(Message(*turn) for turn in chat))
    assert written(own, "chat", chat) == render_prompt(prompt, "chat", own)


@pytest.mark.parametrize(
    ("setting", "own_template", "example", "found"),
    [
        ("auto", CHATML, "x", "chat"),
        ("auto", None, "x", "alpaca"),
        ("none", CHATML, "The film is", "none"),  # it has one, but was not trained with it
        ("none", None, "\n\nHuman: Hi.\n\nAssistant:", "transcript"),
    ],
)
def test_the_template_is_the_one_of_training(
    own: Any, setting: Any, own_template: str | None, example: str, found: str
) -> None:
    own.chat_template = own_template
    data = config.Data(sources=(config.Source(kind="sft", path="x"),), template=setting)
    assert trained_template(data, own, example) == found

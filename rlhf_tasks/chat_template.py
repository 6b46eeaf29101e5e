"""How a chat becomes the text that a model was trained to answer, as a Jinja template that any server can apply.

The tokenizer's own template where training used it; else the one of `data.template` (rlhf_tasks/data/encoding.py) in
Jinja, so that whoever serves the model asks it as it was trained.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from rlhf_tasks.data.encoding import ALPACA, ALPACA_RESPONSE, choose_template
from rlhf_tasks.data.prompts import ANSWER, SPEAKERS

if TYPE_CHECKING:
    from rlhf_tasks import config

#: `none` continues one text; `transcript` is `none` on data whose prompts are transcripts (Human, Assistant)
Trained = Literal["chat", "alpaca", "transcript", "none"]

ONE_TEXT = "this model continues a text, so it takes one message, the user's, and no others"


def trained_template(data: config.Data, tokenizer: Any, example: str) -> Trained:
    """The template that the prompts were written with.

    Args:
        example: one of them, as the model read it.
    """
    template = choose_template(data.template, tokenizer)
    return "transcript" if template == "none" and example.endswith(ANSWER) else template


def jinja_of(template: Trained, tokenizer: Any) -> str:
    """The template in Jinja, with the BOS that the tokenizer puts before a text."""
    if template == "chat":
        return str(tokenizer.chat_template)
    lead = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    return "{{- " + _text(lead) + " -}}" + _BODIES[template]


def _text(text: str) -> str:
    """A text as a literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)


_TURNS = (
    f"{{%- set speakers = {json.dumps(SPEAKERS)} -%}}"
    "{%- set ns = namespace(turns='') -%}"
    "{%- for message in messages -%}"
    "{%- set ns.turns = ns.turns + '\\n\\n' + speakers[message.role] + ': ' + message.content -%}"
    "{%- endfor -%}"
)
_BODIES = {
    "none": (
        "{%- if messages | length != 1 or messages[0].role != 'user' -%}"
        f"{{{{- raise_exception({_text(ONE_TEXT)}) -}}}}"
        "{%- endif -%}{{- messages[0].content -}}"
    ),
    "transcript": _TURNS + f"{{{{- ns.turns + {_text(ANSWER)} -}}}}",
    "alpaca": (
        "{%- if messages[:-1] | rejectattr('role', 'equalto', 'system') | list -%}"
        + _TURNS
        + "{%- set asked = ns.turns[2:] -%}{%- else -%}"
        "{%- set asked = messages | map(attribute='content') | join('\\n\\n') -%}{%- endif -%}"
        f"{{{{- {_text(ALPACA)} + asked + {_text(ALPACA_RESPONSE)} -}}}}"
    ),
}

"""What the server takes of OpenAI's requests: a checked body for the server of transformers, or a sentence.

That server believes what it gets: a negative temperature is a fault in the middle of the answer, and what it cannot do
it leaves out. Here either is said before anything is generated.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_tasks.data.encoding import break_special_tokens

Number = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]

#: what changes no answer
IGNORED = (
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store"),
    *("stream_options", "user"),  # usage is in the last chunk, asked or not
)
#: what this server cannot do, with the values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("best_of", "n"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("echo", "logprobs"), (False,)),
    **dict.fromkeys(("functions", "tools"), ([],)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto")),
    **{"logit_bias": ({},), "modalities": (["text"],), "response_format": ({"type": "text"},), "suffix": ("",)},
}


class BadRequest(Exception):
    """What is wrong with a request: a status of HTTP and one sentence."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Body(BaseModel):
    """What both kinds of request may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    temperature: Number | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Tokens | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool | None = None


class Part(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A message; what else an assistant's own has is nothing to be read again."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> tuple[str, str]:
        """Role and text; `developer` is what `system` is called now."""
        parts = self.content if isinstance(self.content, list) else [Part(type="text", text=self.content)]
        return "system" if self.role == "developer" else self.role, "".join(part.text for part in parts)


class Chat(Body):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None


class Completion(Body):
    """`/v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]


Kind = type[Chat] | type[Completion]


@dataclass(frozen=True)
class Known:
    """What requests are checked against.

    Attributes:
        model: the name of the one model.
        tokenizer: its own, whose chat template writes messages as training did.
        positions: tokens of prompt and answer together that it has room for; None if any number.
        max_tokens: of an answer, where a request does not say.
    """

    model: str
    tokenizer: Any
    positions: int | None
    max_tokens: int


def checked(body: Any, kind: Kind, known: Known) -> dict[str, Any]:
    """The body that transformers' server gets for a request.

    Raises:
        BadRequest: it cannot be answered as it is.
    """
    if not isinstance(body, dict):
        raise BadRequest(400, "the body is no JSON object; expected one with `model` and what to answer")
    request = _parsed(_without_neutral(body, kind), kind)
    if request.model not in (None, known.model):
        raise BadRequest(
            404,
            f"`model`: found {_short(request.model)}, expected {known.model!r}, the only one here",
            "model_not_found",
        )
    asked, tokens = _chat(request, known) if isinstance(request, Chat) else _completion(request, known)
    common = {"temperature", "top_p", "seed", "stop", "stream"}
    wanted = {name: value for name, value in request.model_dump(include=common).items() if value not in (None, [])}
    most = request.max_tokens or getattr(request, "max_completion_tokens", None)
    return {"model": known.model, **asked, **wanted, "max_tokens": _room(known, tokens, most)}


def _chat(request: Chat, known: Known) -> tuple[dict[str, Any], int]:
    """The messages as text, with special tokens in them broken, and the number of tokens that they make."""
    turns = [turn.plain() for turn in request.messages]
    tokenizer = known.tokenizer
    messages = [{"role": role, "content": break_special_tokens(tokenizer, text)} for role, text in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise jinja2's errors, and any that their expressions do
        raise BadRequest(400, f"`messages`: the chat template refuses them: {' '.join(str(error).split())}") from None
    return {"messages": messages}, len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _completion(request: Completion, known: Known) -> tuple[dict[str, Any], int]:
    """The prompt as it is: special tokens in it count as such."""
    prompt = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
    return {"prompt": prompt}, len(known.tokenizer(prompt)["input_ids"])


def _room(known: Known, tokens: int, most: int | None) -> int:
    """How many tokens the answer may have at most."""
    if tokens == 0:
        raise BadRequest(400, "found no text to answer, expected some")
    if known.positions is None:
        return most or known.max_tokens
    left = known.positions - tokens
    if left < (most or 1):
        asked = f"`max_tokens: {most}`" if most else "an answer"
        room = f"{max(left, 0)} of the model's {known.positions} positions for {asked}"
        message = f"found {tokens} tokens to answer, which leave {room}; shorten it"
        raise BadRequest(400, message, "context_length_exceeded")
    return most or min(known.max_tokens, left)


def _without_neutral(body: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The fields that are left when those are gone which ask for nothing."""
    kept = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name not in NEUTRAL:
            kept[name] = value
        elif value not in NEUTRAL[name] or isinstance(value, bool) is not isinstance(NEUTRAL[name][0], bool):
            expected = " or ".join(map(repr, NEUTRAL[name]))
            raise BadRequest(400, f"`{name}`: found {_short(value)}, expected {expected}: this server has nothing else")
    for name in kept.keys() - kind.model_fields.keys():
        near = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.6)
        expected = f"did you mean `{near[0]}`?" if near else f"expected {', '.join(kind.model_fields)}"
        raise BadRequest(400, f"`{name}`: no such field; {expected}")
    return kept


def _parsed(fields: dict[str, Any], kind: Kind) -> Chat | Completion:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        # Of the kinds that a field may be, the one that the value comes nearest to
        problem = max(error.errors(), key=lambda problem: len(problem["loc"]))
    place = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or part in _PLACES)
    if problem["type"] == "missing":
        raise BadRequest(400, f"`{place}` is missing")
    expected = problem["msg"].replace("Input should be", "expected").replace("a valid integer", "an integer")
    expected = expected.replace("a valid ", "a ")
    raise BadRequest(400, f"`{place}`: found {_short(problem['input'])}, {expected[0].lower()}{expected[1:]}") from None


_PLACES = {*Chat.model_fields, *Completion.model_fields, *Turn.model_fields, *Part.model_fields}


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

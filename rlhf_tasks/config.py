"""`params.yaml` as strict, typed, frozen models.

The values here are defaults of last resort: params.yaml states everything the default run uses. Stage modules name
these classes in annotations only; the values they receive are in their keys, so an edit here retrains nothing.
"""

from __future__ import annotations

import difflib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlhf_tasks.data.fields import FIELDS
from rlhf_tasks.errors import UserError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of params.yaml: unknown keys, wrong types and changes after loading are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Runtime(Section):
    """What changes the bits of every result but belongs to no stage."""

    threads: Count = 2
    device: Literal["cpu", "cuda"] = "cpu"


class Source(Section):
    """Files of human feedback, all of one kind; `kind` says which shapes their rows may have (docs/data.md)."""

    kind: Literal["ratings", "sft", "preference", "labels", "prompts"]
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    split: str = "train"
    fields: dict[str, str] = {}
    rows: Count | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (local files) or `hub` (a Hub data set), not both and not neither")
        if self.hub is not None and self.revision is None:
            raise ValueError(f"`hub: {self.hub}` needs a `revision`: pin the commit, so that the data cannot change")
        return self

    @field_validator("fields", mode="after")
    @classmethod
    def _fields_are_known(cls, fields: dict[str, str]) -> dict[str, str]:
        for name in fields:
            if name not in FIELDS and fields[name] in FIELDS:
                raise ValueError(
                    f"`{name}: {fields[name]}` is the wrong way round; write `{fields[name]}: {name}`, our name first"
                )
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise ValueError(
                    f"`{name}: {fields[name]}`: {hint}Expected one of {', '.join(FIELDS)}, then the name in your files"
                )
        return fields


class Ratings(Section):
    """How rated texts become continuations and preference pairs."""

    scale: tuple[Finite, Finite] = (-4, 4)
    opening_words: tuple[Count, Count] = (2, 5)
    min_gap: NonNegative = 1.0
    pairs_per_text: Count = 2

    @model_validator(mode="before")
    @classmethod
    def _lists_are_pairs(cls, data: Any) -> Any:
        """YAML has no tuples: a list of two stands for one."""
        if not isinstance(data, dict):
            return data
        return {k: tuple(v) if k in ("scale", "opening_words") and isinstance(v, list) else v for k, v in data.items()}

    @model_validator(mode="after")
    def _ordered(self) -> Ratings:
        for name, (low, high) in (("scale", self.scale), ("opening_words", self.opening_words)):
            if low > high:
                raise ValueError(f"`{name}: [{low}, {high}]` must run from low to high")
        return self


class Data(Section):
    sources: tuple[Source, ...] = Field(min_length=1)
    template: Literal["auto", "none", "alpaca", "chat"] = "auto"
    heldout: Fraction = 0.2
    max_prompt_tokens: Count = 256
    max_response_tokens: Count = 256
    ratings: Ratings = Ratings()

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("sources"), list):
            return data | {"sources": tuple(data["sources"])}
        return data


class Scratch(Section):
    """The embedded default model: a small Llama with a byte-level BPE tokenizer trained on the SFT texts."""

    vocab_size: Annotated[int, Field(ge=300)] = 2048
    hidden_size: Count = 128
    intermediate_size: Count = 384
    layers: Count = 4
    heads: Count = 4

    @model_validator(mode="after")
    def _divisible(self) -> Scratch:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"`hidden_size: {self.hidden_size}` must be a multiple of 2 x `heads: {self.heads}`")
        return self


class Model(Section):
    """`base` is `scratch`, a local Hugging Face folder or GGUF file, or, with a `revision`, a model of the Hub."""

    base: str = "scratch"
    revision: str | None = None
    scratch: Scratch = Scratch()

    @model_validator(mode="after")
    def _pinned(self) -> Model:
        if self.revision is None:
            return self
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"`revision: {self.revision}` can move; expected the full commit, 40 hexadecimal digits, as the "
                "model's page on the Hub shows it under Files, History"
            )
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.base, re.ASCII):
            raise ValueError(
                f"`revision` pins a model of the Hub, but `base: {self.base}` is none; expected `owner/name`, or no "
                "`revision`"
            )
        return self


class Generation(Section):
    """How responses are drawn, in PPO, evaluation and the reward model's statistics alike."""

    max_new_tokens: Count = 24
    temperature: Positive = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | None = None


class Supervised(Section):
    """What SFT and reward training share (rlhf_tasks/training.py)."""

    epochs: Count = 1
    learning_rate: Positive = 1e-4
    warmup_fraction: Probability = 0.05
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    batch_tokens: Count = 4096


class SFT(Supervised):
    pass


class Reward(Supervised):
    head_learning_rate: Positive = 1e-3
    margin_scale: NonNegative = 0.0
    center: NonNegative = 0.0
    statistics_samples: Annotated[int, Field(ge=2)] = 512
    trainable_layers: Count | None = None


class KL(Section):
    """β and its controller (DESIGN: PPO, points 3 and 8)."""

    estimator: Literal["k1", "k2", "k3", "abs", "full"] = "k1"
    controller: Literal["fixed", "adaptive"] = "fixed"
    coef: NonNegative = 0.05
    target: Positive = 6.0
    horizon: Positive = 10000


class Score(Section):
    """Which score PPO maximises: the reward model's raw one, normalised by its SFT statistics, or its sigmoid."""

    kind: Literal["raw", "normalised", "sigmoid"] = "normalised"
    clip: Positive | None = None


class MissingEOS(Section):
    """What happens to the score of a response that reached its length without EOS or stop token."""

    mode: Literal["keep", "replace", "subtract", "steer"] = "keep"
    value: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    rate: NonNegative = 3.0


class Schedule(Section):
    """Learning rates over iterations; `total` is its own length, so extending a run changes no past iteration."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    total: Count | None = None

    @model_validator(mode="after")
    def _needs_total(self) -> Schedule:
        if self.kind != "constant" and self.total is None:
            raise ValueError(f"`kind: {self.kind}` needs `total`, the number of iterations over which it decays to 0")
        return self


class RewardFunction(Section):
    """A Python callable that scores too: `(prompts, responses) -> a number each`."""

    name: str | None = None
    weight: Finite = 1.0
    instead: bool = False

    @field_validator("name", mode="after")
    @classmethod
    def _names_a_function(cls, name: str | None) -> str | None:
        if name is not None and (".py:" in name or not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name)):
            raise ValueError(
                f"found {name!r}, expected `module:function`, as in my_rewards:no_shouting for my_rewards.py"
            )
        return name

    @model_validator(mode="after")
    def _has_a_name(self) -> RewardFunction:
        if self.instead and self.name is None:
            raise ValueError("`instead: true` needs a `name`: without a function there is no score")
        return self


class PPO(Section):
    iterations: Count = 32
    batch: Count = 128
    epochs: Count = 2
    minibatches: Count = 4
    micro_batch_tokens: Count = 8192
    actor_learning_rate: Positive = 1e-4
    critic_learning_rate: Positive = 3e-4
    schedule: Schedule = Schedule()
    max_grad_norm: Positive = 1.0
    gamma: Probability = 1.0
    lam: Probability = 0.95
    clip: Positive | None = 0.2
    value_clip: Positive | None = 0.2
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    entropy_coef: NonNegative = 0.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    target_kl: Positive | None = None
    critic_start: Literal["reward", "sft"] = "reward"
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    trainable_layers: Count | None = None
    kl: KL = KL()
    score: Score = Score()
    missing_eos: MissingEOS = MissingEOS()

    @model_validator(mode="after")
    def _horizon_is_long(self) -> PPO:
        if self.kl.controller == "adaptive" and self.kl.horizon <= self.batch / 5:
            raise ValueError(
                f"`kl.horizon: {self.kl.horizon:g}` with `batch: {self.batch}` lets one update take the coefficient "
                f"to 0, where it stays; expected more than {self.batch / 5:g}"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_fit(self) -> PPO:
        if self.minibatches > self.batch:
            raise ValueError(f"`minibatches: {self.minibatches}` is more than `batch: {self.batch}` has rows")
        return self


class Evaluate(Section):
    prompts: Count = 512
    best_of: Count = 16
    judge: Literal["vader"] | None = None
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    examples: Annotated[int, Field(ge=0)] = 6


class Gate(Section):
    """The rules that a new version must pass to become @champion."""

    min_gain: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    max_kl: Positive = 12.0


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$")]


class Register(Section):
    name: Name = "rlhf-actor"
    reward_name: Name = "rlhf-reward"
    gate: Gate = Gate()

    @model_validator(mode="after")
    def _two_names(self) -> Register:
        if self.name == self.reward_name:
            raise ValueError(f"`reward_name: {self.reward_name}` is the Actor's name too; choose another one")
        return self


class Saving(Section):
    """How often PPO's state is saved; it decides nothing but what a kill costs, so it is in no key."""

    iterations_per_task: Count | Literal["auto"] = 1


class Tracking(Section):
    """How a run goes about its record in MLflow; no result depends on it."""

    when_down: Literal["stop", "continue"] = "stop"


class Params(Section):
    """All of params.yaml."""

    seed: Annotated[int, Field(ge=0)] = 0
    runtime: Runtime = Runtime()
    data: Data
    model: Model = Model()
    generation: Generation = Generation()
    sft: SFT = SFT()
    reward: Reward = Reward()
    reward_function: RewardFunction = RewardFunction()
    ppo: PPO = PPO()
    evaluate: Evaluate = Evaluate()
    register_: Register = Field(default=Register(), alias="register")
    saving: Saving = Saving()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _one_trunk(self) -> Params:
        of_reward, of_ppo = self.reward.trainable_layers, self.ppo.trainable_layers
        if of_ppo is not None and (of_reward is None or of_reward > of_ppo):
            raise ValueError(
                f"`ppo.trainable_layers: {of_ppo}` shares one trunk among four models, but the Reward learns "
                f"{'everywhere' if of_reward is None else f'in its top {of_reward} layers'}; expected "
                f"`reward.trainable_layers` of at most {of_ppo}"
            )
        return self

    def section(self, name: str) -> Any:
        """The value at a dotted key, as params.yaml spells it: `ppo.kl`, `register`."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, "register_" if part == "register" else part)
        return value


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: the file is missing, is no YAML, or holds an unknown or wrong value; the message names every one.
    """
    return parse_params(_read_yaml(path), path.name)


def parse_params(document: Any, name: str = "params.yaml") -> Params:
    """Check a loaded document against `Params`, turning pydantic's errors into sentences."""
    if not isinstance(document, dict):
        raise UserError(f"{name}: found {_kind(document)}, expected sections such as `ppo:`")
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        found = error.errors()
        # where a part is wrong, what that makes of the whole is no second mistake
        inner = [
            p for p in found if not any(len(o["loc"]) > len(p["loc"]) == _common(o["loc"], p["loc"]) for o in found)
        ]
        problems = [_sentence(problem) for problem in inner]
        raise UserError("\n".join(f"{name}: {p}" for p in problems)) from None


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["ppo.kl.coef=0.2"]` as `{"ppo.kl.coef": 0.2}`: values are read as YAML.

    Raises:
        UserError: one has no `=`, or its value is no YAML.
    """
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: expected KEY=VALUE, for example --set ppo.kl.coef=0.1")
        values[key.strip()] = _yaml_value(assignment, text)
    return values


def changed_params(path: Path, values: Mapping[str, Any]) -> Params:
    """What params.yaml would say with values by their dotted keys; nothing is written.

    Raises:
        UserError: it would not be valid.
    """
    document = _read_yaml(path)
    _put(document, values, path.name)
    return parse_params(document, path.name)


def set_params(
    path: Path, values: Mapping[str, Any], check: Callable[[Params], None] = lambda params: None
) -> list[str]:
    """Write values by their dotted keys into params.yaml, keeping its comments, if the result is valid.

    Args:
        check: looks at what the file will say, and raises a `UserError` if that cannot be run.

    Returns:
        What changed, each as `key: old -> new`.

    Raises:
        UserError: the changed file would not be valid; it is then left as it was.
    """
    document, yaml = _read_yaml(path), YAML()
    changes = _put(document, values, path.name)
    check(parse_params(document, path.name))
    if changes:
        buffer = io.StringIO()
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.width = 120
        yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
        yaml.dump(document, buffer)
        temporary = path.with_name(path.name + ".new")
        temporary.write_text(buffer.getvalue())
        temporary.replace(path)
    return changes


def _put(document: Any, values: Mapping[str, Any], name: str) -> list[str]:
    """Put values into a loaded params.yaml by their dotted keys, of lists by index. Returns what changed."""
    changes = []
    for key, value in values.items():
        *outer, last = key.split(".")
        node = document
        for part in outer:
            if isinstance(node, dict):
                node.setdefault(part, {})
            node = node[_place(node, part, key, name)]
        place = _place(node, last, key, name)
        old = node.get(place) if isinstance(node, dict) else node[place]
        if old != value or (isinstance(node, dict) and place not in node):
            changes.append(f"{key}: {as_yaml(old)} -> {as_yaml(value)}")
        node[place] = value
    return changes


def _place(node: Any, part: str, key: str, name: str) -> str | int:
    """What a part of a dotted key names in a section or a list.

    Raises:
        UserError: the list has no such entry, or it is neither.
    """
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise UserError(f"{name}: cannot set `{key}`, which is inside a plain value; expected a section's key")
    if not (part.isdecimal() and int(part) < len(node)):
        raise UserError(
            f"{name}: cannot set `{key}`: found {part!r} for an entry of a list that has {len(node)}; expected its "
            "number, counted from 0"
        )
    return int(part)


def as_yaml(value: Any) -> str:
    """A value as params.yaml spells it, on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def flatten(params: Params) -> dict[str, Any]:
    """Every parameter by its dotted name: `{"ppo.kl.coef": 0.05, ...}`; lists by index."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            yield name, value
            return
        for key, inner in items:
            yield from walk(inner, f"{name}.{key}" if name else str(key))

    return dict(walk(params.model_dump(mode="json", by_alias=True), ""))


def _read_yaml(path: Path) -> Any:
    try:
        return YAML().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run from the project's folder, the one that holds params.yaml") from None
    except (YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None


def _yaml_value(assignment: str, text: str) -> Any:
    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise UserError(
            f"--set {assignment}: `{text}` is not readable as YAML: {' '.join(str(error).split())}"
        ) from None


def _common(one: tuple[Any, ...], other: tuple[Any, ...]) -> int:
    """How many places two locations share from the start."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _sentence(problem: Any) -> str:
    """One pydantic error as `key: what was found, what is allowed, the nearest valid key`."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _keys_of(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        everywhere = [k for k in _all_keys() if k.split(".")[-1] == location[-1]]
        whole = difflib.get_close_matches(key, _all_keys(), n=1, cutoff=0.85)  # ppo.klcoef is ppo.kl.coef
        nearest = everywhere[:1] or whole or [".".join([*location[:-1], name]) for name in near]
        hint = f"did you mean `{nearest[0]}`? " if nearest else ""
        return f"unknown key `{key}`; {hint}Allowed here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"`{key}` is missing; expected one of the section's required keys"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"`{key}`: {message}" if key else message  # of the whole: its message names the keys
    found = problem["input"]
    expected = (
        message.replace("Input should be", "expected")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )
    return f"`{key}`: found {found!r} ({_kind(found)}), {expected}"


def _kind(value: Any) -> str:
    """What a YAML value is, in words."""
    kinds = {
        dict: "a section",
        list: "a list",
        str: "text",
        bool: "yes or no",
        int: "a whole number",
        float: "a number",
    }
    if value is None:
        return "nothing"
    return next((words for kind, words in kinds.items() if isinstance(value, kind)), type(value).__name__)


def _keys_of(location: list[str]) -> list[str]:
    """The keys that are valid inside a section, given the section's place."""
    kind: Any = Params
    for part in location:
        if part.isdigit():
            continue
        field = kind.model_fields.get("register_" if part == "register" else part)
        inner = field.annotation if field else None
        kind = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else Source
    return [field.alias or name for name, field in kind.model_fields.items()]


def _all_keys() -> list[str]:
    """Every dotted key of params.yaml, sections included."""

    def walk(kind: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in kind.model_fields.items():
            key = prefix + (field.alias or name)
            yield key
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from walk(field.annotation, key + ".")

    return list(walk(Params, ""))

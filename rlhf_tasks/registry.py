"""The last stage: judge the Actor by the gate's rules, register it with MLflow, and say which version is champion.

Registering is idempotent by the Actor's digest. The registry changes under everyone's hands, so it is no input here:
`run` compares with SFT only and its result is cached; `settle` moves the alias after it, and is never cached.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from rlhf_tasks.errors import UserError
from rlhf_tasks.store import digest_path, open_lock

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

    from rlhf_tasks import config

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER, DIGEST, GATE, JUDGED = "champion", "challenger", "actor_digest", "gate", "gate_run"
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the second where only an alias is missing
_TOLD = 8  # versions in a sentence


@dataclass(frozen=True)
class TrackingContext:
    """What the stage must know of MLflow and of where its Actor came from; no part of a key.

    Attributes:
        uri: tracking and registry server.
        run_id: the stage's run, which the model is logged under.
        actor_digest: content digest of the Actor's folder.
        lock: a file that serialises registering and moving aliases among this project's processes.
        tags: lineage for the version and its card: git commit, dvc.lock digest, digests of data and checkpoints.
        example: a prompt for the model's input example.
    """

    uri: str
    run_id: str
    actor_digest: str
    lock: Path
    tags: Mapping[str, str] = field(default_factory=dict)
    example: str = "This film"


@dataclass(frozen=True)
class Outcome:
    """One rule of the gate: what it found, and what it would let pass."""

    name: str
    passed: bool
    found: float
    limit: float


@dataclass(frozen=True)
class Settled:
    """Where the aliases stand: this Actor's version, the champion before and after."""

    version: int
    previous: int | None
    champion: int | None

    @property
    def moved(self) -> bool:
        return self.previous != self.champion


def run(*, register_: config.Register, actor: Path, evaluation: Path, out: Path) -> dict[str, float]:
    """Judge the Actor by the gate's rules; a pure function, so the verdict can be cached. `settle` acts on it.

    Args:
        actor: the Actor's Hugging Face folder.
        evaluation: `metrics/evaluate.json`, with `score_gain_low` (lower end of the 95 % interval of the gain in reward
            score over SFT) and `kl_sequence` (nats).
        out: gets `metrics.json`: name, digest, rules and verdict.

    Returns:
        `gate/passed` (0 or 1) and what each rule found, as `gate/<rule>`.

    Raises:
        UserError: the evaluation lacks a number that the gate needs.
    """
    outcomes = gate(_numbers(evaluation), register_.gate)
    passed = all(outcome.passed for outcome in outcomes)
    verdict = {
        "name": register_.name,
        "actor_digest": digest_path(actor),
        "gate": {o.name: {"passed": o.passed, "found": o.found, "limit": o.limit} for o in outcomes},
        "passed": passed,
    }
    (out / "metrics.json").write_text(json.dumps(verdict, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return {"gate/passed": float(passed)} | {f"gate/{o.name}": o.found for o in outcomes}


def settle(
    *,
    register_: config.Register,
    generation: config.Generation,
    actor: Path,
    evaluation: Path,
    tracking: TrackingContext,
) -> Settled:
    """Move `@champion` to this Actor's version if the gate's rules pass; to be called after `run`, cached or not.

    A registry that does not know the Actor (a clone that pulled the stage's result) gets it here; only then is the
    Actor's folder read. Comparing with the present champion comes with the release gate; until then, passing the rules
    is enough.
    """
    version = ensure_registered(
        register_=register_, generation=generation, actor=actor, evaluation=evaluation, tracking=tracking
    )
    previous = champion(register_.name, tracking.uri)
    outcomes = gate(_numbers(evaluation), register_.gate)
    _tag_verdict(register_.name, version, outcomes, tracking)
    if not all(outcome.passed for outcome in outcomes):
        return Settled(version, previous, previous)
    previous = promote(register_.name, version, tracking.uri, tracking.lock)
    return Settled(version, previous, version)


def gate(metrics: Mapping[str, float], rules: config.Gate) -> list[Outcome]:
    """The rules that a version must pass to become champion, each with what it found.

    Raises:
        UserError: a number that a rule needs is missing or not finite.
    """
    for name in ("score_gain_low", "kl_sequence"):
        found = metrics.get(name)
        if found is None or not math.isfinite(found):
            raise UserError(
                f"metrics/evaluate.json: `{name}` is {found}, expected a number; make it again with `rlhf run`"
            )
    gain, kl = metrics["score_gain_low"], metrics["kl_sequence"]
    return [
        Outcome("gain", gain > rules.min_gain, gain, rules.min_gain),
        Outcome("kl", kl <= rules.max_kl, kl, rules.max_kl),
    ]


def check_name(name: str, tracking_uri: str) -> None:
    """Refuse to register an Actor among versions of something else, before hours are spent.

    Raises:
        UserError: the name belongs to a prompt, or to models that this pipeline did not register.
    """
    client = MlflowClient(tracking_uri)
    strangers = [v.version for v in client.search_model_versions(f"name = '{name}'") if DIGEST not in v.tags]
    if strangers:
        found = f"a model whose version {strangers[0]} this pipeline did not register"
    elif client.get_prompt(name):  # prompts and models share their names
        found = "a prompt"
    else:
        return
    raise UserError(f"register.name: {name!r} is {found} in the MLflow registry; choose another name")


def find_version(name: str, actor_digest: str, tracking_uri: str) -> int | None:
    """The newest registered version of the Actor with this digest."""
    query = f"name = '{name}' and tags.{DIGEST} = '{actor_digest}'"
    versions = MlflowClient(tracking_uri).search_model_versions(query)
    return max((int(version.version) for version in versions), default=None)


@dataclass(frozen=True)
class Registered:
    """A registered version.

    Attributes:
        runs: the run in which the gate came to its present verdict, and, if another one registered it, that.
        created: when it was registered (UTC).
    """

    name: str
    version: int
    runs: tuple[str, ...]
    created: str


def registered_versions(tracking_uri: str) -> list[Registered]:
    """Every version, under whatever name, that this pipeline registered."""
    client, found = MlflowClient(tracking_uri), list[Registered]()
    token: str | None = ""
    while token is not None:
        page = client.search_model_versions(page_token=token or None)
        found += [_registered(version) for version in page if DIGEST in version.tags]
        token = page.token or None
    return found


def find_registered(uri: str, tracking_uri: str) -> Registered:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names.

    Raises:
        UserError: the registry has none; the message says which there are.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if not match:
        raise UserError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    (name, alias, number), client = match.groups(), MlflowClient(tracking_uri)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        missing = f"no alias {alias}" if alias else f"no version {number}"
        raise UserError(f"{uri}: {_what_there_is(client, name, missing)}") from None
    return _registered(found)


def _registered(found: ModelVersion) -> Registered:
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.creation_timestamp / 1000))
    runs = dict.fromkeys((found.tags.get(JUDGED) or str(found.run_id), str(found.run_id)))
    return Registered(found.name, int(found.version), tuple(runs), created)


def _what_there_is(client: MlflowClient, name: str, missing: str) -> str:
    """What a name has instead of what is missing: its versions with their aliases and the gate's verdicts."""
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version), reverse=True)
    if not versions:
        return f"the MLflow registry has no versions of {name}; `rlhf run` registers one"
    aliases, told = client.get_registered_model(name).aliases, list[str]()
    for version in versions[:_TOLD]:
        facts = [f"@{alias}" for alias, number in sorted(aliases.items()) if int(number) == int(version.version)]
        facts += [f"gate {version.tags[GATE]}"] if GATE in version.tags else []
        told.append(f"{version.version} ({', '.join(facts)})" if facts else str(version.version))
    more = f" and {len(versions) - _TOLD} older ones" if len(versions) > _TOLD else ""
    return f"{name} has {missing} in the MLflow registry, expected one of its versions: {', '.join(told)}{more}"


def _tag_verdict(name: str, version: int, outcomes: list[Outcome], tracking: TrackingContext) -> None:
    """Say with the version what the gate said of it and in which run, so that the registry can tell why it is champion
    or is not."""
    failed = [f"{o.name} {o.found:.4g}, limit {o.limit:.4g}" for o in outcomes if not o.passed]
    verdict, client = f"failed: {'; '.join(failed)}" if failed else "passed", MlflowClient(tracking.uri)
    if client.get_model_version(name, str(version)).tags.get(GATE) != verdict:
        client.set_model_version_tag(name, str(version), JUDGED, tracking.run_id)  # first: it is harmless alone
        client.set_model_version_tag(name, str(version), GATE, verdict)


def champion(name: str, tracking_uri: str) -> int | None:
    """The version that `@champion` names."""
    return _version_at(MlflowClient(tracking_uri), name, CHAMPION)


def promote(name: str, version: int, tracking_uri: str, lock_path: Path) -> int | None:
    """Move `@champion` to a version. Returns the one it named before."""
    client = MlflowClient(tracking_uri)
    # Setting an alias has no compare-and-set: two processes that read, decide and write must take turns.
    with _locked(lock_path):
        previous = _version_at(client, name, CHAMPION)
        if previous != version:
            client.set_registered_model_alias(name, CHAMPION, str(version))
            log.info("%s version %d is @%s now", name, version, CHAMPION)
    return previous


def ensure_registered(
    *,
    register_: config.Register,
    generation: config.Generation,
    actor: Path,
    evaluation: Path,
    tracking: TrackingContext,
) -> int:
    """The Actor's version: the one with its digest, else a new one. `@challenger` names the newest version."""
    name, client = register_.name, MlflowClient(tracking.uri)
    with _locked(tracking.lock):
        version = find_version(name, tracking.actor_digest, tracking.uri)
        if version is None:
            metrics = _numbers(evaluation)
            card = model_card(name, generation, metrics, gate(metrics, register_.gate), tracking)
            version = log_actor(actor, name=name, generation=generation, metrics=metrics, card=card, tracking=tracking)
            log.info("registered %s version %d", name, version)
        if version > (_version_at(client, name, CHALLENGER) or 0):
            client.set_registered_model_alias(name, CHALLENGER, str(version))
    return version


def log_actor(
    actor: Path,
    *,
    name: str,
    generation: config.Generation,
    metrics: Mapping[str, float],
    card: str,
    tracking: TrackingContext,
) -> int:
    """Log the Actor's folder as a model of the run, and register it as a new version, with tags. Returns the version.

    What `mlflow.transformers.log_model` does, but with explicit ids: that function takes server and experiment from
    globals that all threads share.

    Args:
        metrics: numbers that MLflow shows with the model.
        card: the model card, as Markdown with a YAML header.
    """
    client = MlflowClient(tracking.uri)
    tags = {key: str(value) for key, value in tracking.tags.items()} | {DIGEST: tracking.actor_digest}
    experiment = client.get_run(tracking.run_id).info.experiment_id
    params = {key: str(value) for key, value in generation.model_dump().items()}
    logged = client.create_logged_model(experiment, name, tracking.run_id, tags, params, "text-generation")
    try:
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "model"
            _save(actor, saved, generation, card, tracking, logged)
            client.log_model_artifacts(logged.model_id, str(saved))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(tracking.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    now = time.time_ns() // 1_000_000
    points = [Metric(key, value, now, 0, model_id=logged.model_id) for key, value in metrics.items()]
    client.log_batch(tracking.run_id, metrics=points)
    _ensure_model(client, name)
    # The source `models:/m-…` would be looked up on the global server; the tag is the link that it would have made.
    source, model_id = logged.artifact_location, logged.model_id
    version = int(client.create_model_version(name, source, tracking.run_id, tags, model_id=model_id).version)
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([{"name": name, "version": version}])})
    return version


def model_card(
    name: str,
    generation: config.Generation,
    metrics: Mapping[str, float],
    outcomes: list[Outcome],
    tracking: TrackingContext,
) -> str:
    """The model card, as Markdown with a YAML header: how to use the Actor, how good it is, where it came from."""
    rules = "\n".join(
        f"| {o.name} | {o.found:.4g} | {o.limit:.4g} | {'passed' if o.passed else 'failed'} |" for o in outcomes
    )
    numbers = "\n".join(f"| {key} | {value:.4g} |" for key, value in sorted(metrics.items()))
    lineage = "\n".join(f"| {key} | `{value}` |" for key, value in sorted(tracking.tags.items()))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rlhf, ppo]
---
# {name}

A language model tuned from human feedback: supervised fine-tuning, a reward model, PPO.

```python
import mlflow

generate = mlflow.transformers.load_model("models:/{name}@champion")
print(generate({tracking.example!r}, return_full_text=False))
```

It samples as it was trained: temperature {generation.temperature}, at most {generation.max_new_tokens} new tokens.

| rule | found | limit | |
|---|---|---|---|
{rules}

| evaluation | |
|---|---|
{numbers}

| made from | |
|---|---|
| actor_digest | `{tracking.actor_digest}` |
{lineage}
"""


def _save(
    actor: Path, saved: Path, generation: config.Generation, card: str, tracking: TrackingContext, logged: Any
) -> None:
    """Write the folder that becomes the logged model's artifacts.

    The Actor goes in as a path: nothing loads its weights, so neither memory nor a warning is spent on it.
    """
    import mlflow.transformers
    from huggingface_hub import ModelCard
    from mlflow.models import Model

    settings = _generation_settings(actor, generation)
    mlflow.transformers.save_model(
        str(actor.resolve()),
        str(saved),
        task="text-generation",
        signature=_signature(settings),
        input_example=[tracking.example],
        pip_requirements=_requirements(),
        model_config={"return_full_text": False, "clean_up_tokenization_spaces": False},
        model_card=ModelCard(card),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
            run_id=tracking.run_id,
        ),
    )
    # mlflow takes the folder for a Hub repository and writes where its licence should be looked for.
    (saved / "LICENSE.txt").unlink(missing_ok=True)
    config_path = saved / "model" / "generation_config.json"
    config_path.unlink(missing_ok=True)  # a copy of a read-only file
    config_path.write_text(json.dumps(settings, indent=2) + "\n")


def _generation_settings(actor: Path, generation: config.Generation) -> dict[str, Any]:
    """A generation_config.json that samples as training did: the Actor's special tokens, our way of drawing.

    `top_k: 0` must be said: left out, transformers cuts to the 50 likeliest tokens.
    """
    path = actor / "generation_config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    settings = {name: value for name, value in found.items() if name.endswith("_token_id")}
    if generation.stop is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(actor, local_files_only=True, trust_remote_code=False)
        own = settings.get("eos_token_id", tokenizer.eos_token_id)
        stop = tokenizer.encode(generation.stop, add_special_tokens=False)
        settings["eos_token_id"] = sorted({*(own if isinstance(own, list) else [own]), *stop} - {None})
    return settings | {
        "do_sample": True,
        "temperature": generation.temperature,
        "top_k": generation.top_k or 0,
        "top_p": 1.0 if generation.top_p is None else generation.top_p,
        "max_new_tokens": generation.max_new_tokens,
    }


def _signature(settings: Mapping[str, Any]) -> ModelSignature:
    """Text in, text out, and the generation parameters that a caller may set; without it MLflow ignores them."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    kinds = {"max_new_tokens": "long", "do_sample": "boolean", "temperature": "double", "top_k": "long"}
    params = [ParamSpec(name, kind, settings[name]) for name, kind in (kinds | {"top_p": "double"}).items()]
    text = Schema([ColSpec("string")])
    return ModelSignature(text, text, ParamSchema(params))


def _requirements() -> list[str]:
    """What serving the Actor needs, pinned; a local suffix such as `+cpu` is on no index."""
    return [f"{library}=={installed_version(library).partition('+')[0]}" for library in ("torch", "transformers")]


def _ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_at(client: MlflowClient, name: str, alias: str) -> int | None:
    try:
        return int(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in _ABSENT:
            return None
        raise


def _numbers(evaluation: Path) -> dict[str, float]:
    """The finite numbers at the top of a metrics file."""
    document = json.loads(evaluation.read_text())
    numbers = {key: value for key, value in document.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if not isinstance(value, bool) and math.isfinite(value)}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

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
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rlhf_tasks.champion import ABSENT, CHAMPION, Move, move_champion, version_at
from rlhf_tasks.errors import UserError
from rlhf_tasks.logged_models import log_model, save_actor, save_reward
from rlhf_tasks.model_card import Facts, actor_card, reward_card
from rlhf_tasks.store import digest_path, open_lock

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from rlhf_tasks import config

log = logging.getLogger(__name__)

CHALLENGER, DIGEST, REWARD_DIGEST, GATE, JUDGED = "challenger", "actor_digest", "reward_digest", "gate", "gate_run"
TEMPLATE, REWARD, INPUT = "rlhf.template", "rlhf.reward", "rlhf.input."
OF_REWARD = (f"{INPUT}data/prepared/", f"{INPUT}checkpoints/sft")  # what it was made from
_TOLD = 8  # versions in a sentence


@dataclass(frozen=True)
class TrackingContext:
    """What the stage must know of MLflow and of where its Actor came from; no part of a key.

    Attributes:
        uri: tracking and registry server.
        run_id: the stage's run, which the model is logged under.
        actor_digest, reward_digest: content digests of their folders.
        lock: a file that serialises registering among this project's processes.
        tags: lineage for the version and its card: git commit, dvc.lock digest, digests of data and checkpoints.
        example: a prompt for the model's input example.
        facts: gathers what a card says; called only where there is something to register.
    """

    uri: str
    run_id: str
    actor_digest: str
    reward_digest: str
    lock: Path
    tags: Mapping[str, str] = field(default_factory=dict)
    example: str = "This film"
    facts: Callable[[], Facts] = Facts


@dataclass(frozen=True)
class Outcome:
    """One rule of the gate: what it found, and what it would let pass."""

    name: str
    passed: bool
    found: float
    limit: float


@dataclass(frozen=True)
class Settled:
    """Where the aliases stand: this Actor's version, the champion before and after, and what the gate said."""

    version: int
    previous: int | None
    champion: int | None
    passed: bool = True

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
    reward: Path,
    evaluation: Path,
    tracking: TrackingContext,
) -> Settled:
    """Move `@champion` to this Actor's version if the gate's rules pass; to be called after `run`, cached or not.

    A registry that does not know the Actor (a clone that pulled the stage's result) gets it here; only then are the
    folders read. Comparing with the present champion comes with the release gate; until then, passing the rules is
    enough.
    """
    version = ensure_registered(
        register_=register_,
        generation=generation,
        actor=actor,
        reward=reward,
        evaluation=evaluation,
        tracking=tracking,
    )
    outcomes = gate(_numbers(evaluation), register_.gate)
    _tag_verdict(register_.name, version, outcomes, tracking)
    if not all(outcome.passed for outcome in outcomes):
        present = champion(register_.name, tracking.uri)
        return Settled(version, present, present, passed=False)
    return Settled(version, *promote(register_.name, version, outcomes, tracking.uri))


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


def check_names(register_: config.Register, tracking_uri: str) -> None:
    """Refuse to register an Actor or a Reward among versions of something else, before hours are spent.

    Raises:
        UserError: a name belongs to a prompt, or to models that this pipeline did not register.
    """
    client = MlflowClient(tracking_uri)
    for key, name, mark in (("name", register_.name, DIGEST), ("reward_name", register_.reward_name, REWARD_DIGEST)):
        strangers = [v.version for v in client.search_model_versions(f"name = '{name}'") if mark not in v.tags]
        if strangers:
            found = f"a model whose version {strangers[0]} this pipeline did not register"
        elif client.get_prompt(name):  # prompts and models share their names
            found = "a prompt"
        else:
            continue
        raise UserError(f"register.{key}: {name!r} is {found} in the MLflow registry; choose another name")


def find_version(name: str, digest: str, tracking_uri: str, tag: str = DIGEST) -> int | None:
    """The newest registered version of what has this digest."""
    query = f"name = '{name}' and tags.{tag} = '{digest}'"
    versions = MlflowClient(tracking_uri).search_model_versions(query)
    return max((int(version.version) for version in versions), default=None)


@dataclass(frozen=True)
class Registered:
    """A registered version.

    Attributes:
        runs: the run in which the gate came to its present verdict, and, if another one registered it, that.
        created: when it was registered (UTC).
        tags: what it came from.
    """

    name: str
    version: int
    runs: tuple[str, ...]
    created: str
    tags: Mapping[str, str]


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
        if error.error_code not in ABSENT:
            raise
        missing = f"no alias {alias}" if alias else f"no version {number}"
        raise UserError(f"{uri}: {_what_there_is(client, name, missing)}") from None
    return _registered(found)


def _registered(found: ModelVersion) -> Registered:
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.creation_timestamp / 1000))
    runs = dict.fromkeys((found.tags.get(JUDGED) or str(found.run_id), str(found.run_id)))
    return Registered(found.name, int(found.version), tuple(runs), created, found.tags)


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
    return version_at(MlflowClient(tracking_uri), name, CHAMPION)


def promote(name: str, version: int, outcomes: list[Outcome], tracking_uri: str) -> tuple[int | None, int | None]:
    """Move `@champion` to a version that passed the gate, once: what people moved away from does not come back by
    itself. Returns the champion before and after."""
    why = "the gate passed: " + ", ".join(f"{o.name} {o.found:.4g}, limit {o.limit:.4g}" for o in outcomes)

    def decide(present: int | None, moves: list[Move]) -> Move | None:
        been = {present} | {known for move in moves for known in (move.version, move.before)}
        return None if version in been else Move(version, present, "gate", why)

    return move_champion(name, tracking_uri, decide)


def ensure_registered(
    *,
    register_: config.Register,
    generation: config.Generation,
    actor: Path,
    reward: Path,
    evaluation: Path,
    tracking: TrackingContext,
) -> int:
    """The Actor's version: the one with its digest, else a new one. `@challenger` names the newest version.

    The Reward that it was tuned with is registered before it, in the same way.
    """
    name, client, facts = register_.name, MlflowClient(tracking.uri), cache(tracking.facts)
    with _locked(tracking.lock):
        judge = _ensure_reward(register_.reward_name, reward, facts, tracking)
        version = find_version(name, tracking.actor_digest, tracking.uri)
        if version is None:
            metrics = _numbers(evaluation)
            card = actor_card(name, generation, gate(metrics, register_.gate), facts(), tracking)
            version = log_model(
                name,
                "text-generation",
                uri=tracking.uri,
                run_id=tracking.run_id,
                tags={**tracking.tags, TEMPLATE: facts().template, REWARD: judge, DIGEST: tracking.actor_digest},
                params=generation.model_dump(),
                metrics=metrics,
                save=partial(save_actor, actor, generation=generation, card=card, facts=facts(), tracking=tracking),
            )
            log.info("registered %s version %d", name, version)
        if version > (version_at(client, name, CHALLENGER) or 0):
            client.set_registered_model_alias(name, CHALLENGER, str(version))
    return version


def _ensure_reward(name: str, reward: Path, gather: Callable[[], Facts], tracking: TrackingContext) -> str:
    """The Reward's version, as `models:/NAME/VERSION`: the one with its digest, else a new one."""
    digest = tracking.reward_digest
    version = find_version(name, digest, tracking.uri, REWARD_DIGEST)
    if version is None:
        facts = gather()
        tags = {k: v for k, v in tracking.tags.items() if not k.startswith(INPUT) or k.startswith(OF_REWARD)}
        card = reward_card(name, digest, tracking.example, tags, facts)
        version = log_model(
            name,
            "text-scoring",
            uri=tracking.uri,
            run_id=tracking.run_id,
            tags={**tags, TEMPLATE: facts.template, REWARD_DIGEST: digest},
            params={},
            metrics=_finite(facts.metrics.get("reward", {})),
            save=partial(save_reward, reward, card=card, facts=facts, tracking=tracking),
        )
        log.info("registered %s version %d", name, version)
    return f"models:/{name}/{version}"


def _numbers(evaluation: Path) -> dict[str, float]:
    """The finite numbers at the top of a metrics file."""
    return _finite(json.loads(evaluation.read_text()))


def _finite(document: Mapping[str, object]) -> dict[str, float]:
    numbers = {key: value for key, value in document.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if not isinstance(value, bool) and math.isfinite(value)}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

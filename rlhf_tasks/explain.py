"""Why a stage runs again: what of its inputs is not what its last result was made of."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rlhf_tasks import chain, engine, keying, versioning
from rlhf_tasks.config import as_yaml
from rlhf_tasks.errors import UserError
from rlhf_tasks.keying import Job
from rlhf_tasks.stages import STAGES, Stage
from rlhf_tasks.store import Entry, digest_path
from rlhf_tasks.workspace import Workspace

PARTS = ("parameters", "inputs", "code", "environment")
SHOWN = 4


@dataclass(frozen=True)
class Change:
    """Something that a stage depends on, as it was and as it is; None where there is no such thing."""

    part: str
    name: str
    before: Any
    now: Any


@dataclass(frozen=True)
class Standing:
    """How a stage stands.

    Attributes:
        entry: its result, if it is done.
        text: what the result is, or why there is none.
        last: what it was made into before, if it is not done.
        changes: what is different since then.
        waits_for: the earlier stage that has to run first, so that inputs may still change.
        pulled: the store knows no result, but dvc.lock vouches for what the workspace holds.
    """

    stage: Stage
    entry: Entry | None
    text: str = ""
    last: Entry | None = None
    changes: tuple[Change, ...] = ()
    waits_for: str = ""
    pulled: bool = False

    @property
    def done(self) -> bool:
        return not self.waits_for and (self.entry is not None or self.pulled)


def standings(workspace: Workspace) -> list[Standing]:
    """How every stage stands, in order."""
    found: list[Standing] = []
    waiting, outdated, coming = "", _Outdated(workspace), dict[str, str]()
    for stage in STAGES.values():
        standing = _standing(workspace, stage, waiting, coming, outdated)
        if standing.entry:  # the run will put it back where the workspace has something else
            coming |= {path: standing.entry.parts[part] for part, path in stage.outs.items()}
        if not standing.done and not waiting:
            waiting = stage.name
        found.append(standing)
    return found


def _standing(
    workspace: Workspace, stage: Stage, waiting: str, coming: dict[str, str], outdated: _Outdated
) -> Standing:
    try:
        job = keying.plan(workspace, stage, coming)
    except UserError as error:
        return Standing(stage, None, str(error), waits_for=waiting)
    entry = engine.find(workspace, job)
    if entry and (engine.exported(workspace, entry) or entry.has_payload()):
        return Standing(stage, entry, waits_for=waiting)
    if not waiting and outdated.vouches_for(job):
        return Standing(stage, None, "pulled: in dvc.lock and in the workspace", pulled=True)
    last = last_result(workspace, stage)
    changes = compare(last, job) if last else ()
    return Standing(stage, None, _begun(workspace, job) or summary(last, changes), last, changes, waiting)


def _begun(workspace: Workspace, job: Job) -> str:
    if job.stage == "ppo" and keying.present(workspace, job) and (kept := chain.saved(chain.known(workspace))):
        return f"{kept} of {workspace.params.ppo.iterations} iterations are done"
    return "begun" if workspace.store.has_partial(job.key) else ""


def last_result(workspace: Workspace, stage: Stage) -> Entry | None:
    """What the workspace holds of a stage, if the store knows it; else the youngest that the store has."""
    entries = [entry for entry in workspace.store.entries() if entry.manifest["identity"]["stage"] == stage.name]
    try:
        held = {part: digest_path(workspace.root / path) for part, path in stage.outs.items()}
    except FileNotFoundError:
        held = {}
    own = [entry for entry in entries if entry.parts == held]
    return max(own or entries, key=made_at, default=None)


def made_at(entry: Entry) -> float:
    """When an entry was written, in seconds since 1970."""
    return (entry.folder / "manifest.json").stat().st_mtime


def compare(entry: Entry, job: Job) -> tuple[Change, ...]:
    """What a job depends on that is not what the entry was made of."""
    before, changes = entry.manifest["identity"], list[Change]()
    for part in PARTS:
        old, new = flat(before[part]), flat(job.identity[part])
        changes += [Change(part, n, old.get(n), new.get(n)) for n in sorted(keying.differing(old, new))]
    return tuple(changes)


def summary(last: Entry | None, changes: tuple[Change, ...]) -> str:
    """Changes in a few words."""
    if last is None:
        return "never done here"
    if not changes:
        return "its result in the store is damaged or was pruned"
    told = [
        change.name
        if change.part in ("inputs", "code")
        else f"{change.name} {as_yaml(change.before)} -> {as_yaml(change.now)}"
        for change in changes[:SHOWN]
    ]
    more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return f"changed: {', '.join(told)}{more}"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings with dotted keys."""
    if not isinstance(value, dict):
        return {name: value}
    inner = (flat(v, f"{name}.{k}" if name else str(k)) for k, v in value.items())
    return {k: v for part in inner for k, v in part.items()}


def when(entry: Entry) -> str:
    """When an entry was written, for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(made_at(entry)))


class _Outdated:
    """What DVC says of the workspace, asked once and only if it matters."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._stages: set[str] | None = None

    def vouches_for(self, job: Job) -> bool:
        """Whether `rlhf run` would take the workspace's outs over, because dvc.lock vouches for them."""
        try:
            if not keying.present(self._workspace, job) or not engine.adoptable(self._workspace, job):
                return False
            if self._stages is None:
                self._stages = versioning.outdated_stages(self._workspace.root)
        except UserError:  # no DVC here
            return False
        return job.stage not in self._stages

"""The Prefect flow `rlhf-pipeline` and its cached tasks: prepare → sft → reward → ppo → evaluate → register.

A task's cache key is our key (rlhf_tasks/engine.py), so Prefect holds no opinion of its own: what the store has is
Cached, what it lacks is run again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.states import Completed

from flows.console import Bar, say_stage
from flows.record import Record, StageRecord
from rlhf_tasks import engine, versioning
from rlhf_tasks.config import load_params
from rlhf_tasks.engine import Job, Workspace
from rlhf_tasks.errors import UserError
from rlhf_tasks.report import headline
from rlhf_tasks.stages import STAGES, Stage, stages_between
from rlhf_tasks.store import DamagedEntry, Entry

log = logging.getLogger("rlhf_tasks.flows")


@flow(name="rlhf-pipeline")
def rlhf_pipeline(start: str = "prepare", until: str = "register") -> dict[str, Any]:
    """Run the stages from `start` to `until` in the checkout that is the working folder.

    Returns:
        For each stage, the reference of its result: stage, path in the store, digest.
    """
    return run_stages(Path.cwd(), stages_between(start, until))


def run_stages(root: Path, stages: list[Stage]) -> dict[str, Any]:
    """Bring the stages up to date, in order, recording each with DVC and MLflow as soon as it is finished."""
    workspace = Workspace(root, load_params(root / "params.yaml"))
    with engine.alone(root), Record.open(workspace) as record:
        outdated = set(STAGES) if versioning.inside_stage() else versioning.outdated_stages(root)
        if not versioning.inside_stage():
            refuse_stale_inputs(stages, outdated)
        done, untouched = {}, True
        for stage in stages:
            with record.stage(stage) as stage_record:
                # What DVC said of a stage holds only as long as nothing before it has changed.
                vouched = untouched and stage.name not in outdated
                entry, fresh = bring_up_to_date(workspace, stage, stage_record, vouched=vouched)
                untouched = untouched and not fresh
                record_with_dvc(workspace, stage, entry, stale=fresh or stage.name in outdated)
                if stage.name == "register":
                    stage_record.settle()
                done[stage.name] = asdict(entry.ref)
        return done


def bring_up_to_date(workspace: Workspace, stage: Stage, record: StageRecord, *, vouched: bool) -> tuple[Entry, bool]:
    """Find a stage's result or make it, and have it in the workspace.

    Args:
        vouched: whether DVC says that the workspace holds what the stage makes of its present inputs.

    Returns:
        The result, and whether the workspace changed.
    """
    job, started = engine.plan(workspace, stage), time.monotonic()
    hit = find_result(workspace, job, vouched=vouched)
    make = run_ppo if stage.name == "ppo" else run_stage
    try:
        entry = make(workspace, job, hit, record)
        fresh = hit is None or not engine.exported(workspace, entry)
        engine.export(workspace, entry)
    except DamagedEntry as error:
        log.warning("%s; the stage %s is done again", error, stage.name)
        workspace.store.discard(job.key)
        return bring_up_to_date(workspace, stage, record, vouched=False)
    record.finished(entry, cached=hit is not None)
    how, seconds = "cached" if hit else "done", time.monotonic() - started
    say_stage(stage.name, how, seconds, headline(stage.name, entry.manifest["metrics"]))
    return entry, fresh


def find_result(workspace: Workspace, job: Job, *, vouched: bool) -> Entry | None:
    """A stage's finished result: in the store, or in the workspace where DVC vouches for it."""
    entry = workspace.store.find(job.key)
    if entry and (engine.exported(workspace, entry) or entry.has_payload()):
        return entry
    return engine.adopt(workspace, job) if vouched else None


def run_stage(workspace: Workspace, job: Job, hit: Entry | None, record: StageRecord) -> Entry:
    """A stage that is one task."""

    def work() -> Entry:
        with Bar(job.stage) as bar:
            return engine.perform(workspace, job, lambda row, total: record.watch(row, total, bar))

    return run_task(job, job.stage, hit, work)


def run_ppo(workspace: Workspace, job: Job, hit: Entry | None, record: StageRecord) -> Entry:
    """The ppo stage: a task an iteration, each from the state that its parent left, and one that collects them."""
    total = workspace.params.ppo.iterations
    known = engine.known_iterations(workspace)
    if hit and len(known) < total:  # adopted from DVC, which keeps no iterations
        return run_task(job, "ppo", hit, lambda: hit)
    done = known if hit else known[: engine.usable_iterations(known)]
    hits = len(done)
    with Bar("ppo") as bar:
        for iteration in range(1, total + 1):
            parent = done[iteration - 2] if iteration > 1 else None
            step = engine.plan_iteration(workspace, iteration, parent)
            entry = run_task(
                step,
                f"ppo-{iteration:03d}",
                done[iteration - 1] if iteration <= hits else None,
                partial(engine.perform_iteration, workspace, step, parent),
            )
            if iteration > hits:
                done.append(entry)
                engine.prune_iterations(done)
            record.iteration(entry)
            bar(iteration, total, entry.manifest["metrics"])
    return run_task(job, "ppo", hit, lambda: engine.finish_ppo(workspace, job, done))


def run_task(job: Job, name: str, hit: Entry | None, work: Callable[[], Entry]) -> Entry:
    """A piece of work as a Prefect task under our key. What the store has is Cached, whatever Prefect remembers."""
    entry: list[Entry] = [hit] if hit else []

    def body() -> object:
        if hit:
            return Completed(name="Cached", message="found in the store", data=asdict(hit.ref))
        entry.append(work())
        return asdict(entry[0].ref)

    keyed_task.with_options(name=job.stage, task_run_name=name, refresh_cache=hit is None)(job.key, body)
    return entry[0]


@task(
    cache_key_fn=lambda context, parameters: parameters["key"],
    persist_result=True,
    result_serializer="json",
)
def keyed_task(key: str, body: Callable[[], object]) -> object:
    """Run `body`, whose result belongs to `key`: a reference as JSON."""
    return body()


def record_with_dvc(workspace: Workspace, stage: Stage, entry: Entry, *, stale: bool) -> None:
    """Write the stage into dvc.lock if that is stale, unless what the stage read has changed since it began.

    `dvc commit` and `dvc repro` record whatever is on disk, so an edit made while the stage ran would be blessed. The
    look after the commit catches one made during it.

    Raises:
        UserError: parameters, inputs or code changed; dvc.lock is as it was.
    """
    job = Job(stage.name, entry.manifest["key"], entry.manifest["identity"])
    lock = workspace.root / "dvc.lock"
    before = lock.read_bytes() if lock.exists() else None
    changed = engine.changed_since(workspace, job)
    if stale and not changed and not versioning.inside_stage():
        versioning.record(workspace.root, stage)
        changed = engine.changed_since(workspace, job)
        if changed and before is not None:
            lock.write_bytes(before)
        elif changed:
            lock.unlink()
    if changed:
        raise UserError(
            f"{stage.name}: params.yaml, its inputs or its code changed while it ran; its result is kept in the store "
            "but not recorded in dvc.lock; run again"
        )


def refuse_stale_inputs(stages: list[Stage], outdated: set[str]) -> None:
    """A run that begins in the middle takes earlier results as they are; nobody registers an Actor made of stale ones.

    Raises:
        UserError: an earlier stage is out of date and the run would register.
    """
    names = list(STAGES)
    stale = [name for name in names[: names.index(stages[0].name)] if name in outdated]
    if not stale:
        return
    if stages[-1].name == "register":
        raise UserError(
            f"--from {stages[0].name}: {', '.join(stale)} would have to run first, since params.yaml, data or code "
            "changed; run `rlhf run`, or stop before registering with `--until evaluate`"
        )
    log.warning("%s: out of date, taken as they are", ", ".join(stale))

"""The Prefect flow `rlhf-pipeline`: prepare → sft → reward → ppo → evaluate → register, in this checkout."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from rich.markup import escape

from flows.artifacts import publish_origin, publish_report
from flows.console import console, say_settled, say_stage
from flows.hooks import say_where_to_look
from flows.record import Record, StageRecord
from flows.tasks import Orders, run_ppo, run_stage, show_cached
from rlhf_tasks import chain, engine, keying, versioning
from rlhf_tasks.ahead import check_before, check_preparable, check_prepared, high_rates
from rlhf_tasks.config import Params, load_params, set_params
from rlhf_tasks.errors import UserError
from rlhf_tasks.keying import Job
from rlhf_tasks.report import headline, make_report
from rlhf_tasks.stages import STAGES, Stage, stages_between
from rlhf_tasks.store import DamagedEntry, Entry, full_disk_is_a_sentence
from rlhf_tasks.workspace import Workspace, alone

log = logging.getLogger("rlhf_tasks.flows")

SECONDS_A_TRY = 5.0
LEASE_SECONDS = 60.0  # renewed while the stage works; a killed one loses its slot after this


def run_name() -> str:
    """What the run runs: its stages, and what it was asked to change."""
    asked = flow_run.parameters
    start, until = asked["start"], asked["until"]
    changes = [f"{key}={value}" for key, value in (asked.get("params") or {}).items()]
    refresh = ["refresh"] if asked.get("refresh") else []
    return " ".join([start if start == until else f"{start} to {until}", *changes, *refresh])


@flow(
    name="rlhf-pipeline",
    flow_run_name=run_name,
    on_failure=[say_where_to_look],
    on_crashed=[say_where_to_look],
    on_cancellation=[say_where_to_look],
)
def rlhf_pipeline(
    start: str = "prepare",
    until: str = "register",
    params: dict[str, Any] | None = None,
    refresh: bool = False,
    timeout_minutes: float | None = None,
) -> dict[str, Any]:
    """Bring the stages from `start` to `until` up to date, in the checkout that is the working folder.

    Args:
        start: the first stage: prepare, sft, reward, ppo, evaluate or register.
        until: the last stage.
        params: written into the checkout's params.yaml first, by dotted key, `{"ppo.kl.coef": 0.2}`; all of them, or
            none if the run is refused before it begins.
        refresh: do all of the work again, whatever is stored.
        timeout_minutes: give up then; what is finished is kept, and a retry goes on from there.

    Returns:
        For each stage, the reference of its result: stage, path in the store, digest.
    """
    root, stages = Path.cwd(), stages_between(start, until)
    if timeout_minutes is not None and not timeout_minutes > 0:
        raise UserError(f"timeout_minutes: found {timeout_minutes}, expected more than 0, or null for no limit")
    orders = Orders(refresh, time.monotonic() + 60 * timeout_minutes if timeout_minutes else None)
    with alone(root), full_disk_is_a_sentence(root), put_back_unless_begun(root, params or {}) as begin:
        bring_checkout_up_to_date(root, params or {}, stages)
        try:
            return run_stages(root, stages, orders, begin)
        except TimeoutError:
            if not orders.over():
                raise
            raise UserError(
                f"stopped after `timeout_minutes: {timeout_minutes}`; what is finished is kept: retry the run, or "
                "give it more time"
            ) from None


@contextmanager
def put_back_unless_begun(root: Path, params: dict[str, Any]) -> Iterator[Callable[[], object]]:
    """Have a run that is refused before it begins leave params.yaml, and dvc.yaml with it, as they were.

    Args:
        params: what is written there; where that is nothing, nothing is put back.

    Yields:
        What is to be called when the run begins.
    """
    with ExitStack() as undo:
        for path in (root / "params.yaml", root / "dvc.yaml") if params else ():
            if path.exists():
                undo.callback(_put_back, path, path.read_bytes())
        yield undo.pop_all


def _put_back(path: Path, content: bytes) -> None:
    if path.read_bytes() != content:
        old = path.with_name(path.name + ".old")
        old.write_bytes(content)
        old.replace(path)
        console.print(f"{path.name}: put back as it was")


def bring_checkout_up_to_date(root: Path, params: dict[str, Any], stages: list[Stage]) -> None:
    """Write parameters into params.yaml, and keep dvc.yaml true: its deps follow params.yaml and the code.

    Raises:
        UserError: a parameter, or a source or function that it names, is wrong; or DVC is running this stage from a
            dvc.yaml that is out of date.
    """

    def check(new: Params) -> None:
        check_before(new, root, stages)
        if params:  # else there is nothing that need not be written, and `prepare` says it itself
            check_preparable(new, stages)

    for change in set_params(root / "params.yaml", params, check):
        console.print(escape(f"params.yaml: {change}"), soft_wrap=True)
        log.info("params.yaml: %s", change)
    settings = load_params(root / "params.yaml")
    if warning := high_rates(settings, stages):
        log.warning("%s", warning)
    if not versioning.update_pipeline(root, settings):
        return
    if versioning.inside_stage():
        raise UserError(
            "dvc.yaml did not list what params.yaml and the code say now; it has been brought up to date, "
            "so run the same `dvc` command again"
        )
    console.print("dvc.yaml: brought up to date with params.yaml and the code")


def run_stages(root: Path, stages: list[Stage], orders: Orders, begin: Callable[[], object]) -> dict[str, Any]:
    """Bring the stages up to date, in order, recording each with DVC and MLflow as soon as it is finished.

    Args:
        begin: called when nothing speaks against it any more.
    """
    workspace = Workspace(root, load_params(root / "params.yaml"))
    outdated = set(STAGES) if versioning.inside_stage() else versioning.outdated_stages(root)
    if not versioning.inside_stage():
        refuse_stale_inputs(stages, outdated)
    prepared = STAGES["prepare"] not in stages or not (orders.refresh or "prepare" in outdated)
    if prepared:
        check_prepared(workspace.params, root, stages)
    # A retry goes on: what its first attempt did again need not be done a third time.
    before = forget_results(workspace, stages) if orders.refresh and flow_run.run_count == 1 else {}
    with Record.open(workspace, stages) as record:
        begin()
        publish_origin(record.origin())
        done, untouched = {}, True
        for stage in stages:
            with record.stage(stage) as stage_record:
                # What DVC said of a stage holds only as long as nothing before it has changed.
                vouched = untouched and stage.name not in outdated and not orders.refresh
                job = keying.plan(workspace, stage)
                entry, fresh = bring_up_to_date(workspace, job, stage_record, orders, vouched=vouched)
                if before.get(stage.name, entry.digest) != entry.digest:
                    log.warning("%s: done again, it came out different, now %s", stage.name, entry.digest)
                untouched = untouched and not fresh
                record_with_dvc(workspace, stage, job, stale=fresh or stage.name in outdated)
                if stage.name == "register":
                    stage_record.settle()
                    say_settled(workspace.params.register_.name, stage_record.settled)
                done[stage.name] = asdict(entry.ref)
            if stage.name == "prepare" and not prepared:
                check_prepared(workspace.params, root, stages)
        if stages[-1].name in ("evaluate", "register"):
            publish_report(make_report(root, workspace.params.evaluate.examples, stages[-1].name))
        publish_origin(record.origin())  # once more: dvc.lock is another now
        return done


def bring_up_to_date(
    workspace: Workspace, job: Job, record: StageRecord, orders: Orders, *, vouched: bool
) -> tuple[Entry, bool]:
    """Find a stage's result or make it, and have it in the workspace.

    Args:
        vouched: whether DVC says that the workspace holds what the stage makes of its present inputs.

    Returns:
        The result, and whether the workspace changed.
    """
    stage, started = STAGES[job.stage], time.monotonic()
    hit = find_result(workspace, job, vouched=vouched)
    try:
        if hit:
            show_cached(workspace, job, hit, record)
            entry = hit
        else:
            make = run_ppo if stage.name == "ppo" else run_stage
            with device_slot(workspace, stage, orders), record.working():
                entry = make(workspace, job, record, orders)
        fresh = hit is None or not engine.exported(workspace, entry)
        engine.export(workspace, entry)
    except DamagedEntry as error:
        log.warning("%s; the stage %s is done again", error, stage.name)
        engine.forget(workspace, job)
        return bring_up_to_date(workspace, job, record, orders, vouched=False)
    record.finished(entry, cached=hit is not None)
    how, seconds = "cached" if hit else "done", time.monotonic() - started
    say_stage(stage.name, how, seconds, headline(stage.name, entry.manifest["metrics"]))
    log.info("%s: %s, %s", stage.name, how, entry.digest)
    return entry, fresh


def forget_results(workspace: Workspace, stages: list[Stage]) -> dict[str, str]:
    """Drop what the store has of the stages, iterations too. Returns the digests of what was there."""
    digests = {}
    for stage in stages:
        try:
            job = keying.plan(workspace, stage)
        except UserError:  # an earlier stage has still to make its inputs, so there is nothing to forget
            continue
        if entry := engine.find(workspace, job):
            digests[stage.name] = entry.digest
        if stage.name == "ppo":
            for iteration in chain.known(workspace):
                workspace.store.discard(iteration.manifest["key"])
        engine.forget(workspace, job)
    return digests


@contextmanager
def device_slot(workspace: Workspace, stage: Stage, orders: Orders) -> Iterator[None]:
    """Wait for a slot of the Prefect concurrency limit `rlhf-cuda` or `rlhf-cpu`, where the user made one.

    A stage holds it from its first batch to its last: between two PPO iterations the models stay in memory.
    """
    limit = f"rlhf-{workspace.params.runtime.device}"
    if "runtime" not in stage.sections or not limit_exists(limit):
        yield
        return
    with ExitStack() as held:
        said = False
        while True:
            try:  # in short tries: a long one could be ended neither by Ctrl-C nor by the run's own deadline
                held.enter_context(
                    concurrency(limit, occupy=1, timeout_seconds=SECONDS_A_TRY, lease_duration=LEASE_SECONDS)
                )
                break
            except TimeoutError:
                if orders.over():
                    raise
                if not said:
                    said = True
                    text = f"{stage.name}: waiting for a slot of the limit {limit} (`prefect gcl inspect {limit}`)"
                    log.info(text)
                    console.print(text, soft_wrap=True)
        yield


def limit_exists(name: str) -> bool:
    """Whether the server has a global concurrency limit of this name; asking for slots of none would warn."""
    with get_client(sync_client=True) as client:
        try:
            return bool(client.read_global_concurrency_limit_by_name(name))
        except ObjectNotFound:
            return False


def find_result(workspace: Workspace, job: Job, *, vouched: bool) -> Entry | None:
    """A stage's finished result: in the store, or in the workspace where DVC vouches for it."""
    entry = engine.find(workspace, job)
    if entry and (engine.exported(workspace, entry) or entry.has_payload()):
        return entry
    return engine.adopt(workspace, job) if vouched else None


def record_with_dvc(workspace: Workspace, stage: Stage, job: Job, *, stale: bool) -> None:
    """Write the stage into dvc.lock if that is stale, unless what the stage read has changed since it began.

    `dvc commit` and `dvc repro` record whatever is on disk, so an edit made while the stage ran would be blessed. The
    look after the commit catches one made during it.

    Raises:
        UserError: parameters, inputs or code changed; dvc.lock is as it was.
    """
    lock = workspace.root / "dvc.lock"
    before = lock.read_bytes() if lock.exists() else None
    changed = keying.changed_since(workspace, job)
    if stale and not changed and not versioning.inside_stage():
        versioning.record(workspace.root, stage)
        changed = keying.changed_since(workspace, job)
        if changed and before is not None:
            lock.with_name("dvc.lock.old").write_bytes(before)
            lock.with_name("dvc.lock.old").replace(lock)
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

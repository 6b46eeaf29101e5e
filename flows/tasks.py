"""The cached tasks: a stage is one task, PPO one an iteration.

A task's cache key is our key (rlhf_tasks/engine.py), so Prefect holds no opinion of its own: what the store has is
Cached, what it lacks is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from prefect import task
from prefect.states import Completed

from flows.artifacts import Progress
from flows.record import StageRecord
from rlhf_tasks import engine
from rlhf_tasks.engine import Job, Workspace
from rlhf_tasks.store import Entry


@dataclass(frozen=True)
class Orders:
    """How a run is to go about its stages.

    Attributes:
        refresh: do all of the work again, whatever the store and the workspace have.
        deadline: when the run must be over, in seconds of `time.monotonic`.
    """

    refresh: bool = False
    deadline: float | None = None

    def over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def seconds_left(self) -> float | None:
        return None if self.deadline is None else max(0.01, self.deadline - time.monotonic())


def run_stage(workspace: Workspace, job: Job, hit: Entry | None, record: StageRecord, orders: Orders) -> Entry:
    """A stage that is one task."""

    def work() -> Entry:
        with Progress(job.stage) as progress:
            return engine.perform(workspace, job, lambda row, total: record.watch(row, total, progress))

    return run_task(job, job.stage, hit, work, orders)


def run_ppo(workspace: Workspace, job: Job, hit: Entry | None, record: StageRecord, orders: Orders) -> Entry:
    """The ppo stage: a task an iteration, each from the state that its parent left, and one that collects them."""
    total = workspace.params.ppo.iterations
    known = engine.known_iterations(workspace)
    if hit and len(known) < total:  # adopted from DVC, which keeps no iterations
        return run_task(job, "ppo", hit, lambda: hit, orders)
    done = known if hit else known[: engine.usable_iterations(known)]
    hits = len(done)
    with Progress("ppo") as progress:
        for iteration in range(1, total + 1):
            parent = done[iteration - 2] if iteration > 1 else None
            step = engine.plan_iteration(workspace, iteration, parent)
            entry = run_task(
                step,
                f"ppo-{iteration:03d}",
                done[iteration - 1] if iteration <= hits else None,
                partial(engine.perform_iteration, workspace, step, parent),
                orders,
            )
            if iteration > hits:
                done.append(entry)
                engine.prune_iterations(done)
            record.iteration(entry)
            progress(iteration, total, entry.manifest["metrics"])
    return run_task(job, "ppo", hit, lambda: engine.finish_ppo(workspace, job, done), orders)


def run_task(job: Job, name: str, hit: Entry | None, work: Callable[[], Entry], orders: Orders) -> Entry:
    """A piece of work as a Prefect task under our key. What the store has is Cached, whatever Prefect remembers."""
    entry: list[Entry] = [hit] if hit else []

    def body() -> object:
        if hit:
            return Completed(name="Cached", message="found in the store", data=asdict(hit.ref))
        entry.append(work())
        return asdict(entry[0].ref)

    keyed_task.with_options(
        name=job.stage,
        task_run_name=name,
        refresh_cache=hit is None,
        timeout_seconds=orders.seconds_left(),
    )(job.key, body)
    return entry[0]


@task(
    cache_key_fn=lambda context, parameters: parameters["key"],
    persist_result=True,
    result_serializer="json",
)
def keyed_task(key: str, body: Callable[[], object]) -> object:
    """Run `body`, whose result belongs to `key`: a reference as JSON."""
    return body()

"""The cached tasks: a stage is one task, PPO one an iteration.

A task's cache key is our key (rlhf_tasks/keying.py), so Prefect holds no opinion of its own: what the store has is
Cached, what it lacks is run again. Prefect's own records of results are written for whoever looks there, and never read
(`refresh_cache`): a record names how it is to be deserialised, which may be by running code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from prefect import task
from prefect.states import Completed

from flows.artifacts import Progress
from flows.console import say_resumed
from flows.record import StageRecord
from rlhf_tasks import chain, engine
from rlhf_tasks.keying import Job
from rlhf_tasks.store import Entry
from rlhf_tasks.workspace import Workspace


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


def run_stage(workspace: Workspace, job: Job, record: StageRecord, orders: Orders) -> Entry:
    """A stage that is one task."""

    def work() -> list[Entry]:
        with Progress(job.stage) as progress:
            return [engine.perform(workspace, job, lambda row, total: record.watch(row, total, progress))]

    return run_task(job, job.stage, work, orders)[-1]


def run_ppo(workspace: Workspace, job: Job, record: StageRecord, orders: Orders) -> Entry:
    """The ppo stage: tasks of one or more iterations, each from the state that its parent left, and one to end it."""
    done, total = chain.usable(chain.known(workspace)), workspace.params.ppo.iterations
    if 0 < len(done) < total:
        say_resumed(job.stage, "iteration", len(done), total)
    with Progress("ppo") as progress:

        def show(entry: Entry) -> None:
            record.iteration(entry)
            progress(entry.manifest["identity"]["iteration"], total, entry.manifest["metrics"])

        show_cached_iterations(workspace, done, show)
        jobs = chain.plan(workspace)
        while len(done) < total:
            last = len(done) + chain.task_length(workspace, done)
            advance = partial(chain.advance, workspace, done, show)
            done = run_task(jobs[last - 1], f"ppo-{last:03d}", advance, orders)
    return run_task(job, "ppo", lambda: [chain.finish(workspace, job, done)], orders)[-1]


def show_cached(workspace: Workspace, job: Job, hit: Entry, record: StageRecord) -> None:
    """A stage whose result is there, with all that it was when it was made."""
    if job.stage == "ppo":
        show_cached_iterations(workspace, chain.known(workspace), record.iteration)
    cached_task(job, job.stage, hit)


def show_cached_iterations(workspace: Workspace, done: list[Entry], show: Callable[[Entry], None]) -> None:
    """Iterations that need not be done again, each a task that Prefect shows as Cached."""
    for iteration, (job, entry) in enumerate(zip(chain.plan(workspace), done, strict=False), start=1):
        cached_task(job, f"ppo-{iteration:03d}", entry)
        show(entry)


def run_task(job: Job, name: str, work: Callable[[], list[Entry]], orders: Orders) -> list[Entry]:
    """A piece of work as a Prefect task under our key. It is run whatever Prefect remembers: the store lacks it."""
    entries: list[Entry] = []

    def body() -> object:
        entries.extend(work())
        return asdict(entries[-1].ref)

    keyed_task.with_options(
        name=job.stage, task_run_name=name, refresh_cache=True, timeout_seconds=orders.seconds_left()
    )(job.key, body)
    return entries


def cached_task(job: Job, name: str, entry: Entry) -> None:
    """A task that Prefect shows as Cached, whatever it remembers: the store has its result."""

    def body() -> object:  # its state is made when the task runs: Prefect sorts states by their times
        return Completed(name="Cached", message="found in the store", data=asdict(entry.ref))

    keyed_task.with_options(name=job.stage, task_run_name=name, refresh_cache=True)(job.key, body)


@task(
    cache_key_fn=lambda context, parameters: parameters["key"],
    persist_result=True,
    result_serializer="json",
)
def keyed_task(key: str, body: Callable[[], object]) -> object:
    """Run `body`, whose result belongs to `key`: a reference as JSON."""
    return body()

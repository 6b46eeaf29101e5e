"""PPO's chain: its iterations as entries of the store, each going on from the state that its parent left.

An iteration's key holds its parent's key, so the whole chain is known before anything runs. Every iteration leaves a
manifest with its metrics; a state, which is what can be gone on from, is saved at the end of each task.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from statistics import fmean
from types import MappingProxyType
from typing import Any

from rlhf_tasks import engine, keying
from rlhf_tasks.keying import Job
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import DamagedEntry, Entry
from rlhf_tasks.workspace import Workspace

log = logging.getLogger(__name__)

ITERATION = "ppo-iteration"
PAYLOADS_KEPT = 2
STATE = {
    "actor.safetensors",
    "critic.safetensors",
    "actor_optimizer.safetensors",
    "critic_optimizer.safetensors",
    "state.json",
}
SHORTEST = 1e-6  # seconds: somebody else's manifest may say 0
SAVING_SHARE = 0.05  # of the time, with `saving.iterations_per_task: auto`


def plan(workspace: Workspace, coming: Mapping[str, str] = MappingProxyType({})) -> list[Job]:
    """The jobs of all iterations, in order; `coming` as in `keying.plan`.

    Raises:
        UserError: an input is missing; the message says which stage makes it.
    """
    stage, jobs = STAGES["ppo"], list[Job]()
    settings = keying.parameters(workspace.params, stage)
    settings["ppo"] = {name: value for name, value in settings["ppo"].items() if name != "iterations"}
    shared = keying.identity(workspace, stage, settings, coming)
    for iteration in range(1, workspace.params.ppo.iterations + 1):
        parent = jobs[-1].key if jobs else None
        jobs.append(Job.of(shared | {"stage": ITERATION, "iteration": iteration, "parent": parent}))
    return jobs


def known(workspace: Workspace) -> list[Entry]:
    """The finished iterations from the first on, as far as they go, by their manifests."""
    found: list[Entry] = []
    for job in plan(workspace):
        entry = workspace.store.find(job.key)
        if entry is None:
            break
        found.append(entry)
    return found


def usable(entries: list[Entry]) -> list[Entry]:
    """The iterations that need not be done again to go on: up to the last whole state."""
    for count in range(len(entries), 0, -1):
        last = entries[count - 1]
        if last.has_payload() and last.parts.keys() == STATE:
            try:
                last.verify()
                return entries[:count]
            except DamagedEntry as error:
                log.warning("%s; going on from an earlier iteration", error)
                last.prune()
    return []


def saved(entries: list[Entry]) -> int:
    """How many iterations are done up to the last state that seems whole."""
    return max((count for count, entry in enumerate(entries, start=1) if entry.has_payload()), default=0)


def task_length(workspace: Workspace, done: list[Entry]) -> int:
    """How many iterations the next task has: `saving.iterations_per_task`, or as many as make saving cheap enough."""
    left = workspace.params.ppo.iterations - len(done)
    wanted = workspace.params.saving.iterations_per_task
    if wanted == "auto":
        wanted = _cheap_length([entry.manifest["perf"] for entry in done], left)
    return max(1, min(wanted, left))


def _cheap_length(done: list[dict[str, float]], left: int) -> int:
    """Iterations to the next save, such that saves, spread evenly over what is left, take `SAVING_SHARE` of the run.

    The first iteration's save is the first measurement. If saving was dearer so far, less of it follows, but no task is
    more than three times as long as a save is worth: a kill costs a task.
    """
    saves = [max(perf["save_seconds"], SHORTEST) for perf in done if "save_seconds" in perf]
    if not saves:
        return 1
    seconds = max(fmean(perf.get("seconds", 0.0) for perf in done), SHORTEST)
    affordable = SAVING_SHARE * seconds * (len(done) + left) - sum(saves)
    count = max(1, math.floor(affordable / saves[-1]))
    return min(math.ceil(left / count), 3 * math.ceil(saves[-1] / (SAVING_SHARE * seconds)))


def advance(workspace: Workspace, done: list[Entry], watch: Callable[[Entry], None]) -> list[Entry]:
    """Do the next task's iterations, telling `watch` of each. Returns all that are done then.

    Another process on the same store may be ahead: then what it has done is returned, and nothing is done twice.

    Raises:
        DamagedEntry: the state to go on from is not what was written; the caller starts from an earlier one.
    """
    jobs, store = plan(workspace), workspace.store
    with store.lock(jobs[0].key):
        ahead = known(workspace)
        if saved(ahead) > len(done):
            for entry in (more := usable(ahead))[len(done) :]:
                watch(entry)
            if len(more) > len(done):
                return more
        todo = jobs[len(done) : len(done) + task_length(workspace, done)]
        before = {entry.manifest["key"]: entry for entry in ahead}
        with keying.nothing_changes(workspace, STAGES["ppo"], todo[0]) as check:
            trainer = _trainer(workspace, done[-1] if done else None)
            workspace.live_trainer = None  # until the task is done its state is nobody's
            for job in todo:
                done = [*done, _iterate(workspace, trainer, job, save=job is todo[-1], check=check)]
                _compare(before.get(job.key), done[-1])
                watch(done[-1])
        workspace.live_trainer = (todo[-1].key, trainer)
        _prune(done)
        return done


def finish(workspace: Workspace, job: Job, iterations: list[Entry]) -> Entry:
    """Make the ppo stage's result of its last iteration's state and everybody's curve."""
    stage, store = STAGES["ppo"], workspace.store
    first, last = iterations[0].manifest["key"], iterations[-1]
    with (
        store.lock(job.key),
        store.lock(first),  # nobody, `rlhf gc` of another clone say, takes the state away while it is read
        keying.nothing_changes(workspace, stage, job) as check,
        store.writing(job.key) as out,
    ):
        last.verify()
        module = importlib.import_module(stage.module)
        try:
            metrics = module.run(
                seed=workspace.params.seed,
                ppo=workspace.params.ppo,
                state=last.payload,
                sft=workspace.root / stage.inputs["sft"],
                last=last.manifest["metrics"],
                out=out,
            )
        except module.BadState as error:
            raise _foreign(last, error) from None
        series = [row for entry in iterations for row in entry.manifest["series"]]
        engine.save_curve(stage, out, series)
        engine.save_lineage(job, out)
        perf = {"seconds": sum(entry.manifest["perf"].get("seconds", 0.0) for entry in iterations)}
        check()
        return store.commit(job.key, out, job.identity, metrics=metrics, series=series, perf=perf)


def _iterate(workspace: Workspace, trainer: Any, job: Job, *, save: bool, check: Callable[[], None]) -> Entry:
    """One iteration, and its entry: with the state that it leaves, or a manifest alone."""
    metrics, timings = trainer.step()
    perf = timings | {"seconds": sum(v for k, v in timings.items() if k.endswith("_seconds"))}
    row = {"step": job.identity["iteration"], "time_ms": int(time.time() * 1000), "values": metrics}
    with workspace.store.writing(job.key) as out:
        if save:
            started = time.perf_counter()
            trainer.save(out)
            perf["save_seconds"] = time.perf_counter() - started
        check()
        return workspace.store.commit(job.key, out, job.identity, metrics=metrics, series=[row], perf=perf)


def _compare(before: Entry | None, now: Entry) -> None:
    """An iteration that is done again has to come out the same: the chain's keys are of its inputs."""
    if before and before.manifest["metrics"] != now.manifest["metrics"]:
        iteration = now.manifest["identity"]["iteration"]
        log.warning("iteration %d: done again, it came out different: something changes bits unseen", iteration)


def _prune(entries: list[Entry]) -> None:
    """Keep the last states, and every manifest."""
    with_state = [entry for entry in entries if entry.has_payload()]
    for entry in with_state[:-PAYLOADS_KEPT]:
        entry.prune()


def _trainer(workspace: Workspace, parent: Entry | None) -> Any:
    """The four models with the parent's state: in memory if it is still there, else loaded."""
    if workspace.live_trainer and parent and workspace.live_trainer[0] == parent.manifest["key"]:
        return workspace.live_trainer[1]
    if parent:
        parent.verify()
    stage = STAGES["ppo"]
    arguments = {name: workspace.params.section(name) for name in stage.sections}
    arguments |= {name: workspace.root / path for name, path in stage.inputs.items()}
    module = importlib.import_module(stage.module)
    try:
        return module.Trainer.load(**arguments, parent=parent.payload if parent else None)
    except module.BadState as error:
        assert parent
        raise _foreign(parent, error) from None


def _foreign(entry: Entry, error: Exception) -> DamagedEntry:
    """What to raise of a state of other models. Its digests are right: only without it, it is not tried again."""
    entry.prune()
    return DamagedEntry(f"{entry.payload}: not a state to go on from ({error})")

"""A run's record in MLflow, written as the stages go: a parent run, a child a stage, live while it trains.

What is logged live and what is replayed from a manifest afterwards are the same points, so cached and fresh stages end
up with the same curves. That is also why a server that goes away in the middle costs nothing: the work goes on, and the
next run records what is missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run

from flows.artifacts import Progress
from flows.server import session
from rlhf_tasks import registry, versioning
from rlhf_tasks.config import flatten
from rlhf_tasks.digests import digest_file
from rlhf_tasks.errors import UserError
from rlhf_tasks.facts import gather_facts
from rlhf_tasks.lineage import Document, lineage_here
from rlhf_tasks.origins import Origin, log_origin, tell_makers
from rlhf_tasks.registry import Settled, TrackingContext
from rlhf_tasks.source import LOCK, Source, source_of
from rlhf_tasks.stages import STAGES, Stage
from rlhf_tasks.store import Entry, digest_path
from rlhf_tasks.tracking import Status, Tracker, Unreachable, answered
from rlhf_tasks.workspace import Workspace, project_folder

log = logging.getLogger("rlhf_tasks.flows")

#: what ends a run from outside: Ctrl-C, and SIGTERM as Prefect raises it
INTERRUPTS = (KeyboardInterrupt, TerminationSignal)

SESSION = "rlhf.session"
SECONDS_BETWEEN_WRITES = 5.0

P = ParamSpec("P")


def unless_down(
    method: Callable[Concatenate[Any, P], None],
) -> Callable[Concatenate[Any, P], None]:
    """Write to MLflow while it answers. Where it stops, say so once, and let the work go on."""

    @wraps(method)
    def write(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        record: Record = getattr(self, "parent", self)
        if record.outage:
            return
        try:
            with answered(record.tracker.uri):
                method(self, *args, **kwargs)
        except Unreachable as error:
            record.outage = str(error)
            log.warning("%s; the work goes on, and the next run records what is missing", error)

    return write


@dataclass
class Record:
    """The parent run of a pipeline.

    Attributes:
        outage: why MLflow is not written to any more; empty while it answers.
    """

    workspace: Workspace
    source: Source
    tracker: Tracker = field(init=False)
    run_id: str = ""
    outage: str = ""

    @classmethod
    @contextmanager
    def open(cls, workspace: Workspace, stages: list[Stage]) -> Iterator[Record]:
        """Start the parent run, or go on with the one that an earlier stage of the same `dvc repro` started.

        Raises:
            UserError: MLflow does not answer and `tracking.when_down` is `stop`: at once, or, if it went away in the
                middle, at the end.
            UserError: the registry holds something else under the name of the Actor.
        """
        record, patient = cls(workspace, source_of(workspace.root)), workspace.params.tracking.when_down == "continue"
        try:
            record._start([stage.name for stage in stages])
        except Unreachable as error:
            if not patient:
                raise UserError(f"{error}; or set `tracking.when_down: continue` to train unrecorded") from None
            record.outage = str(error)
            log.warning("%s; nothing is recorded or registered now, but the next run that reaches it does so", error)
        status: Status = "FAILED"
        try:
            yield record
            status = "FINISHED"
        except INTERRUPTS:
            status = "KILLED"
            raise
        finally:
            record._finish(status)
        # A stage of `dvc repro` that is done is done: DVC must record it, and the warning has been given.
        if record.outage and not patient and not versioning.inside_stage():
            raise UserError(
                f"{record.outage}; all stages are done and in dvc.lock, but not all is recorded or registered: "
                "run again when it answers"
            )

    def _start(self, stages: list[str]) -> None:
        self.tracker = tracker = Tracker(project_folder(self.workspace.root))
        with answered(tracker.uri):
            if "register" in stages:
                registry.check_names(self.workspace.params.register_, tracker.uri)
            tracker.close_dead_runs()
            name_of_session = session()
            known = tracker.find_run(SESSION, name_of_session) if versioning.inside_stage() else None
            if known:
                self.run_id = known
                tracker.resume(known)
                return
            name = "dvc repro" if versioning.inside_stage() else str(flow_run.name)
            tags = {SESSION: name_of_session} | origin_tags(self.source)
            self.run_id = tracker.start_pipeline(flatten(self.workspace.params), tags, name)

    @unless_down
    def _finish(self, status: Status) -> None:
        self.tracker.set_tags(self.run_id, dvc_lock(self.workspace.root))
        self.tracker.finish(self.run_id, status)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[StageRecord]:
        """A child run for a stage, closed with how the stage ended."""
        record = StageRecord(self, stage)
        record.start()
        status: Status = "FAILED"
        try:
            yield record
            status = "FINISHED"
        except INTERRUPTS:
            status = "KILLED"
            raise
        finally:
            record.close(status)

    def origin(self) -> dict[str, str]:
        """Where the record is and what the run came from, for whoever comes from Prefect."""
        if self.outage:
            return {"MLflow": f"not recorded: {self.outage}"} | origin_tags(self.source) | dvc_lock(self.workspace.root)
        experiment = self.tracker.experiment_id
        return {
            "MLflow run": self.tracker.link(self.run_id),
            "MLflow experiment": experiment,
            **origin_tags(self.source),
            **dvc_lock(self.workspace.root),
        }


@dataclass
class StageRecord:
    """The child run of a stage."""

    parent: Record
    stage: Stage
    run_id: str = ""
    settled: Settled | None = None
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _written: float = field(default_factory=time.monotonic)

    @unless_down
    def start(self) -> None:
        tracker, params = self.parent.tracker, self.parent.workspace.params
        self.run_id = tracker.start_stage(self.parent.run_id, self.stage.name, origin_tags(self.parent.source))
        read = tuple(f"{section}." for section in self.stage.sections)
        tracker.log_params(self.run_id, {k: v for k, v in flatten(params).items() if f"{k}.".startswith(read)})

    @unless_down
    def close(self, status: Status) -> None:
        self.parent.tracker.finish(self.run_id, status)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Measure the machine (CPU, memory, disk, GPU) while a stage's work is done."""
        if self.parent.outage:
            yield
            return
        with self.parent.tracker.system_metrics(self.run_id):
            yield

    def watch(self, row: dict[str, Any], total: int, progress: Progress) -> None:
        """Show a step, and log it, together with others, every few seconds."""
        progress(row["step"], total, row["values"])
        if row["values"]:
            self._waiting.append(row)
        if self._waiting and time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self._write()
            self._waiting, self._written = [], time.monotonic()

    @unless_down
    def _write(self) -> None:
        self.parent.tracker.log_series(self.run_id, self._waiting)

    @unless_down
    def iteration(self, entry: Entry) -> None:
        """Log a PPO iteration, fresh or cached, with its own time and how long its phases took."""
        rows = entry.manifest["series"]
        perf = {f"perf/{name}": value for name, value in entry.manifest["perf"].items()}
        self.parent.tracker.log_series(self.run_id, [row | {"values": row["values"] | perf} for row in rows])

    @unless_down
    def finished(self, entry: Entry, cached: bool) -> None:
        """Log all of a stage's result: its curve, final numbers, inputs by digest, samples."""
        tracker, manifest, root = self.parent.tracker, entry.manifest, self.parent.workspace.root
        tracker.log_series(self.run_id, manifest["series"])
        in_curve = {name for row in manifest["series"] for name in row["values"]}
        named = {name if "/" in name else f"{self.stage.name}/{name}": v for name, v in manifest["metrics"].items()}
        perf = {f"perf/{name}": value for name, value in manifest["perf"].items()}
        tracker.log_metrics(self.run_id, {k: v for k, v in named.items() if k not in in_curve} | perf)
        tracker.log_metrics(self.parent.run_id, named)  # so that pipelines can be compared by their parent runs
        tags = {"rlhf.key": manifest["key"], "rlhf.digest": entry.digest, "rlhf.cached": str(cached).lower()}
        inputs = manifest["identity"]["inputs"]
        tracker.set_tags(self.run_id, tags | {f"{registry.INPUT}{path}": digest for path, digest in inputs.items()})
        for path, digest in inputs.items():
            if path.startswith("data"):
                tracker.log_dataset(self.run_id, path, digest, self.stage.name, root / path)
        samples = self.stage.outs.get("samples.jsonl")
        if samples:
            rows = [json.loads(line) for line in (root / samples).read_text(encoding="utf-8").splitlines()]
            tracker.log_table(self.run_id, "samples.json", list(rows[0]), [list(row.values()) for row in rows])
        tracker.log_artifact(self.run_id, root / self.stage.metrics)

    @unless_down
    def settle(self) -> None:
        """Make sure that the registry knows the Actor, and move `@champion` if the gate lets it.

        Called when the stage is in dvc.lock, so that the version's tag names a lock file that exists.
        """
        workspace, inputs = self.parent.workspace, STAGES["register"].inputs
        actor, reward = (workspace.root / path for path in (inputs["actor"], STAGES["ppo"].inputs["reward"]))
        read = {path for stage in STAGES.values() for path in stage.inputs.values()}
        digests = {f"{registry.INPUT}{path}": digest_path(workspace.root / path) for path in sorted(read)}
        document, example = self._keep_origin(), self._example()
        context = TrackingContext(
            uri=self.parent.tracker.uri,
            run_id=self.run_id,
            actor_digest=digest_path(actor),
            reward_digest=digest_path(reward),
            lock=workspace.store.root / "locks" / "registry",
            tags=origin_tags(self.parent.source) | dvc_lock(workspace.root) | digests,
            example=example,
            facts=lambda: gather_facts(workspace, document, example),
        )
        self.settled = registry.settle(
            register_=workspace.params.register_,
            generation=workspace.params.generation,
            actor=actor,
            reward=reward,
            evaluation=workspace.root / inputs["evaluation"],
            tracking=context,
        )

    def _keep_origin(self) -> Document:
        """The tree down to the raw data, with the run that made each stage, where the version will be looked for."""
        root, tracker, source = self.parent.workspace.root, self.parent.tracker, self.parent.source
        document = lineage_here(self.parent.workspace, source)
        document["runs"] = {"MLflow": self.parent.run_id, "Prefect": str(flow_run.id)}
        tell_makers(tracker, document)
        lock = root / LOCK
        log_origin(tracker, self.run_id, Origin(document, source.patch, lock.read_bytes() if lock.exists() else b""))
        return document

    def _example(self) -> str:
        path = self.parent.workspace.root / STAGES["evaluate"].outs["samples.jsonl"]
        with path.open(encoding="utf-8") as file:
            return json.loads(file.readline())["prompt"]


def origin_tags(source: Source) -> dict[str, str]:
    """What a run came from: git commit and whether it was dirty, the Prefect flow run."""
    tags: dict[str, str] = {}
    if source.commit:
        tags["mlflow.source.git.commit"] = source.commit
        tags["rlhf.git_dirty"] = str(source.dirty).lower()
    if flow_run.id:
        tags["prefect.flow_run_id"] = str(flow_run.id)
        tags["prefect.flow_run_name"] = str(flow_run.name)
    return tags


def dvc_lock(root: Path) -> dict[str, str]:
    """The digest of dvc.lock as a tag, where there is one."""
    path = root / "dvc.lock"
    return {"rlhf.dvc_lock": digest_file(path)} if path.exists() else {}

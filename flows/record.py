"""A run's record in MLflow, written as the stages go: a parent run, a child a stage, live while it trains.

What is logged live and what is replayed from a manifest afterwards are the same points, so cached and fresh stages end
up with the same curves.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run

from flows.console import Bar
from flows.server import session
from rlhf_tasks import registry, versioning
from rlhf_tasks.config import flatten
from rlhf_tasks.engine import Workspace
from rlhf_tasks.registry import Settled, TrackingContext
from rlhf_tasks.stages import STAGES, Stage
from rlhf_tasks.store import Entry, digest_file, digest_path
from rlhf_tasks.tracking import Status, Tracker

log = logging.getLogger(__name__)

#: what ends a run from outside: Ctrl-C, and SIGTERM as Prefect raises it
INTERRUPTS = (KeyboardInterrupt, TerminationSignal)

SESSION = "rlhf.session"
SECONDS_BETWEEN_WRITES = 5.0


@dataclass
class Record:
    """The parent run of a pipeline."""

    workspace: Workspace
    tracker: Tracker
    run_id: str
    lineage: dict[str, str]

    @classmethod
    @contextmanager
    def open(cls, workspace: Workspace) -> Iterator[Record]:
        """Start the parent run, or go on with the one that an earlier stage of the same `dvc repro` started."""
        tracker, name_of_session = Tracker(workspace.root), session()
        tracker.close_dead_runs()
        origin = lineage(workspace.root)  # once: the run itself changes dvc.lock, and with it whether git is clean
        run_id = tracker.find_run(SESSION, name_of_session) if versioning.inside_stage() else None
        if run_id:
            tracker.resume(run_id)
        else:
            name = "dvc repro" if versioning.inside_stage() else str(flow_run.name)
            tags = {SESSION: name_of_session} | origin
            run_id = tracker.start_pipeline(flatten(workspace.params), tags, name)
        status: Status = "FAILED"
        try:
            yield cls(workspace, tracker, run_id, origin)
            status = "FINISHED"
        except INTERRUPTS:
            status = "KILLED"
            raise
        finally:
            tracker.set_tags(run_id, dvc_lock(workspace.root))
            tracker.finish(run_id, status)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[StageRecord]:
        """A child run for a stage, closed with how the stage ended."""
        run_id = self.tracker.start_stage(self.run_id, stage.name, self.lineage)
        record = StageRecord(self, stage, run_id)
        status: Status = "FAILED"
        try:
            yield record
            status = "FINISHED"
        except INTERRUPTS:
            status = "KILLED"
            raise
        finally:
            self.tracker.finish(run_id, status)


@dataclass
class StageRecord:
    """The child run of a stage."""

    parent: Record
    stage: Stage
    run_id: str
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _written: float = field(default_factory=time.monotonic)

    def watch(self, row: dict[str, Any], total: int, bar: Bar | None) -> None:
        """Show a step, and log it, together with others, every few seconds."""
        if bar:
            bar(row["step"], total, row["values"])
        if row["values"]:
            self._waiting.append(row)
        if self._waiting and time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.parent.tracker.log_series(self.run_id, self._waiting)
            self._waiting, self._written = [], time.monotonic()

    def iteration(self, entry: Entry) -> None:
        """Log a PPO iteration, fresh or cached, with its own time and how long its phases took."""
        rows = entry.manifest["series"]
        perf = {f"perf/{name}": value for name, value in entry.manifest["perf"].items()}
        self.parent.tracker.log_series(self.run_id, [row | {"values": row["values"] | perf} for row in rows])

    def finished(self, entry: Entry, cached: bool) -> None:
        """Log all of a stage's result: its curve, final numbers, inputs by digest, samples."""
        tracker, manifest, root = self.parent.tracker, entry.manifest, self.parent.workspace.root
        tracker.log_series(self.run_id, manifest["series"])
        in_curve = {name for row in manifest["series"] for name in row["values"]}
        finals = {
            name if "/" in name else f"{self.stage.name}/{name}": value
            for name, value in manifest["metrics"].items()
            if "/" not in name or name not in in_curve
        }
        tracker.log_metrics(self.run_id, finals | {f"perf/{k}": v for k, v in manifest["perf"].items()})
        tags = {"rlhf.key": manifest["key"], "rlhf.digest": entry.digest, "rlhf.cached": str(cached).lower()}
        inputs = manifest["identity"]["inputs"]
        tracker.set_tags(self.run_id, tags | {f"rlhf.input.{path}": digest for path, digest in inputs.items()})
        for path, digest in inputs.items():
            if path.startswith("data"):
                tracker.log_dataset(self.run_id, path, digest, self.stage.name, root / path)
        samples = self.stage.outs.get("samples.jsonl")
        if samples:
            rows = [json.loads(line) for line in (root / samples).read_text(encoding="utf-8").splitlines()]
            tracker.log_table(self.run_id, "samples.json", list(rows[0]), [list(row.values()) for row in rows])
        tracker.log_artifact(self.run_id, root / self.stage.metrics)

    def settle(self) -> Settled:
        """Make sure that the registry knows the Actor, and move `@champion` if the gate lets it.

        Called when the stage is in dvc.lock, so that the version's tag names a lock file that exists.
        """
        workspace, inputs = self.parent.workspace, STAGES["register"].inputs
        actor = workspace.root / inputs["actor"]
        read = {path for stage in STAGES.values() for path in stage.inputs.values()}
        digests = {f"rlhf.input.{path}": digest_path(workspace.root / path) for path in sorted(read)}
        context = TrackingContext(
            uri=self.parent.tracker.uri,
            run_id=self.run_id,
            actor_digest=digest_path(actor),
            lock=workspace.store.root / "locks" / "registry",
            tags=self.parent.lineage | dvc_lock(workspace.root) | digests,
            example=self._example(),
        )
        return registry.settle(
            register_=workspace.params.register_,
            generation=workspace.params.generation,
            actor=actor,
            evaluation=workspace.root / inputs["evaluation"],
            tracking=context,
        )

    def _example(self) -> str:
        path = self.parent.workspace.root / STAGES["evaluate"].outs["samples.jsonl"]
        with path.open(encoding="utf-8") as file:
            return json.loads(file.readline())["prompt"]


def lineage(root: Path) -> dict[str, str]:
    """What a run came from: git commit and whether it was dirty, the Prefect flow run."""
    tags: dict[str, str] = {}
    commit = _git(root, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["rlhf.git_dirty"] = str(bool(_git(root, "status", "--porcelain"))).lower()
    if flow_run.id:
        tags["prefect.flow_run_id"] = str(flow_run.id)
        tags["prefect.flow_run_name"] = str(flow_run.name)
    return tags


def dvc_lock(root: Path) -> dict[str, str]:
    """The digest of dvc.lock as a tag, where there is one."""
    path = root / "dvc.lock"
    return {"rlhf.dvc_lock": digest_file(path)} if path.exists() else {}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""

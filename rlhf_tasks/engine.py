"""Work: whether a stage's result is there, and making it where it is not.

Both doors come through here. Inputs are read from the workspace (`data/prepared`, `checkpoints/...`), results go into
the store under their key (keying.py), and from there back into the workspace. Whoever runs a stage, its result is the
same files.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_tasks.keying import Job, differing, lineage_text, nothing_changes
from rlhf_tasks.stages import LINEAGE, STAGES, Stage
from rlhf_tasks.store import Entry, digest_path, place
from rlhf_tasks.workspace import Workspace

log = logging.getLogger(__name__)

#: told of every step of a stage: a row of its series, and how many steps there are
Watch = Callable[[dict[str, Any], int], None]


def forget(workspace: Workspace, job: Job) -> None:
    """Drop what the store has of a job, finished, adopted for it or begun: it will be done from its start."""
    workspace.store.discard(job.key)
    while entry := find(workspace, job):
        workspace.store.discard(entry.folder.name)
    workspace.store.forget_partial(job.key)


def perform(workspace: Workspace, job: Job, watch: Watch) -> Entry:
    """Do a stage's work and store it, unless another process has just done so."""
    stage, params, store = STAGES[job.stage], workspace.params, workspace.store
    with store.lock(job.key):
        entry = find(workspace, job)
        if entry and entry.has_payload():
            return entry
        arguments = {("register_" if n == "register" else n): params.section(n) for n in stage.sections}
        arguments |= {name: workspace.root / path for name, path in stage.inputs.items()}
        partial, started = store.partial(job.key), time.time()
        with (
            nothing_changes(workspace, stage, job) as check,
            store.writing(job.key) as out,
            Recorder(watch, partial / "series.jsonl") as recorder,
        ):
            run = importlib.import_module(stage.module).run
            offered = {"partial": partial, "progress": recorder}
            wanted = {name: value for name, value in offered.items() if name in inspect.signature(run).parameters}
            metrics = run(**arguments, **wanted, out=out)
            save_curve(stage, out, recorder.series)
            save_lineage(job, out)
            perf = {"seconds": time.time() - started}
            check()
            return store.commit(job.key, out, job.identity, metrics=metrics, series=recorder.series, perf=perf)


class Recorder:
    """A stage's progress: shown at once, and kept as its series, also over a kill and a second start."""

    def __init__(self, watch: Watch, path: Path) -> None:
        self._watch, self._path = watch, path
        self.series: list[dict[str, Any]] = []

    def __enter__(self) -> Recorder:
        if self._path.is_dir():
            shutil.rmtree(self._path)
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        try:
            for line in lines:
                row = json.loads(line)
                if not all(isinstance(n, int | float) for n in (row["step"], row["time_ms"], *row["values"].values())):
                    raise ValueError("no numbers")
                self._keep({name: row[name] for name in ("step", "time_ms", "values")})
        # a power cut leaves zeros, and others on the same store anything: the steps go on, their record has a gap
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            log.warning("%s: damaged; what follows of it is lost, the training is not", self._path)
        rewritten = self._path.with_suffix(".new")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in self.series))
        rewritten.replace(self._path)
        self._file = self._path.open("a")
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __call__(self, *, done: int, total: int, **values: float) -> None:
        row = {"step": done, "time_ms": int(time.time() * 1000), "values": values}
        if values:
            self._keep(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._watch(row, total)

    def _keep(self, row: dict[str, Any]) -> None:
        while self.series and self.series[-1]["step"] >= row["step"]:  # steps that are done again after a kill
            self.series.pop()
        self.series.append(row)


def save_curve(stage: Stage, out: Path, series: list[dict[str, Any]]) -> None:
    """The series as `curve.csv` for DVC's plots: no times, only what is a function of the inputs."""
    if "curve.csv" not in stage.outs:
        return
    with (out / "curve.csv").open("w", newline="") as file:
        columns = dict.fromkeys(name for row in series for name in row["values"])  # a warm-up row has fewer
        writer = csv.DictWriter(file, fieldnames=["step", *columns])
        writer.writeheader()
        writer.writerows({"step": row["step"], **row["values"]} for row in series)


def save_lineage(job: Job, out: Path) -> None:
    """What the result depends on, beside it: so that git and DVC alone can tell."""
    (out / LINEAGE).write_text(lineage_text(job.identity))


# Workspace -----------------------------------------------------------------------------------------------------------


def export(workspace: Workspace, entry: Entry) -> None:
    """Put a stage's result into the workspace, where it is not there already.

    Raises:
        DamagedEntry: the payload is not what was written.
    """
    stage = STAGES[entry.manifest["identity"]["stage"]]
    stale = {part: path for part, path in stage.outs.items() if not _holds(workspace.root / path, entry.parts[part])}
    if stale:
        entry.verify()
    for part, path in stale.items():
        place(entry.payload / part, workspace.root / path)


def exported(workspace: Workspace, entry: Entry) -> bool:
    """Whether the workspace holds the result already."""
    stage = STAGES[entry.manifest["identity"]["stage"]]
    return all(_holds(workspace.root / path, entry.parts[part]) for part, path in stage.outs.items())


def find(workspace: Workspace, job: Job) -> Entry | None:
    """A job's result in the store: made of this very key, or adopted for it. Its payload may have been pruned."""
    entry = workspace.store.find(job.key)
    if entry is None:
        entry = next((entry for entry in workspace.store.entries() if entry.answers == job.key), None)
    if entry and entry.parts.keys() != STAGES[job.stage].outs.keys():
        log.warning(
            "%s: holds %s, not what the stage makes; ignored", entry.folder, ", ".join(entry.parts) or "nothing"
        )
        return None
    return entry


def adoptable(workspace: Workspace, job: Job) -> bool:
    """Whether the workspace's outs of a stage, if DVC vouches for them, may be taken for a job's result.

    DVC knows files and params.yaml, not library versions or instruction sets. What it vouches for may have been made on
    another machine, so of what they say of themselves only the environment may differ. Where the store holds these very
    outs under another key, they were made here, of something else than is asked for now: they are not adopted.
    """
    stage = STAGES[job.stage]
    try:
        present = {part: digest_path(workspace.root / path) for part, path in stage.outs.items()}
        made_of = _own_identity(workspace, stage)
    except (FileNotFoundError, ValueError):
        return False
    if not isinstance(made_of, dict) or made_of | {"environment": {}} != job.identity | {"environment": {}}:
        return False
    known = (entry for entry in workspace.store.entries() if entry.manifest["identity"]["stage"] == stage.name)
    return not any(entry.parts == present for entry in known)


def adopt(workspace: Workspace, job: Job) -> Entry | None:
    """Make the workspace's outs of a stage, which DVC vouches for, an entry of the store, as in a clone that pulled.

    Its key is that of what it was made of, which may be another machine's; it answers this job beside it, and says so.
    """
    stage, store = STAGES[job.stage], workspace.store
    if not adoptable(workspace, job):
        return None
    maker = Job.of(_own_identity(workspace, stage))
    with store.lock(maker.key), store.writing(maker.key) as out:
        for part, path in stage.outs.items():
            place(workspace.root / path, out / part)
        document = json.loads((out / "metrics.json").read_text())
        metrics = {k: v for k, v in document.items() if isinstance(v, float | int) and not isinstance(v, bool)}
        differs = sorted(differing(maker.identity["environment"], job.identity["environment"]))
        elsewhere = f", made elsewhere (other {', '.join(differs)})" if differs else ""
        log.info("%s: adopted from the workspace, which dvc.lock vouches for%s", stage.name, elsewhere)
        return store.commit(
            maker.key, out, maker.identity, metrics=metrics, series=_load_curve(out), perf={}, adopted=job.key
        )


def _own_identity(workspace: Workspace, stage: Stage) -> Any:
    """What the workspace's outs of a stage say that they were made of."""
    return json.loads((workspace.root / stage.lineage).read_text())


def _load_curve(out: Path) -> list[dict[str, Any]]:
    """The series that `curve.csv` was made of; its times are not in it, so every row is of now."""
    path, now = out / "curve.csv", int(time.time() * 1000)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [{"step": int(row.pop("step")), "time_ms": now, "values": row} for row in rows]


def _holds(path: Path, digest: str) -> bool:
    try:
        return digest_path(path) == digest
    except FileNotFoundError:
        return False

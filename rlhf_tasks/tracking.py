"""MLflow's record of what ran: a parent run a pipeline, a child run a stage, written from the stages' manifests.

Nothing is logged that a manifest does not hold, so fresh and cached work look alike, and writing the same again changes
nothing. Run ids are passed explicitly: MLflow's active run belongs to a thread, and Prefect uses many.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
)
from mlflow.utils.validation import (
    MAX_DATASET_DIGEST_SIZE,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
)
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from rlhf_tasks.errors import UserError, without_secrets
from rlhf_tasks.processes import process_started

log = logging.getLogger(__name__)

T = TypeVar("T")
Status = Literal["FINISHED", "FAILED", "KILLED"]

EXPERIMENT = "rlhf"
STAGE, HOST, PID, PID_STARTED = "rlhf.stage", "rlhf.host", "rlhf.pid", "rlhf.pid_started"


class Unreachable(UserError):
    """The tracking server does not answer, or refuses to."""


#: what MLflow's client says when the fault is the server's, not the call's
_OUTAGES = (
    *("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND"),
)


@contextlib.contextmanager
def answered(uri: str, opening: bool = False) -> Iterator[None]:
    """Turn the many ways of not being answered by a tracking server into one.

    Args:
        opening: whether this is the first contact, in which the address itself may be at fault.

    Raises:
        Unreachable: with the server's address and the reason, without what is secret in either.
    """
    try:
        yield
    except MlflowException as error:
        if error.error_code not in _OUTAGES and not opening:
            raise
        problem = str(error)
    except ImportError as error:
        if not opening:
            raise
        problem = f"a driver is missing: {error}"
    except (RequestException, SQLAlchemyError) as error:
        problem = str(error)
    else:
        return
    short = next((words for pattern, words in _REASONS.items() if re.search(pattern, problem)), "")
    reason = short or without_secrets(" ".join(problem.split()))[:200]
    raise Unreachable(
        f"MLflow at {without_secrets(uri)} does not answer ({reason}); start it, or correct MLFLOW_TRACKING_URI"
    )


_REASONS = {
    "Connection refused": "connection refused",
    "Name or service not known|Temporary failure in name resolution|Failed to resolve": "unknown host",
    "timed out|Timeout": "timed out",
    r"error code 401|Unauthorized": "it wants MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "filesystem tracking backend|unsupported URI": "expected http://, https://, or a database such as sqlite:///mlflow.db",
    "error code 404": "something else listens there: it knows no MLflow API",
    "disk is full|No space left": "its disk is full",
}


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI`, else SQLite in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _default_uri(root)


def experiment_name() -> str:
    """`MLFLOW_EXPERIMENT_NAME`, else `rlhf`."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def is_recorded(root: Path) -> bool:
    """Whether there is a tracking server to ask, or a database file: a Tracker would make that."""
    scheme, _, path = tracking_uri(root).partition(":///")
    return scheme != "sqlite" or Path(path).exists()


class Tracker:
    """One experiment on one tracking server, for any number of threads.

    Opening it makes the database and the experiment where they are missing. With the default URI artifacts lie under
    `{root}/mlartifacts`; any other server decides that itself.

    Raises:
        UserError: the experiment was deleted in MLflow.
        Unreachable: the server does not answer.
    """

    def __init__(self, root: Path) -> None:
        self.uri = tracking_uri(root)
        if self.uri.startswith("sqlite:///"):
            _check_writable(self.uri, Path(self.uri.removeprefix("sqlite:///")).parent)
        with answered(self.uri, opening=True):
            self.client = _connect(self.uri, root)
            location = (root.resolve() / "mlartifacts").as_uri() if self.uri == _default_uri(root) else None
            self.experiment_id = _open_experiment(self.client, experiment_name(), location)

    def link(self, run_id: str) -> str:
        """The run's page on a tracking server; of a database, only its id."""
        if not self.uri.startswith("http"):
            return run_id
        return f"{without_secrets(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"

    @contextlib.contextmanager
    def system_metrics(self, run_id: str) -> Iterator[None]:
        """Log CPU, memory, disk, network and GPU as `system/...` of a run meanwhile.

        As everywhere in MLflow, `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false` switches it off, and
        `MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL` (seconds) sets its pace.
        """
        if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.defined and not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
            yield
            return
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def start_pipeline(self, params: Mapping[str, Any], tags: Mapping[str, str], name: str) -> str:
        """Open a parent run, owned by this process, with the flattened parameters. Returns its id."""
        run_id = self._start(name, tags, None)
        self.log_params(run_id, params)
        return run_id

    def start_stage(
        self, parent_id: str, stage: str, tags: Mapping[str, str] | None = None, start_ms: int | None = None
    ) -> str:
        """Open a stage's run under a pipeline's. Returns its id.

        Args:
            start_ms: when the work began, in milliseconds since 1970, where that is not now (a stage that was cached).
        """
        return self._start(stage, {MLFLOW_PARENT_RUN_ID: parent_id, STAGE: stage} | dict(tags or {}), start_ms)

    def find_run(self, tag: str, value: str) -> str | None:
        """The id of the experiment's newest run with a tag of this value."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{tag}` = '{value}'", max_results=1)
        return found[0].info.run_id if found else None

    def maker_of(self, key: str) -> Run | None:
        """The run of the stage that made the result of a key; if it is not known, one that found it made."""
        for cached in ("false", "true"):
            query = f"tags.`rlhf.key` = '{key}' and tags.`rlhf.cached` = '{cached}'"
            if found := self.client.search_runs([self.experiment_id], query, max_results=1):
                return found[0]
        return None

    def has_run(self, run_id: str) -> bool:
        """Whether the server knows a run; one that was deleted and can be restored counts."""
        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise
        return True

    def resume(self, run_id: str) -> None:
        """Go on with a run that another process closed: it is RUNNING again, and owned by this process."""
        self.client.update_run(run_id, status="RUNNING")
        self.set_tags(run_id, _owner())

    def finish(self, run_id: str, status: Status, end_ms: int | None = None) -> None:
        """Close a run, now or at `end_ms` (milliseconds since 1970)."""
        self.client.set_terminated(run_id, status, end_ms)

    def close_dead_runs(self) -> list[str]:
        """Mark KILLED what this host's dead processes left RUNNING in this experiment, parents and stages alike.

        A process is dead when its pid is gone, is a zombie, or belongs to a younger process. Returns the runs' ids.
        """
        running = self._search(f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'")
        dead = [run.info.run_id for run in running if not _owner_lives(run)]
        for run_id in dead:
            self.finish(run_id, "KILLED")
            log.info("MLflow run %s was left by a process that is gone: marked KILLED", run_id)
        return dead

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log flattened parameters, values cut to what MLflow takes.

        MLflow forbids changing one within a run: the first value stays, and a warning names the key.
        """
        known = self.client.get_run(run_id).data.params
        wanted = {_clean(name): str(value)[:MAX_PARAM_VAL_LENGTH] for name, value in params.items()}
        if changed := sorted(name for name in wanted.keys() & known.keys() if wanted[name] != known[name]):
            log.warning("MLflow run %s keeps its first value of: %s", run_id, ", ".join(changed))
        new = [Param(name, value) for name, value in wanted.items() if name not in known]
        for part in _chunks(new, MAX_PARAMS_TAGS_PER_BATCH):
            self.client.log_batch(run_id, params=part)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""
        for part in _chunks(
            [RunTag(_clean(name), str(value)) for name, value in tags.items()], MAX_PARAMS_TAGS_PER_BATCH
        ):
            self.client.log_batch(run_id, tags=part)

    def log_series(self, run_id: str, series: Iterable[Mapping[str, Any]]) -> None:
        """Log a manifest's series: rows `{"step": int, "time_ms": int, "values": {name: float}}`.

        A row that is already there, from live logging or an earlier replay, changes nothing. NaN and infinity are left
        out, and a warning says how many.
        """
        points = [
            Metric(_clean(name), float(value), int(row["time_ms"]), int(row["step"]))
            for row in series
            for name, value in row["values"].items()
        ]
        self._log_points(run_id, points)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log a stage's final numbers, unless the run has them at this step already."""
        known, now = self.client.get_run(run_id).data.metrics, _now_ms()
        points = [
            Metric(name, float(value), now, step)
            for name, value in ((_clean(name), value) for name, value in metrics.items())
            if name not in known or not self._has_point(run_id, name, value, step)
        ]
        self._log_points(run_id, points)

    def log_dataset(self, run_id: str, name: str, digest: str, context: str, path: Path) -> None:
        """Record a data set that the run read, by our digest; the data is not opened.

        Args:
            digest: any length; MLflow shows its first 36 characters, and the profile holds all of it.
            context: what it was read for, such as `training`.
        """
        dataset = Dataset(
            name=name,
            digest=digest[:MAX_DATASET_DIGEST_SIZE],
            source_type="local",
            source=json.dumps({"uri": str(path)}),
            profile=json.dumps({"digest": digest}),
        )
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])])

    def log_table(self, run_id: str, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, such as `samples.json`, which MLflow's UI shows and compares between runs.

        `MlflowClient.log_table` appends to a table of the same name; this one replaces it.
        """
        self.client.log_dict(run_id, {"columns": list(columns), "data": [list(row) for row in rows]}, name)
        tables = json.loads(self.client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if (entry := {"path": name, "type": "table"}) not in tables:
            self.set_tags(run_id, {MLFLOW_LOGGED_ARTIFACTS: json.dumps([*tables, entry])})

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder's content into the run's artifacts, below `folder` if given."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), folder)
        else:
            self.client.log_artifact(run_id, str(path), folder)

    def fetch_artifacts(self, run_id: str, folder: str, target: Path) -> Path:
        """Copy a folder of a run's artifacts below `target`, and say where it is.

        Raises:
            FileNotFoundError: there is no such run or folder.
            Unreachable: the server, or where it keeps artifacts, does not answer.
        """
        with answered(self.uri):
            if not self.has_run(run_id):
                raise FileNotFoundError(f"MLflow run {run_id}: not found")
        try:
            there = self.client.list_artifacts(run_id, folder)
            fetched = Path(self.client.download_artifacts(run_id, folder, str(target))) if there else None
        except Exception as error:  # every kind of artifact store has its own
            reason = without_secrets(" ".join(str(error).split()))[:200]
            raise Unreachable(
                f"MLflow run {run_id}: its artifacts cannot be read ({reason or type(error).__name__}); make the place "
                "that the server keeps them in reachable, then try again"
            ) from None
        if fetched is None:
            raise FileNotFoundError(f"MLflow run {run_id}: no artifacts {folder}")
        return fetched

    def set_note(self, run_id: str, markdown: str) -> None:
        """The description that MLflow's UI shows on top of the run."""
        self.set_tags(run_id, {MLFLOW_RUN_NOTE: markdown})

    def _start(self, name: str, tags: Mapping[str, str], start_ms: int | None) -> str:
        tags = {key: str(value) for key, value in tags.items()} | _owner()
        run = self.client.create_run(self.experiment_id, start_time=start_ms, tags=tags, run_name=name)
        return str(run.info.run_id)

    def _search(self, query: str) -> list[Run]:
        found: list[Run] = []
        token: str | None = ""
        while token is not None:
            page = self.client.search_runs([self.experiment_id], query, page_token=token or None)
            found.extend(page)
            token = page.token or None
        return found

    def _has_point(self, run_id: str, name: str, value: float, step: int) -> bool:
        return any(p.step == step and p.value == value for p in self.client.get_metric_history(run_id, name))

    def _log_points(self, run_id: str, points: list[Metric]) -> None:
        finite = [point for point in points if math.isfinite(point.value)]
        if len(finite) < len(points):
            names = sorted({point.key for point in points if not math.isfinite(point.value)})
            dropped = len(points) - len(finite)
            log.warning("%d values that are no finite numbers were not logged to MLflow: %s", dropped, ", ".join(names))
        for part in _chunks(finite, MAX_METRICS_PER_BATCH):
            self.client.log_batch(run_id, metrics=part)


def _check_writable(uri: str, folder: Path) -> None:
    """Whether a database can be made in a folder: MLflow would find out by retrying for minutes."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or "no reason given"
        raise Unreachable(
            f"MLflow at {uri}: {folder} cannot be written to ({reason}); correct MLFLOW_TRACKING_URI"
        ) from None


def _default_uri(root: Path) -> str:
    return f"sqlite:///{root.resolve() / 'mlflow.db'}"


def _connect(uri: str, root: Path) -> MlflowClient:
    """A client; the project's database is made first if there is none.

    MLflow makes its tables in 50 steps, takes no lock, and cannot go on with a database whose making was cut short. So
    one process makes it, under another name, and renames it.
    """
    database = root.resolve() / "mlflow.db"
    lock = root / ".rlhf" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file, _quiet("mlflow.store.db.utils", "alembic"):
        fcntl.flock(file, fcntl.LOCK_EX)
        if uri == _default_uri(root) and not database.exists():
            unfinished = lock.with_name("mlflow.db.new")
            for stale in lock.parent.glob("mlflow.db.new*"):  # its journal too
                stale.unlink()
            MlflowClient(tracking_uri=f"sqlite:///{unfinished.resolve()}")
            unfinished.replace(database)
        return MlflowClient(tracking_uri=uri)


def _open_experiment(client: MlflowClient, name: str, location: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Another process may be doing the same: then this fails, and its experiment is there.
        with contextlib.suppress(MlflowException):
            return client.create_experiment(name, artifact_location=location)
        experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_location=location)
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment `{name}`: found it deleted, expected it active or absent; restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, or set MLFLOW_EXPERIMENT_NAME"
        )
    return experiment.experiment_id


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Hide what creating a database says about its tables, and nothing above INFO."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _owner() -> dict[str, str]:
    pid = os.getpid()
    return {HOST: socket.gethostname(), PID: str(pid), PID_STARTED: process_started(pid) or ""}


def _owner_lives(run: Run) -> bool:
    """Whether the process that a run's tags name is still there; a run without an owner is left alone."""
    pid = run.data.tags.get(PID, "")
    return not pid.isdigit() or process_started(int(pid)) == run.data.tags.get(PID_STARTED)


def _clean(name: str) -> str:
    """A name that MLflow takes: letters, digits, `_`, `-`, `.`, `:`, `/` and blanks."""
    return re.sub(r"[^\w\-.:/ ]", "_", name)


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

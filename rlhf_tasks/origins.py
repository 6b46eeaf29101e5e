"""The origin of a registered version, kept as artifacts of the MLflow run that registered it.

lineage/lineage.json   every stage down to the raw data (rlhf_tasks/lineage.py)
lineage/source.patch   what the checkout changed of its git commit, untracked files included
lineage/dvc.lock       DVC's digests of every stage's deps and outs
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_tasks.errors import UserError
from rlhf_tasks.lineage import Document, checked_document, instant
from rlhf_tasks.registry import find_registered, registered_versions
from rlhf_tasks.source import LOCK
from rlhf_tasks.tracking import Tracker, answered, is_recorded

log = logging.getLogger(__name__)

FOLDER, LINEAGE, PATCH = "lineage", "lineage.json", "source.patch"


@dataclass(frozen=True)
class Origin:
    """What a version came from.

    Attributes:
        document: its lineage.
        patch: what was changed of the document's git commit.
        lock: dvc.lock.
    """

    document: Document
    patch: bytes
    lock: bytes


def log_origin(tracker: Tracker, run_id: str, origin: Origin) -> None:
    """Keep an origin with a run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / LINEAGE).write_text(json.dumps(origin.document, indent=1, sort_keys=True))
        (folder / PATCH).write_bytes(origin.patch)
        (folder / LOCK).write_bytes(origin.lock)
        tracker.log_artifact(run_id, folder, FOLDER)


def origin_of_version(root: Path, uri: str) -> Origin:
    """The origin of a registered version, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        UserError: there is no such version, it was registered by something else, or MLflow does not answer.
    """
    if not is_recorded(root):
        raise UserError(f"{uri}: {root} has no mlflow.db, so nothing is registered; `rlhf run`, or MLFLOW_TRACKING_URI")
    tracker = Tracker(root)
    with answered(tracker.uri):
        found = find_registered(uri, tracker.uri)
    for run in found.runs:
        with contextlib.suppress(FileNotFoundError):
            origin = _fetch(tracker, run)
            break
    else:
        raise UserError(
            f"{uri}: version {found.version} has no lineage; it was not registered by this pipeline, or its run "
            f"{found.runs[-1]} was deleted"
        )
    origin.document["model"] = {"name": found.name, "version": found.version, "created": found.created}
    return origin


def keys_of_versions(root: Path) -> set[str]:
    """The keys of every stage that a version which this pipeline registered came from, but those of deleted runs.

    Raises:
        UserError: MLflow, or where it keeps artifacts, does not answer, or has lost a version's lineage.
    """
    if not is_recorded(root):
        return set()
    tracker, keys = Tracker(root), set[str]()
    with answered(tracker.uri):
        pairs = [(version, run) for version in registered_versions(tracker.uri) for run in version.runs]
        pairs = [(version, run) for version, run in pairs if tracker.has_run(run)]
    for version, run in pairs:
        try:
            document = _fetch(tracker, run).document
        except FileNotFoundError:
            raise UserError(
                f"models:/{version.name}/{version.version}: found no lineage with its MLflow run {run}, so "
                "nobody knows what it needs; make the server's artifacts reachable, or delete that version"
            ) from None
        keys |= {facts["key"] for facts in document["stages"].values()}
    return keys


def add_makers(root: Path, document: Document) -> None:
    """Say of every stage which runs made it, when and of which commit, where MLflow answers and knows them."""
    if not is_recorded(root):
        return
    try:
        tracker = Tracker(root)
        with answered(tracker.uri):
            tell_makers(tracker, document)
    except UserError as error:
        log.warning("%s; the runs that made it are not told", error)


def tell_makers(tracker: Tracker, document: Document) -> None:
    """The same, of a tracker that answers."""
    for facts in document["stages"].values():
        if maker := tracker.maker_of(facts["key"]):
            facts |= _made_by(maker)


def _made_by(maker: Any) -> Document:
    tags, info = maker.data.tags, maker.info
    facts: Document = {
        "runs": {"MLflow": info.run_id, "Prefect": tags.get("prefect.flow_run_id")},
        "git": {"commit": tags.get("mlflow.source.git.commit"), "dirty": tags.get("rlhf.git_dirty")},
        "started": instant(info.start_time / 1000),
    }
    if info.end_time:
        facts["made"] = instant(info.end_time / 1000)
        facts["seconds"] = maker.data.metrics.get("perf/seconds", (info.end_time - info.start_time) / 1000)
    return facts


def _fetch(tracker: Tracker, run_id: str) -> Origin:
    """What a run has of `log_origin`.

    Raises:
        FileNotFoundError: there is no such run, or it has none.
        UserError: it cannot be had, or is damaged.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = tracker.fetch_artifacts(run_id, FOLDER, Path(name))
        document = checked_document((folder / LINEAGE).read_bytes(), f"{FOLDER}/{LINEAGE} of MLflow run {run_id}")
        return Origin(document, (folder / PATCH).read_bytes(), (folder / LOCK).read_bytes())

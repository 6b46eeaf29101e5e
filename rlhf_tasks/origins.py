"""The origin of a registered version, kept as artifacts of the MLflow run that registered it.

lineage/lineage.json   every stage down to the raw data (rlhf_tasks/lineage.py)
lineage/source.patch   what the checkout changed of its git commit, untracked files included
lineage/dvc.lock       DVC's digests of every stage's deps and outs
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlhf_tasks.errors import UserError
from rlhf_tasks.lineage import Document
from rlhf_tasks.registry import find_registered, registered_versions
from rlhf_tasks.source import LOCK
from rlhf_tasks.tracking import Tracker, answered

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
        UserError: there is no such version, or it was registered by something else.
    """
    tracker = Tracker(root)
    found = find_registered(uri, tracker.uri)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = tracker.fetch_artifacts(found.run_id, FOLDER, Path(name))
            document = json.loads((folder / LINEAGE).read_text())
            patch, lock = (folder / PATCH).read_bytes(), (folder / LOCK).read_bytes()
    except (OSError, ValueError):
        raise UserError(
            f"{uri}: version {found.version} has no lineage; it was not registered by this pipeline, or its run "
            f"{found.run_id} was deleted"
        ) from None
    document["model"] = {"name": found.name, "version": found.version, "created": found.created}
    return Origin(document, patch, lock)


def keys_of_versions(root: Path, name: str) -> set[str]:
    """The keys of every stage that a registered version of the Actor came from.

    Raises:
        Unreachable: MLflow does not answer.
    """
    tracker = Tracker(root)
    keys: set[str] = set()
    with answered(tracker.uri):
        for version in registered_versions(name, tracker.uri):
            try:
                document = origin_of_version(root, f"models:/{name}/{version}").document
            except UserError:  # its run was deleted
                continue
            keys |= {facts["key"] for facts in document["stages"].values()}
    return keys

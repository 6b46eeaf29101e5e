"""Where a result came from: every stage with its parameters, inputs, code and environment, down to the raw data.

Each stage leaves `lineage/<stage>.json`, all that its result depends on, as an out that DVC versions; so git and DVC
alone can tell the tree. What is not a function of the inputs (times, machines, runs) is in MLflow only.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML, YAMLError

from rlhf_tasks.errors import UserError
from rlhf_tasks.explain import made_at
from rlhf_tasks.source import LOCK, Source
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import digest_json, digest_path
from rlhf_tasks.workspace import Workspace

#: a stage's `lineage.json` and dvc.lock, wherever they come from
Read = Callable[[str], bytes]
Document = dict[str, Any]


def lineage_of(read: Read) -> Document:
    """The stages by name, each with `key`, `identity` and its `outs`' digests in DVC, from files that `read` gives.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        lock = locked_outs(read(LOCK))
    except FileNotFoundError:  # a checkout in which nothing was recorded yet
        lock = {}
    stages = {}
    for stage in STAGES.values():
        identity = _read_identity(read, stage.lineage)
        stages[stage.name] = {"key": digest_json(identity), "identity": identity, "dvc": lock.get(stage.name, {})}
    return {"stages": stages}


def _read_identity(read: Read, path: str) -> Document:
    try:
        text = read(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; `rlhf run` makes it") from None
    return _checked(text, path, _is_identity, "what a stage depends on; `rlhf run` makes it again")


def checked_document(text: bytes, name: str) -> Document:
    """A lineage that was kept as JSON.

    Raises:
        UserError: it is damaged.
    """
    return _checked(text, name, _is_document, "the lineage that the run kept; restore it, or delete the version")


def _checked(text: bytes, name: str, is_right: Callable[[Any], bool], expected: str) -> Document:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{name}: found something cut or damaged, expected {expected}") from None
    if not is_right(document):
        raise UserError(f"{name}: found JSON of another kind, expected {expected}")
    return document


def _is_identity(found: Any) -> bool:
    parts = ("parameters", "inputs", "code", "environment")
    return isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in parts)


def _is_document(found: Any) -> bool:
    stages = found.get("stages") if isinstance(found, dict) else None
    return isinstance(stages, dict) and all(
        isinstance(facts, dict) and isinstance(facts.get("key"), str) and _is_identity(facts.get("identity"))
        for facts in stages.values()
    )


def environment_of(document: Document) -> dict[str, Any]:
    """The libraries and the hardware that the stages were made with; of what differs among them, all values."""
    values: dict[str, list[Any]] = {}
    for facts in document["stages"].values():
        for name, value in facts["identity"]["environment"].items():
            known = values.setdefault(name, [])
            known += [value] if value not in known else []
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def lineage_here(workspace: Workspace, source: Source) -> Document:
    """The workspace's own lineage, with what only the machine and the store know."""
    document = lineage_of(lambda path: (workspace.root / path).read_bytes())
    for stage in STAGES.values():
        facts = document["stages"][stage.name]
        facts["digests"] = {path: digest_path(workspace.root / path) for path in stage.outs.values()}
        if entry := workspace.store.find(facts["key"]):
            facts["seconds"] = entry.manifest["perf"].get("seconds")
            facts["made"] = instant(made_at(entry))
    return document | {
        "git": {"commit": source.commit, "dirty": source.dirty},
        "machine": machine(),
        "libraries": libraries(),
        "written": instant(time.time()),
    }


def machine() -> dict[str, Any]:
    """The hardware and the system that this process runs on."""
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def libraries() -> dict[str, str]:
    """Every installed distribution and its version."""
    return dict(sorted({d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}.items()))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def instant(seconds: float) -> str:
    """A time in seconds since 1970 as text, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def locked_outs(lock: bytes, name: str = LOCK) -> dict[str, dict[str, str]]:
    """Each stage's outs in a dvc.lock: path -> md5.

    Args:
        name: whose it is, for the message.

    Raises:
        UserError: it is damaged.
    """
    try:
        document = YAML(typ="safe", pure=True).load(lock.decode()) or {}
        stages: Mapping[str, Any] = document.get("stages", {})
        outs = {stage: facts.get("outs", []) for stage, facts in stages.items()}
        return {stage: {out["path"]: out["md5"] for out in of if "md5" in out} for stage, of in outs.items()}
    except (YAMLError, ValueError, AttributeError, TypeError, KeyError):
        merging = re.search(rb"^<{7} ", lock, re.MULTILINE)
        found = "the conflict markers of a merge" if merging else "something else or damaged"
        raise UserError(
            f"{name}: found {found}, expected the stages that DVC recorded; take one side of a merge or the last good "
            f"commit (`git checkout COMMIT -- {LOCK}`), or delete it and `rlhf run`"
        ) from None


# The tree ------------------------------------------------------------------------------------------------------------


def producer_of(path: str) -> str | None:
    """The stage that leaves a workspace path, if one does."""
    return next((stage.name for stage in STAGES.values() if path in stage.outs.values()), None)


def inputs_of(document: Document, stage: str) -> list[tuple[str, str, str | None]]:
    """What a stage read: path, digest, and the stage that made it (None: raw data, a model folder, a function)."""
    inputs = document["stages"][stage]["identity"]["inputs"]
    return [(path, digest, producer_of(path)) for path, digest in inputs.items()]


def broken_links(document: Document) -> list[str]:
    """Inputs that are not what their stage left: where a tree holds together, there are none."""
    broken = []
    for stage in document["stages"]:
        for path, digest, maker in inputs_of(document, stage):
            left = document["stages"].get(maker, {}).get("digests", {}).get(path) if maker else None
            if left is not None and left != digest:
                broken.append(f"{stage} read {path} {digest[:12]}, but {maker} left {left[:12]}")
    return broken

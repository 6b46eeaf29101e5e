"""Where a result came from: every stage with its parameters, inputs, code and environment, down to the raw data.

Each stage leaves `lineage/<stage>.json`, all that its result depends on, as an out that DVC versions; so git and DVC
alone can tell the tree. What is not a function of the inputs (times, machines, runs) is in MLflow only.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from rlhf_tasks.engine import Workspace
from rlhf_tasks.errors import UserError
from rlhf_tasks.explain import made_at
from rlhf_tasks.source import LOCK, Source
from rlhf_tasks.stages import STAGES
from rlhf_tasks.store import digest_json, digest_path

#: a stage's `lineage.json` and dvc.lock, wherever they come from
Read = Callable[[str], bytes]
Document = dict[str, Any]


def lineage_of(read: Read) -> Document:
    """The stages by name, each with `key`, `identity` and its `outs`' digests in DVC, from files that `read` gives."""
    try:
        lock = locked_outs(read(LOCK))
    except FileNotFoundError:  # a checkout in which nothing was recorded yet
        lock = {}
    stages = {}
    for stage in STAGES.values():
        identity = _read_json(read, stage.lineage)
        stages[stage.name] = {"key": digest_json(identity), "identity": identity, "dvc": lock.get(stage.name, {})}
    return {"stages": stages}


def _read_json(read: Read, path: str) -> Any:
    try:
        return json.loads(read(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; `rlhf run` makes it") from None


def lineage_here(workspace: Workspace, source: Source) -> Document:
    """The workspace's own lineage, with what only the machine and the store know."""
    document = lineage_of(lambda path: (workspace.root / path).read_bytes())
    for stage in STAGES.values():
        facts = document["stages"][stage.name]
        facts["digests"] = {path: digest_path(workspace.root / path) for path in stage.outs.values()}
        if entry := workspace.store.find(facts["key"]):
            facts["seconds"] = entry.manifest["perf"].get("seconds")
            facts["made"] = _instant(made_at(entry))
    return document | {
        "git": {"commit": source.commit, "dirty": source.dirty},
        "machine": machine(),
        "libraries": libraries(),
        "written": _instant(time.time()),
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


def _instant(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def locked_outs(lock: bytes) -> dict[str, dict[str, str]]:
    """Each stage's outs in a dvc.lock: path -> md5."""
    document = YAML(typ="safe", pure=True).load(lock.decode()) or {}
    stages: Mapping[str, Any] = document.get("stages", {})
    return {name: {out["path"]: out["md5"] for out in stage.get("outs", [])} for name, stage in stages.items()}


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

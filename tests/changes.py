"""What tests do to a project, and how they see which stages' keys that changed."""

from __future__ import annotations

from pathlib import Path

from rlhf_tasks import keying
from rlhf_tasks.config import load_params, parse_assignments, set_params
from rlhf_tasks.stages import STAGES
from rlhf_tasks.workspace import Workspace


def with_params(workspace: Workspace, *assignments: str) -> Workspace:
    """The same checkout after `--set`, seen by a new process."""
    set_params(workspace.root / "params.yaml", parse_assignments(list(assignments)))
    return Workspace(workspace.root, load_params(workspace.root / "params.yaml"))


def flip_bit(path: Path, at: int = -1) -> None:
    """Damage a file, whose size stays what it was, without reaching through hard links to its other names."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()
    path.write_bytes(data)


def stage_keys(workspace: Workspace) -> dict[str, str]:
    return {name: keying.plan(workspace, stage).key for name, stage in STAGES.items()}

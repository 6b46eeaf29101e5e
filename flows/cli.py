"""The command line: `rlhf run`, `rlhf stage`, `rlhf status`. It starts flows and turns mistakes into sentences."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import environment
from flows.run import Stopped, run_here
from flows.server import forced_by_dvc
from rlhf_tasks.closure import SOURCE_ROOT
from rlhf_tasks.config import Params, load_params, parse_assignments, set_params
from rlhf_tasks.engine import alone, check_sources, state_folder
from rlhf_tasks.errors import UserError
def _params(root: Path, stages: list[Stage], assignments: list[str]) -> Params:
    """Check params.yaml before anything slow is imported, and write the assignments into it if it is then right."""
    if assignments:
        _write(root, parse_assignments(assignments), stages)
    params = load_params(root / "params.yaml")
    check_sources(params, root, stages)
    return params


def _write(root: Path, values: dict[str, Any], stages: list[Stage]) -> None:
    load_params(root / "params.yaml")
    with alone(root):  # another run in this checkout would go on with what is written here
        changes = set_params(root / "params.yaml", values, lambda new: check_sources(new, root, stages))
    for change in changes:
        print(f"params.yaml: {change}")


if __name__ == "__main__":
    main()

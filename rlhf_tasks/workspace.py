"""A checkout to work in: its parameters, the store that it uses, and who else works in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_tasks.config import Params
from rlhf_tasks.digests import remember_in
from rlhf_tasks.errors import UserError
from rlhf_tasks.store import Store

STORE_VARIABLE = "RLHF_STORE"  # a folder that several clones may share


@dataclass
class Workspace:
    """A checkout to work in: its parameters and the store that it uses."""

    root: Path
    params: Params
    store: Store = field(init=False)
    live_trainer: tuple[str, Any] | None = None

    def __post_init__(self) -> None:
        remember_in(state_folder(self.root))
        shared = os.environ.get(STORE_VARIABLE)
        self.store = Store(Path(shared).resolve() if shared else state_folder(self.root) / "store")


def project_folder(root: Path) -> Path:
    """The checkout, or, of a DVC experiment beside it, the repository that it came from (DVC sets DVC_ROOT)."""
    owner = os.environ.get("DVC_ROOT") if os.environ.get("DVC_STAGE") else None
    return Path(owner or root)


def state_folder(root: Path) -> Path:
    """`.rlhf` of the project: the store, Prefect's database, the server's record."""
    return project_folder(root) / ".rlhf"


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Be the only pipeline in this checkout: two with different parameters would overwrite each other's outs.

    Raises:
        UserError: another one is running here.
    """
    path = root / ".rlhf" / "workspace.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{root}: another run (process {file.read().strip() or 'unknown'}) works in this checkout; "
                "wait for it, or use a second clone"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

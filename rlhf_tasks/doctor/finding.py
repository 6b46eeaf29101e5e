"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check found; `ok` is None where it has to wait for a checkpoint."""

    name: str
    ok: bool | None
    text: str

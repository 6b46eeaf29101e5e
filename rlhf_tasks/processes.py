"""Telling one process from another: a pid comes back, a pid with its start time does not."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


def process_started(pid: int) -> str | None:
    """When a process started, in some unit that stays the same while it lives; None if it is gone or a zombie."""
    try:
        if sys.platform == "linux":  # ticks since boot: a clock that is set does not change them, as it would psutil's
            # The second field is the program's name in brackets, and may hold blanks and brackets itself.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            return None if fields[0] in "ZX" else fields[19]
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except (OSError, psutil.Error):
        return None

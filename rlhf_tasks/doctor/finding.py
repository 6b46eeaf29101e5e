"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        ok: None where it has to wait for a checkpoint.
        advice: if not ok, whether a run goes on with it, and to a result that is what it says it is.
    """

    name: str
    ok: bool | None
    text: str
    advice: bool = False

    @property
    def fault(self) -> bool:
        """Whether it stops a run, or makes its numbers wrong."""
        return self.ok is False and not self.advice


def advice(name: str, text: str) -> Finding:
    """A finding of what could be better."""
    return Finding(name, False, text, advice=True)

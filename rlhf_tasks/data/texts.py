"""Texts as they are compared with each other, and as a message may show them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from typing import Any

SHOWN = 60
"""Characters of a value or a name that a message shows."""
NAMES = 12
"""Names that a message lists."""


def normal(text: str) -> str:
    """A text as it is compared: one way to write an accented letter (NFC), one space for any white space."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def printable(text: str) -> str:
    """A text without what a terminal would act on or could not write: such characters become escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(value: Any) -> str:
    """A value as a message quotes it: its JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    except RecursionError:
        text = f"a nested {type(value).__name__}"
    return _short(text)


def listed(names: Iterable[str]) -> str:
    """Names as a message lists them: each shortened, and no more than a line holds."""
    every = list(names)
    shown = ", ".join(f"`{_short(name)}`" for name in every[:NAMES])
    return shown if len(every) <= NAMES else f"{shown} and {len(every) - NAMES:,} more"


def _short(text: str) -> str:
    return printable(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")

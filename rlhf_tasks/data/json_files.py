"""Rows of .json and .jsonl files, of which a part at a time is in memory: a long list is read row by row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf_tasks.errors import UserError

CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\n\r]*")
NUMBER_PART = re.compile(r"[-+.eE\d]*")
DECODER = json.JSONDecoder()

Items = Iterator[tuple[str, dict[str, Any] | UserError]]


def read_jsonl(path: Path, file: IO[bytes]) -> Items:
    """An object a line."""
    for number, line in enumerate(file, 1):  # only \n ends a line: texts may hold U+2028 and the like
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield where, not_utf8(path, number)
        except (ValueError, RecursionError) as error:  # a ValueError: a number of more digits than Python reads
            yield where, _broken(path, number, error)
        else:
            yield where, _object(where, row)


def read_json(path: Path, file: IO[bytes]) -> Items:
    """A list of objects, or `{"data": [objects]}`."""
    text = _Window(path, file)
    first, found = text.peek(), ""
    if first == "":
        return
    if first == "[":
        yield from _elements(path, text)
    elif first == "{":
        found = "" if (yield from _data(path, text)) else "an object"
    else:
        found = _kind(text.value())
    if text.peek():
        raise text.broken("Extra data")
    if found:
        raise UserError(f'{path}: found {found}, expected a list of rows or {{"data": [rows]}}')


class _Window:
    """The part of a JSON text that is being read."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches always
            if self._at < len(self._text) or not self._more(CHUNK):
                return self._text[self._at : self._at + 1]

    def take(self) -> str:
        """The same, and go past it."""
        character = self.peek()
        self._at += len(character)
        return character

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self.broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise _broken(self._path, self._line_of(self._at), error) from None
            else:
                if self._ended or not NUMBER_PART.fullmatch(self._text, end):  # else a number might go on
                    self._at = end
                    return value
            self._more(size)
            size *= 2  # a value as long as the file takes as many readings as its length has doublings

    def broken(self, reason: str, at: int | None = None) -> UserError:
        """What is wrong here, or at a place in the window."""
        return _broken(self._path, self._line_of(self._at if at is None else at), reason)

    def _line_of(self, at: int) -> int:
        return self._line + self._text.count("\n", 0, at)

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        chunk = self._file.read(size)
        try:
            text = self._decode.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            before = error.object.count(b"\n", 0, error.start)
            raise not_utf8(self._path, self._line_of(len(self._text)) + before) from None
        self._line = self._line_of(self._at)
        self._text, self._at, self._ended = self._text[self._at :] + text, 0, not chunk
        return True


def _elements(path: Path, text: _Window) -> Items:
    """The rows of the list that comes next."""
    text.take()
    if text.peek() == "]":
        text.take()
        return
    number = 0
    while True:
        number += 1
        where = f"{path}:row {number}"
        yield where, _object(where, text.value())
        if text.peek() not in ("]", ","):
            raise text.broken("Expecting ',' delimiter")
        if text.take() == "]":
            return


def _data(path: Path, text: _Window) -> Generator[tuple[str, dict[str, Any] | UserError], None, bool]:
    """The rows of the object that comes next; returns whether it has a list of them."""
    found, mark = False, ""
    text.take()
    if text.peek() == "}":
        mark = text.take()
    while mark != "}":
        if text.peek() != '"':
            raise text.broken("Expecting property name enclosed in double quotes")
        name = text.value()
        if text.peek() != ":":
            raise text.broken("Expecting ':' delimiter")
        text.take()
        if name == "data" and text.peek() == "[":
            yield from _elements(path, text)
            found = True
        else:
            text.value()
        if text.peek() not in ("}", ","):
            raise text.broken("Expecting ',' delimiter")
        mark = text.take()
    return found


def _object(where: str, row: object) -> dict[str, Any] | UserError:
    if isinstance(row, dict):
        return row
    return UserError(f"{where}: found {_kind(row)}, expected an object with named fields")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def not_utf8(path: Path, line: int) -> UserError:
    """What to say of a line in another encoding."""
    return UserError(f"{path}:{line}: not UTF-8; save the file in that encoding, for example with `iconv -t UTF-8`")


def _broken(path: Path, line: int, error: Exception | str) -> UserError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
    hint = "; a file with one object a line must be named .jsonl" if reason == "Extra data" else ""
    return UserError(f"{path}:{line}: broken JSON ({reason}){hint}")

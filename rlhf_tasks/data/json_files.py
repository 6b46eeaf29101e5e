"""Rows of .json and .jsonl files, of which a part at a time is in memory: a long list is read row by row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

from rlhf_tasks.data.texts import listed
from rlhf_tasks.errors import UserError

CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\n\r]*")
NUMBER_PART = re.compile(r"[-+.eE\d]*")

Items = Iterator[tuple[str, dict[str, Any] | UserError]]


class _Decoder:
    """Reads JSON values; `doubled` is the name that stands twice in an object of the last one, of which JSON readers
    would take either, or nothing."""

    def __init__(self) -> None:
        self.doubled = ""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def decode(self, text: str) -> Any:
        """The value that a text is."""
        self.doubled = ""
        return self._decoder.decode(text)

    def raw_decode(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at a place in a text, and where it ends."""
        self.doubled = ""
        return self._decoder.raw_decode(text, at)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self.doubled = next(name for name in names if names.count(name) > 1)
        return found


def read_jsonl(path: Path, file: IO[bytes]) -> Items:
    """An object a line."""
    decoder = _Decoder()
    for number, line in enumerate(file, 1):  # only \n ends a line: texts may hold U+2028 and the like
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = decoder.decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield where, not_utf8(path, number)
        except (ValueError, RecursionError) as error:  # a ValueError: a number of more digits than Python reads
            yield where, _broken(path, number, error)
        else:
            yield where, _object(where, row, decoder)


def read_json(path: Path, file: IO[bytes]) -> Items:
    """A list of objects, or `{"data": [objects]}`."""
    text = _Window(path, file)
    first, found = text.peek(), ""
    if first == "":
        return
    if first == "[":
        yield from _elements(path, text)
    elif first == "{":
        found = yield from _data(path, text)
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
        self.decoder = _Decoder()

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
                value, end = self.decoder.raw_decode(self._text, self._at)
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
        yield where, _object(where, text.value(), text.decoder)
        if text.peek() not in ("]", ","):
            raise text.broken("Expecting ',' delimiter")
        if text.take() == "]":
            return


def _data(path: Path, text: _Window) -> Generator[tuple[str, dict[str, Any] | UserError], None, str]:
    """The rows of the object that comes next; returns what was found in the place of one list of them, or nothing."""
    names, lists, mark = list[str](), list[str](), ""
    text.take()
    if text.peek() == "}":
        mark = text.take()
    while mark != "}":
        if text.peek() != '"':
            raise text.broken("Expecting property name enclosed in double quotes")
        names.append(text.value())
        if text.peek() != ":":
            raise text.broken("Expecting ':' delimiter")
        text.take()
        if names[-1] == "data" and text.peek() == "[":
            lists.append("data")
            yield from _elements(path, text)
        elif _is_rows(text.value()):
            lists.append(names[-1])
        if text.peek() not in ("}", ","):
            raise text.broken("Expecting ',' delimiter")
        mark = text.take()
    if "data" not in lists:
        return f"an object with {listed(names)}" if names else "an object"
    return f"{len(lists)} lists of rows ({listed(lists)})" if len(lists) > 1 else ""


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _object(where: str, row: object, decoder: _Decoder) -> dict[str, Any] | UserError:
    if not isinstance(row, dict):
        return UserError(f"{where}: found {_kind(row)}, expected an object with named fields")
    if decoder.doubled:
        return UserError(f"{where}: found {listed([decoder.doubled])} twice in one object, expected each name once")
    return row


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

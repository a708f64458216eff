"""JSON files: bytes in; records out, one by one.

A file is an object in each line, an array of objects, or objects one after another; which of them, its content shows.
No more than a record is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from infctx.documents.blocks import BLOCK_BYTES, decoded, in_utf8, not_in_encoding
from infctx.documents.document import Records
from infctx.errors import InputError

MAX_RECORD_BYTES = 64 << 20
"""A record is parsed as a whole, which takes up to nine times its size in memory, ..."""
FEW_BYTES, MOST_VALUES, VALUES_OF_A_LIST = 8 << 20, 4_000_000, 4
"""... or up to forty times if it is made of small values, such as [[],[]]. So a record of more than FEW_BYTES may have
no more than MOST_VALUES; a list or an object counts as four."""
SPACE = re.compile(r"[ \t\r\n]*")
LONGEST_WORD = 16  # characters of a word or escape that the end of a buffer may cut


def json_records(blocks: Iterator[bytes], name: str, encoding: str | None, is_lines: bool) -> Records:
    """Yields the records of a file, or an error for each that cannot be read.

    name: of the file, for messages
    is_lines: whether it is meant to have a record in each line
    """
    blocks = in_utf8(blocks, name, encoding)
    head = b""
    while not head.strip() and (block := next(blocks, b"")):
        head += block
    if _has_lines(head.lstrip(), is_lines):
        return _records_of_lines(chain([head], blocks), name)
    return _records_of_values(_Values(decoded(chain([head], blocks), name, None), name))


def lines_of(blocks: Iterator[bytes], name: str) -> Iterator[tuple[str, bytes | InputError]]:
    """Yields the place and content of each line, without its newline; an error for one that is too long."""
    number, length = 1, 0
    parts: list[bytes] = []  # of the line whose end has not come yet
    for block in blocks:
        *complete, rest = block.split(b"\n")
        if complete:
            if length <= MAX_RECORD_BYTES:
                complete[0] = b"".join(parts) + complete[0]
                yield f"{name}:{number}", complete[0]
            for number, line in enumerate(complete[1:], start=number + 1):  # noqa: B020 - it counts on
                yield f"{name}:{number}", line
            number, parts, length = number + 1, [], 0
        if length <= MAX_RECORD_BYTES < length + len(rest):
            yield f"{name}:{number}", too_long(f"{name}:{number}", "line")
            parts = []
        length += len(rest)
        if length <= MAX_RECORD_BYTES:
            parts.append(rest)
    if length <= MAX_RECORD_BYTES:
        yield f"{name}:{number}", b"".join(parts)


def too_long(place: str, what: str) -> InputError:
    """Returns the error for a line, row or record that is longer than one may be."""
    return InputError(
        f"{place}: a {what} of more than {MAX_RECORD_BYTES >> 20} MiB, too long to be parsed; "
        "put this document into a .txt file, or leave it out with --skip-bad"
    )


def too_many(place: str, num_bytes: int) -> InputError:
    """Returns the error for a line or record of more values than one may have."""
    return InputError(
        f"{place}: a record of {num_bytes >> 20} MiB with more than {MOST_VALUES:,} values, too many to be parsed; "
        "keep only what is needed, or leave it out with --skip-bad"
    )


def _has_lines(head: bytes, is_lines: bool) -> bool:
    """Returns whether a file has a record in each line; its suffix decides where its first line is no JSON."""
    if head.startswith(b"["):
        return False
    try:
        json.loads(head.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return is_lines
    return True


def _records_of_lines(blocks: Iterator[bytes], name: str) -> Records:
    for place, line in lines_of(blocks, name):
        if isinstance(line, InputError):
            yield place, line
        elif line.strip():
            try:
                yield place, _object(_parsed(line, place), place)
            except InputError as error:
                yield place, error


def _parsed(line: bytes, place: str) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise not_in_encoding(error, place, "utf-8", 0) from None
    _check_values(text, place)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place}: not JSON ({error.msg}, column {error.colno}); correct the line, or add --skip-bad"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, or a nesting too deep, for Python
        raise InputError(f"{place}: not JSON ({error}); correct the line, or add --skip-bad") from None


def _check_values(text: str, place: str) -> None:
    """Raises InputError for a record that would take too much memory."""
    if len(text) <= FEW_BYTES or _num_values(content := text.encode()) <= MOST_VALUES:
        return
    content = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(content, np.uint8)
    is_outside = ~np.bitwise_xor.accumulate(characters == ord('"'))  # of strings
    if _num_values(characters[is_outside].tobytes()) > MOST_VALUES:
        raise too_many(place, len(text))


def _num_values(content: bytes) -> int:
    return content.count(b",") + VALUES_OF_A_LIST * (content.count(b"[") + content.count(b"{"))


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f'{place}: not a JSON object but {type(value).__name__}; write {{"text": "..."}}')
    return value


def _records_of_values(values: _Values) -> Records:
    """Yields the records of an array, or of objects one after another. What is no JSON ends them."""
    number = 0
    place = values.name
    try:
        in_array = values.next_character() == "["
        if in_array:
            values.skip(1)
        while (character := values.next_character()) != ("]" if in_array else ""):
            number += 1
            if in_array and number > 1:
                values.expect(",", "between two records")
                character = values.next_character()
            if not character:
                raise values.error("its array has no end; it is cut off, copy it again")
            place = f"{values.name}:{values.line}, record {number}"
            value = values.value(place)
            try:
                yield place, _object(value, place)
            except InputError as error:
                yield place, error
        if in_array:
            values.skip(1)
            if values.next_character():
                raise values.error("there is more after the end of its array; remove it")
    except InputError as error:
        yield place, error


class _Values:
    """JSON values from pieces of text.

    line: the number of the line of the next character
    """

    def __init__(self, pieces: Iterator[str], name: str) -> None:
        self.name, self.line = name, 1
        self._pieces = pieces
        self._buffer, self._place = "", 0
        self._scan = json.JSONDecoder().raw_decode

    def next_character(self) -> str:
        """Returns the next character that is no space; "" at the end."""
        while True:
            match = SPACE.match(self._buffer, self._place)
            assert match is not None  # it matches nothing, too
            self.skip(match.end() - self._place)
            if self._place < len(self._buffer):
                return self._buffer[self._place]
            if not self._read():
                return ""

    def skip(self, count: int) -> None:
        """Goes forward in the text that is read already."""
        self.line += self._buffer.count("\n", self._place, self._place + count)
        self._place += count

    def expect(self, character: str, where: str) -> None:
        """Skips a character; raises InputError for another one."""
        found = self.next_character()
        if found != character:
            problem = f"{found!r} where {character!r} should be" if found else f"it ends without {character!r} or ']'"
            raise self.error(f"not JSON ({problem}, {where}); correct it, or copy the file again if it is cut off")
        self.skip(1)

    def value(self, place: str) -> Any:
        """Returns the value that begins at the next character."""
        while True:
            try:
                value, end = self._scan(self._buffer, self._place)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - LONGEST_WORD
                if is_cut and len(self._buffer) - self._place > MAX_RECORD_BYTES:
                    raise too_long(place, "record") from None
                if is_cut:
                    _check_values(self._buffer[self._place :], place)  # all of it is this record's
                    if self._read():
                        continue
                self.skip(min(error.pos, len(self._buffer)) - self._place)
                what = "the file is cut off, or a quote is missing" if is_cut else "correct it"
                raise InputError(f"{place}: not JSON ({error.msg}, line {self.line}); {what}") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place}: not JSON ({error}); correct it, or add --skip-bad") from None
            if end < len(self._buffer) or not self._read():  # a number may continue
                self.skip(end - self._place)
                if len(self._buffer) > FEW_BYTES:
                    self._put_back()
                return value

    def error(self, problem: str) -> InputError:
        """Returns an error at the next character."""
        return InputError(f"{self.name}:{self.line}: {problem}")

    def _read(self) -> bool:
        """Adds to the buffer as much as there is in it; returns whether there is more."""
        wanted = min(len(self._buffer) - self._place, FEW_BYTES // 2)
        added = []
        while wanted >= 0 and (piece := next(self._pieces, "")):
            added.append(piece)
            wanted -= len(piece)
        self._buffer = "".join([self._buffer[self._place :], *added])
        self._place = 0
        return bool(added)

    def _put_back(self) -> None:
        """Empties the buffer; what is left of it comes again."""
        rest = self._buffer[self._place :]
        again = (rest[begin : begin + BLOCK_BYTES] for begin in range(0, len(rest), BLOCK_BYTES))
        self._pieces, self._buffer, self._place = chain(again, self._pieces), "", 0

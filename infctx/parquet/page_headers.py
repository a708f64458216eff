"""The header of a parquet page: bytes in the compact form of Thrift in, the numbers that a reader needs out.

Source: parquet.thrift and Encodings.md of apache/parquet-format; thrift-compact-protocol.md of apache/thrift.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, NamedTuple

DATA_PAGE, INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = range(4)
DATA_HEADER, DICTIONARY_HEADER, DATA_HEADER_V2 = 5, 7, 8  # the fields of a page header that are headers, too
TRUE, FALSE, BYTE, INT16, INT32, INT64, DOUBLE, BINARY, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 12
MOST_BINARY_BYTES = 16 << 20  # of a smallest or largest value, which is all the binary that a header has


class Page(NamedTuple):
    """A page: what its header says, and where it is in its file.

    num_bytes: decompressed, levels included
    stored_bytes: as they are in the file, from `offset` on
    level_bytes: of the repetition and the definition levels before the values, which are never compressed then; None:
        they say it themselves
    """

    kind: int
    offset: int
    num_bytes: int
    stored_bytes: int
    num_values: int
    encoding: int
    level_bytes: tuple[int, int] | None = None
    is_compressed: bool = True


def read_page_header(file: BinaryIO) -> Page:
    """Reads the header at the file's place and leaves the file at the page's first byte; ValueError if it is none."""
    try:
        fields = _struct(file)
        kind, num_bytes, stored_bytes = fields[1], fields[2], fields[3]
        page = Page(kind, file.tell(), num_bytes, stored_bytes, 0, 0)
        if kind in (DATA_PAGE, DICTIONARY_PAGE):
            header = fields[DATA_HEADER if kind == DATA_PAGE else DICTIONARY_HEADER]
            page = page._replace(num_values=header[1], encoding=header[2])
        elif kind == DATA_PAGE_V2:
            header = fields[DATA_HEADER_V2]
            page = page._replace(num_values=header[1], encoding=header[4])
            page = page._replace(level_bytes=(header[6], header[5]), is_compressed=header.get(7, True))
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("the header of a page is damaged") from None
    numbers = (page.num_bytes, page.stored_bytes, page.num_values, page.encoding, *(page.level_bytes or ()))
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("the header of a page has a negative size")
    return page


def _struct(file: BinaryIO) -> dict[int, Any]:
    """Reads a Thrift struct: its fields by their numbers."""
    fields: dict[int, Any] = {}
    number = 0
    while head := _exactly(file, 1)[0]:
        step, kind = head >> 4, head & 15
        number = number + step if step else _integer(file)
        fields[number] = _field(file, kind)
    return fields


def _field(file: BinaryIO, kind: int) -> Any:
    if kind in (TRUE, FALSE):
        return kind == TRUE
    if kind in (INT16, INT32, INT64):
        return _integer(file)
    if kind == STRUCT:
        return _struct(file)
    if kind == BINARY:
        length = read_varint(file)
        if length > MOST_BINARY_BYTES:
            raise ValueError(f"the header of a page has {length} bytes of statistics")
        return _exactly(file, length)
    if kind in (BYTE, DOUBLE):
        return _exactly(file, 1 if kind == BYTE else 8)
    raise ValueError(f"the header of a page has a field of unknown type {kind}")


def _integer(file: BinaryIO) -> int:
    number = read_varint(file)
    return (number >> 1) ^ -(number & 1)


def read_varint(file: BinaryIO | io.BytesIO) -> int:
    """Reads a number of 7 bits a byte, the lowest first."""
    number = shift = 0
    while True:
        byte = _exactly(file, 1)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _exactly(file: BinaryIO | io.BytesIO, length: int) -> bytes:
    content = file.read(length)
    if len(content) < length:
        raise ValueError("a page ends too early")
    return content

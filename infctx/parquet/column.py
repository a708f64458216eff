"""A column of texts: the pages of one leaf of a row group in; its values out, one at a time, with their levels.

Source: README.md and Encodings.md of apache/parquet-format. A value's definition level says how many of the things
around it that may be missing are there, itself included; its repetition level is 0 where a row begins.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from infctx.parquet.page_content import CODECS, open_page
from infctx.parquet.page_headers import DATA_PAGE, DATA_PAGE_V2, DICTIONARY_PAGE, Page, read_page_header, read_varint

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MOST_PAGE_VALUES = 1 << 24
KINDS = (DATA_PAGE, DATA_PAGE_V2, DICTIONARY_PAGE)
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = ENCODINGS = (0, 2, 8)


class TooLong(NamedTuple):
    """A value that is too long to be read."""

    num_bytes: int


Value = bytes | TooLong | None


class Entry(NamedTuple):
    """A value of a column with its levels; None where something is missing."""

    repetition: int
    definition: int
    value: Value


class Column(NamedTuple):
    """A column of texts in a row group.

    offset, num_bytes: where its pages are in the file
    whole_bytes: of its pages, decompressed
    num_entries: values, and what stands where one is missing
    codec: of its pages, as pyarrow names it
    """

    path: Path
    offset: int
    num_bytes: int
    whole_bytes: int
    num_entries: int
    codec: str
    max_repetition: int
    max_definition: int


def find_column(file: ParquetFile, path: Path, group: int, number: int) -> Column | None:
    """Returns a column of a row group; None if it is not one of texts in a codec that can be read here."""
    column, stored = file.schema.column(number), file.metadata.row_group(group).column(number)
    if column.physical_type != "BYTE_ARRAY" or column.logical_type.type != "STRING" or stored.compression not in CODECS:
        return None
    offset = stored.data_page_offset
    if stored.has_dictionary_page and stored.dictionary_page_offset:
        offset = min(offset, stored.dictionary_page_offset)
    sizes = (stored.total_compressed_size, stored.total_uncompressed_size, stored.num_values)
    return Column(path, offset, *sizes, stored.compression, column.max_repetition_level, column.max_definition_level)


def can_be_read(page: Page) -> bool:
    """Returns whether `read_entries` knows the encoding of a page."""
    return page.encoding in ENCODINGS and page.num_values <= MOST_PAGE_VALUES


def read_entries(column: Column, most_bytes: int) -> Iterator[Entry]:
    """Yields the values of a column, in order, with `TooLong` for each of more than `most_bytes`.

    Raises ValueError for a damaged page, and OSError where the disk has no room for a page.
    """
    texts: _Texts | None = None
    try:
        for page in pages_of(column):
            content = open_page(column.path, page, column.codec)
            end = content.tell() + page.num_bytes
            if page.kind == DICTIONARY_PAGE:
                texts = _Texts(content, end, page.num_values, most_bytes)
                continue
            with content:
                yield from _entries(content, end, page, column, texts, most_bytes)
    finally:
        if texts:
            texts.close()


def pages_of(column: Column) -> Iterator[Page]:
    """Yields the headers of a column's pages; raises ValueError where they do not fit the column."""
    place, end, num_entries = column.offset, column.offset + column.num_bytes, 0
    with column.path.open("rb", 1 << 12) as file:
        while place < end and num_entries < column.num_entries:
            file.seek(place)
            page = read_page_header(file)
            place = page.offset + page.stored_bytes
            if place > end or page.num_bytes > column.whole_bytes:
                raise ValueError("a page is longer than its column")
            if page.kind in (DATA_PAGE, DATA_PAGE_V2):
                num_entries += page.num_values
            if page.kind in KINDS:
                yield page
    if num_entries != column.num_entries:
        raise ValueError(f"{num_entries} values in a column of {column.num_entries}")


def _entries(
    content: BinaryIO, end: int, page: Page, column: Column, texts: _Texts | None, most_bytes: int
) -> Iterator[Entry]:
    """Yields what a data page holds."""
    lengths = page.level_bytes or (None, None)
    repetitions = _levels(content, end, lengths[0], column.max_repetition, page.num_values)
    definitions = _levels(content, end, lengths[1], column.max_definition, page.num_values)
    count = int((definitions == column.max_definition).sum())
    if page.encoding == PLAIN:
        values = (_read(content, _length(content, end), most_bytes) for _ in range(count))
    elif texts is None:
        raise ValueError("a page of a dictionary's numbers without a dictionary")
    else:
        width = content.read(1)[0] if count else 0
        numbers = _runs(content.read(end - content.tell()), width, count)
        if count and numbers.max() >= len(texts):
            raise ValueError("a number that its dictionary does not have")
        values = (texts[number] for number in numbers.tolist())
    for repetition, definition in zip(repetitions.tolist(), definitions.tolist(), strict=True):
        yield Entry(repetition, definition, next(values) if definition == column.max_definition else None)


def _levels(content: BinaryIO, end: int, length: int | None, most: int, count: int) -> np.ndarray:
    """Reads the levels of one kind, of which the largest is `most`."""
    if most == 0:
        return np.zeros(count, np.int64)
    if length is None:
        length = _length(content, end)
    if length > end - content.tell():
        raise ValueError("the levels of a page are longer than the page")
    return _runs(content.read(length), most.bit_length(), count)


class _Texts:
    """The texts of a dictionary page, which stay on disk."""

    def __init__(self, content: BinaryIO, end: int, count: int, most_bytes: int) -> None:
        self._content, self._most_bytes = content, most_bytes
        self._places, self._lengths = array("q"), array("q")
        for _ in range(count):
            length = _length(content, end)
            self._places.append(content.tell())
            self._lengths.append(length)
            content.seek(length, 1)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Value:
        self._content.seek(self._places[number])
        return _read(self._content, self._lengths[number], self._most_bytes)

    def close(self) -> None:
        """Gives the disk its room back."""
        self._content.close()


def _length(content: BinaryIO, end: int) -> int:
    """Reads the length of what comes next."""
    head = content.read(4)
    length = int.from_bytes(head, "little")
    if len(head) < 4 or length > end - content.tell():
        raise ValueError("a value is longer than its page")
    return length


def _read(content: BinaryIO, length: int, most_bytes: int) -> Value:
    if length <= most_bytes:
        return content.read(length)
    content.seek(length, 1)
    return TooLong(length)


def _runs(content: bytes, width: int, count: int) -> np.ndarray:
    """Returns the first `count` numbers of `width` bits of the hybrid of repeated and bit-packed runs."""
    if width > 32:
        raise ValueError(f"numbers of {width} bits")
    numbers = np.zeros(count, np.int64)
    if width == 0:
        return numbers
    file, done = BytesIO(content), 0
    while done < count:
        head = read_varint(file)
        if head & 1:  # groups of eight numbers
            packed = np.frombuffer(file.read((head >> 1) * width), np.uint8)
            bits = np.unpackbits(packed, bitorder="little", count=min(len(packed) * 8, (count - done) * width))
            run = _packed(bits, width)
        else:
            run = np.full(min(head >> 1, count - done), int.from_bytes(file.read(-(-width // 8)), "little"))
        if not len(run):
            raise ValueError("a page ends too early")
        numbers[done : done + len(run)] = run
        done += len(run)
    return numbers


def _packed(bits: np.ndarray, width: int) -> np.ndarray:
    """Returns numbers whose bits, the lowest first, stand one after another."""
    numbers = np.zeros(len(bits) // width, np.int64)
    for place in range(width):
        numbers |= bits[place::width][: len(numbers)].astype(np.int64) << place
    return numbers

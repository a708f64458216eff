"""Columns with large pages: the columns of a row group in; its rows out, one at a time.

A column is read here if it is of texts, or of lists of objects whose values are texts, as the messages of chats are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from infctx.parquet.column import Column, Entry, TooLong, can_be_read, find_column, pages_of, read_entries

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

LARGE_PAGE_BYTES = 32 << 20
"""From this size on, decompressed, a page is read here and not by pyarrow."""
Objects = list[dict[str, bytes | None] | None]
Cell = bytes | Objects | TooLong | None


class LongColumn(NamedTuple):
    """A column as the user sees it.

    leaves: parquet's columns, by the keys of the objects; one without a key for texts
    list_level: the definition level of an object in a list; 0 for texts
    list_can_be_null, object_can_be_null: whether null may stand there
    """

    leaves: dict[str, Column]
    list_level: int = 0
    list_can_be_null: bool = False
    object_can_be_null: bool = False


def find_long_columns(file: ParquetFile, path: Path, group: int, names: Sequence[str]) -> list[LongColumn] | None:
    """Returns some columns of a row group if one of them has a large page and `read_rows` can read them all.

    None: they are for pyarrow to read.
    """
    columns = [_find(file, path, group, name) for name in names]
    found = [column for column in columns if column]
    leaves = [leaf for column in found for leaf in column.leaves.values()]
    if len(found) < len(columns) or all(leaf.whole_bytes < LARGE_PAGE_BYTES for leaf in leaves):
        return None
    pages = [page for leaf in leaves for page in pages_of(leaf)]
    is_large = any(page.num_bytes >= LARGE_PAGE_BYTES for page in pages)
    return found if is_large and all(map(can_be_read, pages)) else None


def read_rows(columns: Sequence[LongColumn], most_bytes: int) -> Iterator[tuple[Cell, ...]]:
    """Yields the cells of each row; `TooLong` for a cell of more than `most_bytes`.

    Raises ValueError for a damaged page, and OSError where the disk has no room for a page.
    """
    return zip(*(_cells(column, most_bytes) for column in columns), strict=True)


def _find(file: ParquetFile, path: Path, group: int, name: str) -> LongColumn | None:
    import pyarrow

    numbers = [i for i in range(len(file.schema)) if file.schema.column(i).path.split(".")[0] == name]
    columns = [find_column(file, path, group, number) for number in numbers]
    leaves = [column for column in columns if column]
    if not leaves or len(leaves) < len(columns):
        return None
    if len(leaves) == 1 and leaves[0].max_repetition == 0 and leaves[0].max_definition <= 1:
        return LongColumn({"": leaves[0]})
    field = file.schema_arrow.field(name)
    if not pyarrow.types.is_list(field.type) and not pyarrow.types.is_large_list(field.type):
        return None
    item = field.type.value_field
    if not pyarrow.types.is_struct(item.type) or len(leaves) != item.type.num_fields:
        return None
    level = field.nullable + 1
    keys = [item.type.field(i) for i in range(item.type.num_fields)]
    levels = [(1, level + item.nullable + key.nullable) for key in keys]
    if [(leaf.max_repetition, leaf.max_definition) for leaf in leaves] != levels:  # there is more inside
        return None
    named = {key.name: leaf for key, leaf in zip(keys, leaves, strict=True)}
    return LongColumn(named, level, field.nullable, item.nullable)


def _cells(column: LongColumn, most_bytes: int) -> Iterator[Cell]:
    leaves = [read_entries(leaf, most_bytes) for leaf in column.leaves.values()]
    if not column.list_level:
        yield from (entry.value for entry in leaves[0])
        return
    row: list[tuple[Entry, ...]] = []
    num_bytes = 0
    for entries in zip(*leaves, strict=True):
        if row and entries[0].repetition == 0:
            yield _objects(column, row) if num_bytes <= most_bytes else TooLong(num_bytes)
            row, num_bytes = [], 0
        num_bytes += sum(_size(entry) for entry in entries)
        if num_bytes <= most_bytes or not row:  # what is too long is not kept
            row.append(entries)
    if row:
        yield _objects(column, row) if num_bytes <= most_bytes else TooLong(num_bytes)


def _size(entry: Entry) -> int:
    return entry.value.num_bytes if isinstance(entry.value, TooLong) else len(entry.value or b"")


def _objects(column: LongColumn, row: list[tuple[Entry, ...]]) -> Objects | None:
    """Makes the list of a row."""
    level = column.list_level
    if row[0][0].definition < level:
        return None if column.list_can_be_null and row[0][0].definition == 0 else []
    objects: Objects = []
    for entries in row:
        if column.object_can_be_null and entries[0].definition == level:
            objects.append(None)
            continue
        values = [entry.value for entry in entries if not isinstance(entry.value, TooLong)]
        objects.append(dict(zip(column.leaves, values, strict=True)))
    return objects

"""Tables: csv, tsv and parquet files in; records out, row by row, in memory that does not grow with them."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from errno import ENOSPC
from functools import partial
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from infctx.documents.blocks import in_utf8, name_of, not_in_encoding
from infctx.documents.document import Reading, Records, Source
from infctx.documents.json_records import FEW_BYTES, MAX_RECORD_BYTES, MOST_VALUES, lines_of, too_long, too_many
from infctx.documents.records import needed_columns
from infctx.errors import InputError
from infctx.parquet.column import TooLong
from infctx.parquet.large_pages import Cell, Objects, find_long_columns, read_rows
from infctx.small_texts import counted, quoted

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH_BYTES, MOST_BATCH_ROWS = 8 << 20, 1024  # of a parquet file that are in memory at once
PARQUET_BLOCK_BYTES = 1 << 20
SEPARATORS = {"csv": ",;\t", "tsv": "\t"}
QUOTED = re.compile(r'"(?:[^"]|"")*"')


def csv_records(blocks: Iterator[bytes], name: str, format: str, reading: Reading) -> Records:
    """Yields the rows of a csv or tsv file as records of texts, or an error for each that cannot be read.

    The first line names the columns. A .csv without any comma between them may have semicolons or tabs. Quotes may
    hold newlines, and what is quoted wrongly is an error.
    """
    lines = _Lines(lines_of(in_utf8(blocks, name, reading.encoding), name))
    header = lines.first()
    place = f"{name}:{lines.number}"
    names = QUOTED.sub("", header)
    separator = next((mark for mark in SEPARATORS[format] if mark in names), SEPARATORS[format][0])
    limit = csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        rows = csv.reader(lines, delimiter=separator, strict=True)
        columns = [column.strip() for column in _row(rows, place) or []]
        if not columns:
            raise InputError(f"{place}: no line with the names of the columns; write it first, such as id,text")
        needed_columns(columns, place, reading)
        while True:
            place, lines.problem = f"{name}:{lines.number + 1}", None
            try:
                row = _row(rows, place)
                if lines.problem:
                    raise lines.problem
                if row is None:
                    return
                if not row:
                    continue
                if len(row) != len(columns):
                    raise InputError(
                        f"{place}: {counted(len(row), 'value')}, and the first line names {len(columns)} columns; "
                        f"put values with {separator!r}, quotes or newlines in them into quotes"
                    )
            except InputError as error:
                yield place, error
                continue
            yield place, dict(zip(columns, row, strict=True))
    finally:
        csv.field_size_limit(limit)


def parquet_records(source: Source, reading: Reading, on_bytes: Callable[[int], object]) -> Records:
    """Yields the rows of a parquet file as records, or an error for each that cannot be read.

    A few rows are in memory at once, and a page of the file where it is small; a large one goes to a temporary file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{name_of(source)}: pyarrow, which reads parquet, is missing; pip install 'infctx[parquet]'"
        ) from None
    if source.compression:
        raise InputError(f"{source.path}: a compressed parquet file; decompress it first, for it is compressed inside")
    try:
        # Read in small blocks: without a buffer, a whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(source.file, buffer_size=PARQUET_BLOCK_BYTES, pre_buffer=False) as file:
            columns = needed_columns(file.schema_arrow.names, source.path, reading)
            yield from _records(_rows(file, columns, source), source, file.metadata.num_rows, on_bytes)
    except OSError as error:
        if error.errno == ENOSPC:
            raise InputError(
                f"{source.path}: has pages too large for memory, and there is no room for one of them in "
                f"{gettempdir()}; set TMPDIR to a folder with more room"
            ) from None
        if error.errno and error.strerror:
            raise InputError(f"{source.path}: cannot be read ({error.strerror}); check the file") from None
        raise _damaged(source, error) from None
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, UnicodeEncodeError):
            raise InputError(f"{source.path}: pyarrow wants a name in UTF-8; rename the file") from None
        raise _damaged(source, error) from None


class _Lines:
    """Lines of text for a csv reader.

    number: of the line that it took last
    problem: of a line taken since this was last None
    """

    def __init__(self, lines: Iterator[tuple[str, bytes | InputError]]) -> None:
        self._lines = lines
        self._first: str | None = None
        self.number = 0
        self.problem: InputError | None = None

    def first(self) -> str:
        """Returns the first line that is not blank, to be taken again; "" if there is none."""
        self._first = next((line for line in self if line.strip()), "")
        if self.problem:
            raise self.problem
        return self._first

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._first is not None:
            line, self._first = self._first, None
            return line
        place, content = next(self._lines)
        self.number += 1
        if isinstance(content, bytes) and len(content) > FEW_BYTES and _num_values(content) > MOST_VALUES:
            content = too_many(place, len(content))
        if isinstance(content, InputError):
            self.problem = self.problem or content
            return ""
        try:
            return content.decode() + "\n"
        except UnicodeDecodeError as error:
            self.problem = self.problem or not_in_encoding(error, place, "utf-8", 0)
            return content.decode(errors="replace") + "\n"


def _num_values(line: bytes) -> int:
    return max(line.count(mark.encode()) for mark in SEPARATORS["csv"])


def _row(rows: Iterator[list[str]], place: str) -> list[str] | None:
    """Returns the next row; None at the end."""
    try:
        return next(rows, None)
    except csv.Error as error:
        problem = str(error)
        if "field larger" in problem:
            problem = f"a value of more than {MAX_RECORD_BYTES >> 20} MiB, or a quote without its end"
        if "new-line character" in problem:
            raise InputError(
                f"{place}: not csv (a carriage return alone, outside quotes); end the lines as Linux or Windows does, "
                "put the value into quotes, or add --skip-bad"
            ) from None
        problem = problem.replace("\t", r"\t")
        raise InputError(f"{place}: not csv ({problem}); correct the quotes, or add --skip-bad") from None


def _rows(file: ParquetFile, columns: Sequence[str], source: Source) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Yields for each row a function that returns it, given its place for messages."""
    for group in range(file.metadata.num_row_groups):
        if long := find_long_columns(file, source.file, group, columns):
            for cells in read_rows(long, MAX_RECORD_BYTES):
                yield partial(_long_row, columns, cells)
            continue
        rows = _batch_rows(file.metadata.row_group(group))
        for batch in file.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False):
            for number in range(batch.num_rows):
                yield partial(_row_of_batch, batch, number)


def _batch_rows(row_group: Any) -> int:
    """Returns how many rows of an average size fit into a batch."""
    return min(MOST_BATCH_ROWS, max(1, BATCH_BYTES * row_group.num_rows // max(1, row_group.total_byte_size)))


def _row_of_batch(batch: RecordBatch, number: int, place: str) -> dict[str, Any]:
    return {name: column[number].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _long_row(columns: Sequence[str], cells: Sequence[Cell], place: str) -> dict[str, Any]:
    texts = [cell for cell in cells if not isinstance(cell, TooLong)]
    if len(texts) < len(cells) or sum(map(_num_bytes, texts)) > MAX_RECORD_BYTES:
        raise too_long(place, "row")
    return dict(zip(columns, map(_decoded, texts), strict=True))


def _num_bytes(cell: bytes | Objects | None) -> int:
    if isinstance(cell, list):
        return sum(len(value or b"") for item in cell for value in (item or {}).values())
    return len(cell or b"")


def _decoded(cell: bytes | Objects | None) -> Any:
    if isinstance(cell, list):
        return [item and {key: _decoded(value) for key, value in item.items()} for item in cell]
    return cell if cell is None else cell.decode()


def _records(
    rows: Iterator[Callable[[str], dict[str, Any]]], source: Source, num_rows: int, on_bytes: Callable[[int], object]
) -> Records:
    num_bytes, reported = source.num_bytes, 0
    for number, row in enumerate(rows, start=1):
        place = f"{source.path}, row {number:,}"
        try:
            yield place, row(place)
        except InputError as error:
            yield place, error
        except UnicodeDecodeError as error:
            yield place, not_in_encoding(error, place, "utf-8", 0)
        except (ValueError, OverflowError) as error:  # such as a date beyond what Python has
            problem = quoted(str(error))
            yield place, InputError(f"{place}: cannot be read ({problem}); correct the row, or add --skip-bad")
        done = num_bytes * number // num_rows
        if done - reported >= PARQUET_BLOCK_BYTES or number == num_rows:
            on_bytes(done - reported)
            reported = done


def _damaged(source: Source, error: Exception) -> InputError:
    message = " ".join(quoted(str(error), 160).split())
    with suppress(OSError), open(source.file, "rb") as file:
        if file.read(4) != b"PAR1":
            return InputError(f"{source.path}: not a parquet file; name it by what it holds, or give its --format")
    return InputError(f"{source.path}: a damaged parquet file ({message}); copy it again")

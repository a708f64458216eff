"""Records: an object of a jsonl file or a row of a table in; a document out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from infctx.documents.document import Document, Part, Reading
from infctx.errors import InputError
from infctx.small_texts import quoted

TEXT_COLUMN = "text"
PIECE_CHARS = 1 << 20
MOST_KEYS = 5  # that a message lists


def document_of(record: Mapping[str, Any], place: str, reading: Reading) -> Document:
    """Returns the document that a record holds.

    place: its file and line or row, for messages
    Raises InputError for a record that holds none.
    """
    column = reading.text_column or TEXT_COLUMN
    if column not in record:
        raise _no_text(record, place, column)
    return Document(place, iter([Part(_pieces(checked_text(record[column], place, column)))]))


def needed_columns(columns: Sequence[str], place: str, reading: Reading) -> Sequence[str]:
    """Returns those columns of a table that `document_of` needs; raises InputError if a record of them holds none.

    place: its file, for messages
    """
    column = reading.text_column or TEXT_COLUMN
    if column not in columns:
        raise _no_text(columns, place, column)
    return [column]


def checked_text(value: Any, place: str, key: str) -> str:
    """Returns a value that is text; raises InputError for any other, and for text that UTF-8 cannot hold."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise InputError(f"{place}: `{quoted(key)}` is {kind}, not a string; correct or remove this record")
    try:
        _ = value.isascii() or value.encode()
    except UnicodeEncodeError as error:  # a JSON escape can give half of a surrogate pair
        character = f"U+{ord(value[error.start]):04X}"
        raise InputError(
            f"{place}: `{quoted(key)}` holds a lone surrogate, {character}; remove it, it is no text"
        ) from None
    return value


def _no_text(keys: Iterable[str], place: str, column: str) -> InputError:
    keys = list(keys)
    listed = quoted(", ".join(map(repr, keys[:MOST_KEYS]))) or "none"
    remedy = "give the document's text this key, or name another with --text-column"
    return InputError(f"{place}: no key `{quoted(column)}` (keys: {listed}); {remedy}")


def _pieces(text: str) -> Iterator[str]:
    return (text[begin : begin + PIECE_CHARS] for begin in range(0, len(text), PIECE_CHARS))

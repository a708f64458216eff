"""Records: an object of a jsonl file or a row of a table in; a document out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        keys = quoted(", ".join(map(repr, list(record)[:MOST_KEYS]))) or "none"
        remedy = "give the document's text this key, or name another with --text-column"
        raise InputError(f"{place}: no key `{quoted(column)}` (keys: {keys}); {remedy}")
    return Document(place, iter([Part(_pieces(checked_text(record[column], place, column)))]))


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


def _pieces(text: str) -> Iterator[str]:
    return (text[begin : begin + PIECE_CHARS] for begin in range(0, len(text), PIECE_CHARS))

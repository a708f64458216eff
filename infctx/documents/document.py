"""A document on its way from people's files to a token store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STDIN = "-"


@dataclass(frozen=True)
class Reading:
    """How the user wants the files read; None: as their content shows.

    format: of every file: a name in `infctx.documents.inputs.FORMATS`
    encoding: of texts, such as "cp1252"
    skip_bad: leaves out files, lines and rows that cannot be read, and lists them
    join: "repository": each folder is one long document, its files under headings
    text_column: the key or column that holds the text
    """

    format: str | None = None
    encoding: str | None = None
    skip_bad: bool = False
    join: str | None = None
    text_column: str | None = None


AS_THEY_ARE = Reading()


@dataclass
class Source:
    """A file to read.

    path: of the file, or "-"
    format: "text" or "jsonl"
    compression: ".gz", ".zst" or ""
    named: whether the user named this very file, and not a folder or glob that it is in
    """

    path: str
    format: str
    compression: str
    named: bool

    @property
    def num_bytes(self) -> int:
        """Returns the bytes on disk; 0 for standard input."""
        return 0 if self.path == STDIN else Path(self.path).stat().st_size


class Part(NamedTuple):
    """A stretch of a document that becomes tokens by itself: no token reaches from one part into the next.

    Where the parts of a document begin and end does not depend on what is learned, so neither do its tokens.
    """

    pieces: Iterable[str]
    """Its text, in pieces of bounded size."""
    is_learned: bool = True
    """Whether a model learns to predict its tokens."""


@dataclass
class Document:
    """A text and its origin.

    place: its file and line, for messages
    parts: to be read to the end before the next document is asked for
    learns_end: whether a model learns that the document ends there
    form: what its record was recognized as, for the summary
    """

    place: str
    parts: Iterator[Part]
    learns_end: bool = True
    form: str = "text"

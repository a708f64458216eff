"""A document on its way from people's files to a token store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STDIN = "-"


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
    """

    place: str
    parts: Iterator[Part]
    learns_end: bool = True

"""A document on its way from people's files to a token store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from infctx.errors import InputError

if TYPE_CHECKING:
    from infctx.hub.files import HubFile

STDIN = "-"
FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
REPOSITORY, STORE = "repository", "store"


@dataclass(frozen=True)
class Reading:
    """How the user wants the files read; None: as their content shows.

    format: of every file: one of FORMATS
    encoding: of texts, such as "cp1252"
    skip_bad: leaves out files, lines and rows that cannot be read, and lists them
    join: "repository": each folder is one long document, its files under headings
    text_column: the key or column that holds the text
    from_tokenizer: the tokenizer of a token store without a store.json
    form: of records: a name in `infctx.documents.forms.FORMS`
    template: how chats become text: a name in `infctx.documents.templates.BUILT_IN`, or a file of the user's
    learn: what a model learns of records with roles: "answers", "all", or roles with commas between them
    split, config: of datasets on the hub, hf:OWNER/DATASET (see `infctx.hub.datasets`)
    limit: the most documents to read; files on the hub that are not needed for them are not downloaded
    """

    format: str | None = None
    encoding: str | None = None
    skip_bad: bool = False
    join: str | None = None
    text_column: str | None = None
    from_tokenizer: str | None = None
    form: str | None = None
    template: str | None = None
    learn: str = "answers"
    split: str | None = None
    config: str | None = None
    limit: int | None = None


AS_THEY_ARE = Reading()


@dataclass
class Source:
    """A file to read.

    path: of the file, or "-"
    format: what it holds, one of FORMATS; REPOSITORY for a folder that is one document; STORE for a token store
    compression: ".gz", ".zst" or ""
    named: whether the user named this very file, and not a folder or glob that it is in
    files: those of a repository, in order, or of a store
    hub_file: the file on the hub that this is; it is downloaded when it is first opened
    """

    path: str
    format: str
    compression: str
    named: bool
    files: list[Path] = field(default_factory=list)
    hub_file: HubFile | None = None

    @property
    def file(self) -> Path:
        """Returns the file to open; one on the hub is downloaded first, so ask only when it is needed."""
        if self.hub_file is None:
            return Path(self.path)
        from infctx.hub.files import download  # it loads huggingface_hub

        return download(self.hub_file)

    @property
    def num_bytes(self) -> int:
        """Returns the bytes on disk or on the hub; 0 for standard input, and for what has gone since."""
        if self.hub_file is not None:
            return self.hub_file.num_bytes or 0
        sizes = 0
        for path in self.files or ([] if self.path == STDIN else [Path(self.path)]):
            with suppress(OSError):
                sizes += path.stat().st_size
        return sizes


Records = Iterator[tuple[str, Mapping[str, Any] | InputError]]
"""Records of a file, each with its file and line or row, for messages; or an error where one cannot be read."""


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
    roles: who takes each of its turns
    """

    place: str
    parts: Iterator[Part]
    learns_end: bool = True
    form: str = "text"
    roles: tuple[str, ...] = ()

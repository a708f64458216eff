"""Documents: files in, documents out, one by one, in memory that does not grow with the files.

A text is one document, and so is a repository. In every other file each record is one (see documents/records).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from infctx.documents.blocks import NotText, blocks_of, decoded, name_of
from infctx.documents.document import AS_THEY_ARE, REPOSITORY, STORE, Document, Part, Reading, Records, Source
from infctx.documents.forms import FormTally
from infctx.documents.json_records import json_records
from infctx.documents.records import document_of
from infctx.documents.tables import csv_records, parquet_records
from infctx.errors import InputError
from infctx.small_texts import counted, quoted

MOST_FILES = 20  # in another encoding, that a message lists
MOST_LINES = 5  # of a summary about files
MOST_SHOWN = 3  # of what is left out
MOST_NAME = 4096  # letters of the name of a file
HEADING = "==> {} <==\n"
"""The line above each file of a repository, as `head` and `tail` write it."""


@dataclass
class ReadLog:
    """What happens while files are read.

    on_bytes: called with the number of bytes read from disk since its last call
    on_bad: called with the error of each file, line and row that is left out
    tally: counts the forms and roles of records
    counts: the records of each (file, format, form) that are documents
    num_bad: files, lines and rows left out; first_bad: the errors of the first few
    """

    on_bytes: Callable[[int], object] = lambda num_bytes: None
    on_bad: Callable[[InputError], object] = lambda error: None
    tally: FormTally = field(default_factory=lambda: FormTally(AS_THEY_ARE))
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    num_bad: int = 0
    first_bad: list[str] = field(default_factory=list)

    def leave_out(self, error: InputError) -> None:
        """Takes note of a file, line or row that is left out."""
        self.num_bad += 1
        if len(self.first_bad) < MOST_SHOWN:
            self.first_bad.append(error.lines[0])
        self.on_bad(error)

    def count(self, name: str, format: str, form: str) -> None:
        """Takes note of a record that is a document."""
        self.counts[name, format, form] += 1

    def lines(self) -> list[str]:
        """Returns lines for the user about the files with records: their format, and the form of the records."""
        counts = dict(self.counts)
        if len(counts) > MOST_LINES:
            number = Counter(format for _, format in {(path, format) for path, format, _ in counts})
            grouped: Counter[tuple[str, str, str]] = Counter()
            for (_, format, form), count in counts.items():
                grouped[counted(number[format], "file"), format, form] += count
            counts = dict(grouped)
        return [
            f"{name}: {counted(count, 'record')} ({format}): {form}" for (name, format, form), count in counts.items()
        ]


def read_documents(
    sources: Sequence[Source], reading: Reading = AS_THEY_ARE, log: ReadLog | None = None
) -> Iterator[Document]:
    """Yields the documents of all sources, in order.

    Raises InputError, naming file and place, for the first file, line or row that cannot be read, or leaves them out
    with `reading.skip_bad`; and where there is no document at all.
    """
    log = log or ReadLog()
    count = 0
    for source in sources:
        for document in _documents_of(source, reading, log):
            count += 1
            yield document
            if count == reading.limit:
                return
    if not count:
        names = ", ".join(name_of(source) for source in sources[:3])
        reason = f"all is left out, the first for this: {log.first_bad[0]}" if log.first_bad else "check the inputs"
        raise InputError(f"{names}: no documents in there; {reason}")


def with_other_files(error: NotText, sources: Sequence[Source], reading: Reading) -> InputError:
    """Returns an error that lists all files in another encoding, so that they can be converted at once."""
    texts = (text for source in sources for text in _texts_of(source))
    problems = (_problem(text, reading) for text in texts)
    errors = list(islice((problem for problem in problems if isinstance(problem, NotText)), MOST_FILES))
    if len(errors) < 2:
        return error
    most = "at least " if len(errors) >= MOST_FILES else ""
    return InputError(
        f"{most}{len(errors)} files cannot be read as text; give their --encoding, or leave them out with --skip-bad",
        *(str(found).split("; ")[0] for found in errors),
    )


def _texts_of(source: Source) -> list[Source]:
    if source.format == REPOSITORY:
        return [Source(str(path), "text", "", False) for path in source.files]
    return [source] if source.format not in ("parquet", STORE) and Path(source.path).is_file() else []


def _documents_of(source: Source, reading: Reading, log: ReadLog) -> Iterator[Document]:
    name = name_of(source)
    if source.format == REPOSITORY:
        yield Document(name, iter([Part(_repository_text(source, reading, log))]))
    elif source.format == "text":
        # Once a piece of a text is passed on it cannot be taken back, so all of it is checked before.
        can_be_read_twice = source.hub_file is not None or Path(source.path).is_file()
        if reading.skip_bad and can_be_read_twice and (problem := _problem(source, reading)):
            log.leave_out(problem)
            return
        blocks = _blocks_with_content(source, log)
        yield Document(name, iter([Part(decoded(blocks, name, reading.encoding))]))
    else:
        for place, record in _records_of(source, reading, log):
            try:
                if isinstance(record, InputError):
                    raise record
                document = document_of(record, place, reading)
                log.tally.add(document, name)
            except InputError as error:
                if not reading.skip_bad:
                    raise
                log.leave_out(error)
            else:
                log.count(name, source.format, document.form)
                yield document


def _records_of(source: Source, reading: Reading, log: ReadLog) -> Records:
    """Yields the records of a file; an error that ends them is the last of them."""
    name = name_of(source)
    try:
        if source.format == "parquet":
            yield from parquet_records(source, reading, log.on_bytes)
        elif source.format in ("csv", "tsv"):
            yield from csv_records(_blocks_with_content(source, log), name, source.format, reading)
        else:
            blocks = _blocks_with_content(source, log)
            yield from json_records(blocks, name, reading.encoding, source.format == "jsonl")
    except InputError as error:
        yield name, error


def _blocks_with_content(source: Source, log: ReadLog) -> Iterator[bytes]:
    """Returns the blocks of a file; raises InputError for a file that the user named and that is empty."""
    blocks: Iterator[bytes] = blocks_of(source, log.on_bytes)
    first = next(blocks, None)
    if first is None and source.named:
        raise InputError(f"{name_of(source)}: empty; name a file with text in it")
    return chain([first or b""], blocks)


def _repository_text(source: Source, reading: Reading, log: ReadLog) -> Iterator[str]:
    """Yields the text of all files of a repository, each with its heading above it and an empty line below."""
    for path in source.files:
        file = Source(str(path), "text", "", False)
        if reading.skip_bad and (problem := _problem(file, reading)):
            log.leave_out(problem)
            continue
        yield HEADING.format(quoted(path.relative_to(source.path).as_posix(), MOST_NAME))
        last = "\n"
        for piece in decoded(blocks_of(file, log.on_bytes), str(path), reading.encoding):
            yield piece
            last = piece
        yield "\n" if last.endswith("\n") else "\n\n"


def _problem(source: Source, reading: Reading) -> InputError | None:
    """Returns what is wrong with a text, all of which is read; None if nothing is."""
    try:
        for _ in decoded(_blocks_with_content(source, ReadLog()), name_of(source), reading.encoding):
            pass
    except InputError as error:
        return error
    return None

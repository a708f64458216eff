"""Inputs: names of files, folders and globs in, the files to read out, and a line about everything that is left out.

Folders and globs give the files whose suffix says what they hold. With a format, they give files of any other suffix
too, except for hidden files and files that are binary. "-" is standard input.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from infctx.documents.document import AS_THEY_ARE, STDIN, Reading, Source
from infctx.documents.text import first_bytes
from infctx.errors import InputError
from infctx.small_texts import counted, quoted

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl"}
COMPRESSIONS = (".gz", ".zst")
KNOWN = ".txt, .md, .jsonl (or .gz, .zst of them)"
MAGICS = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
"""First bytes of files that are not UTF-8 text."""
OTHER, HIDDEN, BINARY = "", "hidden ", "binary "  # reasons for leaving a file out
REMEDIES = {
    OTHER: "--format text takes those that are text too",
    HIDDEN: "name those that you want",
    BINARY: "convert them to UTF-8 text first",
}
MOST_KINDS, MOST_NAMES = 5, 3  # that a line lists


@dataclass
class _File:
    """A file that an input leads to. Two inputs lead to the same file if its real path is the same."""

    path: Path
    named: bool = False
    hidden: bool = False

    @cached_property
    def real(self) -> str:
        return os.path.realpath(self.path)


def find_sources(inputs: Sequence[str], reading: Reading = AS_THEY_ARE) -> tuple[list[Source], list[str]]:
    """Returns the files that `inputs` name, in their order, each folder and glob sorted by name; and lines for the user
    about files left out or named twice.

    reading: its format is that of standard input and of files with any other suffix
    Raises InputError for names without files, and for files named directly that cannot be read as text.
    """
    input_format = reading.format
    if input_format not in (None, "text", "jsonl"):
        raise InputError(f"format {input_format!r} is not known; choose text or jsonl")
    if not inputs:
        raise InputError("nothing to read; name files, folders, globs, or - for standard input")
    if list(inputs).count(STDIN) > 1:
        raise InputError("standard input (-) is named twice; it can be read only once")
    found: dict[str, Source] = {}  # by real path
    left_out: dict[str, tuple[str, str]] = {}  # by real path: the reason, and the kind of file
    twice: list[str] = []
    for name in inputs:
        if name == STDIN:
            found[STDIN] = _standard_input(input_format)
            continue
        files = _files_of(name)
        for file in files:
            source = found.get(file.real) or _taken(file, input_format)
            if file.real in found:
                twice.append(str(file.path))
                found[file.real].named |= file.named
            elif isinstance(source, Source):
                found[file.real] = source
                left_out.pop(file.real, None)  # its folder came first, and now it is named
            else:
                left_out[file.real] = source
        if not any(file.real in found for file in files):
            lines = _left_out_lines(left_out[file.real] for file in files)
            raise InputError(f"{name}: nothing in there to read; {'; '.join(lines) or 'check the path'}")
    return list(found.values()), [*_left_out_lines(left_out.values()), *_twice_lines(twice)]


def _standard_input(input_format: str | None) -> Source:
    if input_format is None:
        raise InputError("standard input has no suffix that gives its format; add --format text or --format jsonl")
    return Source(STDIN, input_format, "", True)


def _files_of(name: str) -> list[_File]:
    """Yields the files that an input leads to; InputError if there are none."""
    path = Path(name)
    if path.is_dir():
        return _below(path)
    if path.exists():
        return [_File(path, named=True)]
    if not glob.has_magic(name):
        raise InputError(f"{name}: no such file or folder; check the path")
    matches = [Path(match) for match in glob.glob(name, recursive=True)]
    if not matches:
        raise InputError(f"{name}: no file matches this pattern; check it, and put it in quotes")
    # With ** a file can be matched by itself and through its folder.
    files = {file.path: file for match in matches for file in (_below(match) if match.is_dir() else [_File(match)])}
    return [files[path] for path in sorted(files) if path.is_file()]


def _below(folder: Path) -> list[_File]:
    return [
        _File(path, hidden=any(part.startswith(".") for part in path.relative_to(folder).parts))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def _taken(file: _File, input_format: str | None) -> Source | tuple[str, str]:
    """Returns the file as a source, or the reason to leave it out and its kind."""
    path, named = file.path, file.named
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    source = Source(str(path), FORMATS.get(suffix) or input_format or "text", compression, named)
    if suffix in FORMATS:
        return source
    kind = quoted(suffix + compression, 20) or "without a suffix"
    if file.hidden:
        return HIDDEN, kind
    if input_format is None and not named:
        return OTHER, kind
    binary = _binary_kind(source)
    if binary and not named:
        return BINARY, kind
    if binary:
        raise InputError(f"{path}: is {binary}; convert it to UTF-8 text first")
    if input_format is None and suffix in (".html", ".htm", ".xhtml"):
        raise InputError(
            f"{path}: is HTML; convert it to text first, for with --format text its tags would be trained on as text"
        )
    if input_format is None:
        raise InputError(f"{path}: its suffix is not one of {KNOWN}; say what it holds: --format text or jsonl")
    return source


def _binary_kind(source: Source) -> str | None:
    """Returns the kind of a file that is not text, from its first bytes; None for text."""
    if not Path(source.path).is_file():  # a pipe can be read only once
        return None
    first = first_bytes(source)
    if b"mimetypeapplication/epub+zip" in first[:100]:
        return "an EPUB"
    known = [kind for magic, kind in MAGICS.items() if first.startswith(magic)]
    return known[0] if known else "a binary file" if b"\0" in first else None


def _left_out_lines(left_out: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a line for each reason: how many files of which kinds, the commonest first, and how to include them."""
    counts = Counter(left_out)
    lines = []
    for reason, remedy in REMEDIES.items():
        kinds = sorted((-count, kind) for (why, kind), count in counts.items() if why == reason)
        if not kinds:
            continue
        total = -sum(count for count, _ in kinds)
        listed = [f"{-count:,} {kind}" for count, kind in kinds[:MOST_KINDS]]
        if more := len(kinds) - MOST_KINDS if len(kinds) > MOST_KINDS else 0:
            listed.append(f"and {counted(more, 'more kind')}")
        lines.append(f"left out {counted(total, f'{reason}file')}: {', '.join(listed)}; {remedy}")
    return lines


def _twice_lines(twice: Sequence[str]) -> list[str]:
    if not twice:
        return []
    more = f" and {len(twice) - MOST_NAMES:,} more" if len(twice) > MOST_NAMES else ""
    names = ", ".join(twice[:MOST_NAMES]) + more
    return [f"{counted(len(twice), 'file')} named twice, taken once: {names}"]

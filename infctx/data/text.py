"""Documents: names of files, folders and globs in, texts out, piece by piece, in memory that does not grow with them.

A .txt or .md file is one document, a line of a .jsonl file (an object with the key `text`) is one document; each may be
compressed (.gz, .zst). "-" is standard input. Texts are UTF-8, a byte order mark is dropped, newlines stay as they are.
"""

import codecs
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import zstandard

from infctx.errors import InputError

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl"}
COMPRESSIONS = (".gz", ".zst")
STDIN = "-"
BLOCK_BYTES = 1 << 20
# A zstd frame can grow 30,000 times, and what a call is given it expands at once.
ZSTD_BLOCK_BYTES = 4 << 10
# A line is parsed in one go; a document this long belongs into a text file.
MAX_LINE_BYTES = 256 << 20


@dataclass
class Source:
    """A file to read: its path (or "-"), what is in it, and whether the user named it (and not a folder or glob)."""

    path: str
    format: str
    compression: str
    named: bool

    @property
    def num_bytes(self) -> int:
        """Bytes on disk; 0 for standard input."""
        return 0 if self.path == STDIN else Path(self.path).stat().st_size


@dataclass
class Document:
    """A text in pieces of bounded size, to be used up before the next document is asked for, and where it is from."""

    place: str
    pieces: Iterator[str]


def find_sources(inputs: Sequence[str], input_format: str | None = None) -> list[Source]:
    """The files that `inputs` name, in the order of the inputs, each folder and glob sorted by name.

    `input_format` ("text" or "jsonl") says what is in standard input and in named files of any other suffix.
    Raises InputError for what is missing, matches nothing or has an unsupported suffix.
    """
    if input_format not in (None, "text", "jsonl"):
        raise InputError(f"format {input_format!r} is not known: choose text or jsonl")
    if not inputs:
        raise InputError("nothing to read: name files, folders, globs, or - for standard input")
    if list(inputs).count(STDIN) > 1:
        raise InputError("standard input (-) is named twice: it can be read once")
    return [source for name in inputs for source in _sources_of(name, input_format)]


def read_documents(sources: Sequence[Source], on_bytes: Callable[[int], object] | None = None) -> Iterator[Document]:
    """The documents of all sources in order; `on_bytes` is told how many bytes were read on disk since the last call.

    Raises InputError, naming file and place, for empty files, bytes that are not UTF-8, broken lines and damaged
    compression, and when there is no document at all.
    """
    count = 0
    for source in sources:
        for document in _documents_of(source, on_bytes or (lambda num_bytes: None)):
            count += 1
            yield document
    if not count:
        raise InputError(f"{', '.join(source.path for source in sources[:3])}: no documents in there: check the inputs")


def _sources_of(name: str, input_format: str | None) -> list[Source]:
    path = Path(name)
    if name == STDIN:
        if input_format is None:
            raise InputError("standard input has no suffix that tells its format: add --format text or --format jsonl")
        return [Source(STDIN, input_format, "", True)]
    if path.is_dir():
        found = _readable_files(path.rglob("*"))
        problem = "no file in this folder is"
    elif path.exists():
        source = _source(path, input_format, named=True)
        found = [source] if source else []
        problem = "its suffix is not"
    elif glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        if not matches:
            raise InputError(f"{name}: no file matches this pattern: check it (and quote it)")
        # With ** a file can be matched by itself and through its folder.
        below = [file for match in matches for file in (match.rglob("*") if match.is_dir() else [match])]
        found = _readable_files(dict.fromkeys(below))
        problem = "no match of this pattern is"
    else:
        raise InputError(f"{name}: no such file or folder: check the path")
    if not found:
        known = ", ".join(FORMATS)
        raise InputError(f"{name}: {problem} one of {known} (or .gz, .zst of them): rename it or give its --format")
    return found


def _readable_files(paths: Iterable[Path]) -> list[Source]:
    sources = [_source(path, None, named=False) for path in sorted(paths) if path.is_file()]
    return [source for source in sources if source]


def _source(path: Path, input_format: str | None, named: bool) -> Source | None:
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    text_format = FORMATS.get(suffix, input_format)
    return Source(str(path), text_format, compression, named) if text_format else None


def _documents_of(source: Source, on_bytes: Callable[[int], object]) -> Iterator[Document]:
    blocks = _blocks(source, on_bytes)
    first = next(blocks, None)
    if first is None and source.named:
        raise InputError(f"{_name(source)}: empty: name a file with text in it")
    blocks = chain([first or b""], blocks)
    if source.format == "text":
        yield Document(_name(source), _decoded(blocks, _name(source)))
        return
    for number, line in enumerate(_lines(blocks, _name(source)), start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            place = f"{_name(source)}:{number}"
            yield Document(place, _slices(_text_of_line(line, place)))


def _blocks(source: Source, on_bytes: Callable[[int], object]) -> Iterator[bytes]:
    """The decompressed bytes of a file in blocks, none of them empty."""
    told = 0
    try:
        with nullcontext(sys.stdin.buffer) if source.path == STDIN else open(source.path, "rb") as file:
            for block in _decompressed(source, file):
                now = told + len(block) if source.path == STDIN else file.tell()
                on_bytes(now - told)
                told = now
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(
            f"{source.path}: damaged {source.compression} file ({error}): copy or compress it again"
        ) from None
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read ({error.strerror}): check the file") from None


def _decompressed(source: Source, file: BinaryIO) -> Iterator[bytes]:
    if source.compression == ".zst":
        yield from _zstd_blocks(file)
        return
    reader = gzip.GzipFile(fileobj=file) if source.compression == ".gz" else file
    while block := reader.read(BLOCK_BYTES):
        yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """All frames of a file; the package's stream reader takes the end of the file for the end of the frame."""
    frame, buffer = None, bytearray()
    while data := file.read(ZSTD_BLOCK_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            buffer += frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
        while len(buffer) >= BLOCK_BYTES:
            yield bytes(buffer[:BLOCK_BYTES])
            del buffer[:BLOCK_BYTES]
    if frame:
        raise EOFError("it ends inside a frame")
    if buffer:
        yield bytes(buffer)


def _decoded(blocks: Iterator[bytes], name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, beginning = 0, True
    for block in chain(blocks, [b""]):
        held_back = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(block, final=not block and offset > 0)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, name, offset - held_back) from None
        offset += len(block)
        if piece and beginning:
            piece, beginning = piece.removeprefix("\ufeff"), False
        if piece:
            yield piece


def _lines(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    number, length = 1, 0
    parts: list[bytes] = []  # of the line that is not complete yet
    for block in blocks:
        *complete, rest = block.split(b"\n")
        if complete:
            complete[0] = b"".join(parts) + complete[0]
            yield from complete
            number, parts, length = number + len(complete), [], 0
        parts.append(rest)
        length += len(rest)
        if length > MAX_LINE_BYTES:
            raise InputError(
                f"{name}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB, which cannot be parsed in bounded "
                "memory: put this document into a .txt file"
            )
    yield b"".join(parts)


def _text_of_line(line: bytes, place: str) -> str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(error, place, 0) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg}, column {error.colno}): correct or remove the line") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python reads
        raise InputError(f"{place}: not JSON ({error}): correct or remove the line") from None
    if not isinstance(value, dict):
        raise InputError(f'{place}: not a JSON object but {type(value).__name__}: write {{"text": "..."}}')
    if "text" not in value:
        keys = ", ".join(map(repr, list(value)[:5])) or "none"
        raise InputError(f"{place}: no key `text` (keys: {keys}): give the document's text this key")
    if not isinstance(value["text"], str):
        raise InputError(f"{place}: `text` is {type(value['text']).__name__}, not a string: correct or remove the line")
    if b"\\u" in line:  # only an escape can bring in half of a surrogate pair
        try:
            value["text"].encode()
        except UnicodeEncodeError as error:
            character = f"U+{ord(value['text'][error.start]):04X}"
            raise InputError(f"{place}: `text` holds a lone surrogate, {character}: remove it, it is no text") from None
    return value["text"]


def _slices(text: str) -> Iterator[str]:
    return (text[begin : begin + BLOCK_BYTES] for begin in range(0, len(text), BLOCK_BYTES))


def _not_utf8(error: UnicodeDecodeError, place: str, offset: int) -> InputError:
    byte = error.object[error.start]
    return InputError(f"{place}: not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}: convert it to UTF-8")


def _name(source: Source) -> str:
    return "standard input" if source.path == STDIN else source.path

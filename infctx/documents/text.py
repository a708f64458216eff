"""Documents: files in, texts out, piece by piece, in memory that does not grow with them.

A text file is one document; in a jsonl file each line is one (an object with the key `text`). Both may be compressed
(.gz, .zst). Texts are UTF-8; a byte order mark is dropped, and newlines stay as they are.
"""

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import chain
from typing import Any, BinaryIO

import zstandard

from infctx.documents.document import STDIN, Document, Part, Reading, Source
from infctx.documents.records import document_of
from infctx.errors import InputError

BLOCK_BYTES = 1 << 20
# A zstd frame can grow 30,000 times, and everything in one call is expanded at once.
ZSTD_BLOCK_BYTES = 4 << 10
# A line is parsed as a whole; a document this long belongs in a text file.
MAX_LINE_BYTES = 256 << 20


def read_documents(
    sources: Sequence[Source], reading: Reading, on_bytes: Callable[[int], object] | None = None
) -> Iterator[Document]:
    """Yields the documents of all sources, in order.

    on_bytes: called with the number of bytes read from disk since its last call
    Raises InputError, naming file and place, for empty files, bytes that are not UTF-8, broken lines and damaged
    compression, and where there is no document at all.
    """
    count = 0
    for source in sources:
        for document in _documents_of(source, reading, on_bytes or (lambda num_bytes: None)):
            count += 1
            yield document
    if not count:
        raise InputError(f"{', '.join(source.path for source in sources[:3])}: no documents in there; check the inputs")


def first_bytes(source: Source) -> bytes:
    """Returns the beginning of a file, decompressed: at most one block."""
    with closing(_blocks(source, lambda num_bytes: None)) as blocks:
        return next(blocks, b"")


def _documents_of(source: Source, reading: Reading, on_bytes: Callable[[int], object]) -> Iterator[Document]:
    blocks: Iterator[bytes] = _blocks(source, on_bytes)
    first = next(blocks, None)
    if first is None and source.named:
        raise InputError(f"{_name(source)}: empty; name a file with text in it")
    blocks = chain([first or b""], blocks)
    if source.format == "text":
        yield Document(_name(source), iter([Part(_decoded(blocks, _name(source)))]))
        return
    for number, line in enumerate(_lines(blocks, _name(source)), start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            place = f"{_name(source)}:{number}"
            yield document_of(_record(line, place), place, reading)


def _blocks(source: Source, on_bytes: Callable[[int], object]) -> Generator[bytes, None, None]:
    """Yields the decompressed bytes of a file in blocks, none of them empty."""
    counted = 0
    try:
        with nullcontext(sys.stdin.buffer) if source.path == STDIN else open(source.path, "rb") as file:
            on_disk = source.path != STDIN and file.seekable()  # and not a pipe
            for block in _decompressed(source, file):
                now = file.tell() if on_disk else counted + len(block)
                on_bytes(now - counted)
                counted = now
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(
            f"{source.path}: damaged {source.compression} file ({error}); copy or compress it again"
        ) from None
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read ({error.strerror}); check the file") from None


def _decompressed(source: Source, file: BinaryIO) -> Iterator[bytes]:
    if source.compression == ".zst":
        yield from _zstd_blocks(file)
        return
    reader = gzip.GzipFile(fileobj=file) if source.compression == ".gz" else file
    while block := reader.read(BLOCK_BYTES):
        yield block


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Reads all frames of a file. The package's own stream reader does not notice a frame that is cut short."""
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
    parts: list[bytes] = []  # of the line whose end has not come yet
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
                f"{name}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB, too long to be parsed; "
                "put this document into a .txt file"
            )
    yield b"".join(parts)


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(error, place, 0) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg}, column {error.colno}); correct or remove the line") from None
    except (ValueError, RecursionError) as error:  # a number too long, or a nesting too deep, for Python
        raise InputError(f"{place}: not JSON ({error}); correct or remove the line") from None
    if not isinstance(value, dict):
        raise InputError(f'{place}: not a JSON object but {type(value).__name__}; write {{"text": "..."}}')
    return value


def _not_utf8(error: UnicodeDecodeError, place: str, offset: int) -> InputError:
    byte = error.object[error.start]
    return InputError(f"{place}: not UTF-8: byte 0x{byte:02x} at offset {offset + error.start}; convert it to UTF-8")


def _name(source: Source) -> str:
    return "standard input" if source.path == STDIN else source.path

"""Blocks: a file in; its bytes out, decompressed, then its text, in memory that does not grow with it.

The first bytes decide about the compression and, without `--encoding`, the byte order mark about the encoding: UTF-8,
UTF-16 or UTF-32; no mark means UTF-8. Newlines stay as they are.
"""

from __future__ import annotations

import codecs
import gzip
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from itertools import chain
from typing import BinaryIO

import zstandard

from infctx.documents.document import STDIN, Source
from infctx.errors import InputError
from infctx.small_texts import quoted

BLOCK_BYTES = 1 << 20
# A zstd frame can grow 30,000 times, and everything in one call is expanded at once.
ZSTD_BLOCK_BYTES = 4 << 10
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark begins it
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
HALF_A_CHARACTER = rb"\ud800+2AA-"  # in the escapes of Python, and in UTF-7
BINARY = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
    b"Obj\x01": "an Avro file",
    b"ARROW1": "an Arrow file",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"SQLite format 3": "an SQLite database",
}
"""First bytes of files that are not text."""


class NotText(InputError):
    """A file that is in another encoding, or binary."""


def blocks_of(source: Source, on_bytes: Callable[[int], object]) -> Generator[bytes, None, None]:
    """Yields the decompressed bytes of a file in blocks, none of them empty.

    on_bytes: called with the number of bytes read from disk since its last call
    Raises InputError for a file that cannot be read and for damaged compression.
    """
    counted = 0
    compression = source.compression
    try:
        with nullcontext(sys.stdin.buffer) if source.path == STDIN else open(source.file, "rb") as file:
            on_disk = source.path != STDIN and file.seekable()  # and not a pipe
            if on_disk and not compression:
                first = file.read(4)
                compression = next((name for magic, name in COMPRESSED.items() if first.startswith(magic)), "")
                file.seek(0)
            for block in _decompressed(compression, file):
                now = file.tell() if on_disk else counted + len(block)
                on_bytes(now - counted)
                counted = now
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{source.path}: damaged {compression} file ({error}); copy or compress it again") from None
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read ({error.strerror}); check the file") from None


def first_bytes(source: Source) -> bytes:
    """Returns the beginning of a file, decompressed: at most one block."""
    with closing(blocks_of(source, lambda num_bytes: None)) as blocks:
        return next(blocks, b"")


def not_text(first: bytes, given: str | None) -> tuple[str, str] | None:
    """Returns the kind of a file that is not text and what to do about it, from its first bytes; None for text.

    given: the encoding that the user gave
    """
    convert = "convert it to UTF-8 text first"
    if b"mimetypeapplication/epub+zip" in first[:100]:
        return "an EPUB", convert
    if known := [kind for magic, kind in BINARY.items() if first.startswith(magic)]:
        return known[0], "add --format parquet" if first.startswith(b"PAR1") else convert
    if b"\0" not in first or _is_wide(encoding_of(first, given)):
        return None
    for encoding, zeros in (("utf-16-le", first[1::2]), ("utf-16-be", first[::2])):
        if zeros.count(0) > len(zeros) // 2:  # as in English, and not in other bytes
            return "text in UTF-16 without a byte order mark, it seems", f"add --encoding {encoding}"
    return f"a binary file (byte {first.index(0):,} is NUL)", convert


def encoding_of(first: bytes, given: str | None) -> str:
    """Returns the encoding of a text as Python names it: by its mark, or the one given, or UTF-8."""
    return codecs.lookup(next((name for mark, name in MARKS.items() if first.startswith(mark)), given or "utf-8")).name


def check_encoding(name: str | None) -> None:
    """Raises InputError for the name of an encoding that Python does not have, or that may give half a character."""
    try:
        if name is not None:
            HALF_A_CHARACTER.decode(name, "replace").encode()
            codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        raise InputError(
            f"--encoding: {quoted(name or '')} is not known; give one such as cp1252, latin-1, utf-16-le, gb18030"
        ) from None


def decoded(blocks: Iterator[bytes], name: str, given: str | None) -> Iterator[str]:
    """Yields the text of a file in pieces, none of them empty, without its byte order mark.

    name: of the file, for messages
    given: the encoding that the user gave
    Raises NotText for a binary file, and for a byte that does not fit the encoding, with its offset.
    """
    encoding, blocks = _begun(blocks, name, given)
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, beginning = 0, True
    for block in chain(blocks, [b""]):
        if 0 in block and not _is_wide(encoding):
            raise NotText(
                f"{name}: byte {offset + block.index(0):,} is NUL, which no text has; convert it, or add --skip-bad"
            )
        held_back = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(block, final=not block and offset > 0)
        except UnicodeDecodeError as error:
            raise not_in_encoding(error, name, encoding, offset - held_back) from None
        except UnicodeError as error:  # no place in it: such as a text in UTF-16 without its mark
            others = f"--encoding {encoding}-le or {encoding}-be" if _is_wide(encoding) else "another --encoding"
            problem = f"{name}: not {encoding.upper()} ({quoted(str(error))})"
            raise NotText(f"{problem}; give {others}, or add --skip-bad") from None
        offset += len(block)
        if piece and beginning:
            piece, beginning = piece.removeprefix("\ufeff"), False
        if piece:
            yield piece


def in_utf8(blocks: Iterator[bytes], name: str, given: str | None) -> Iterator[bytes]:
    """Yields a text in any encoding as UTF-8, without its byte order mark; bytes of a text in UTF-8 are not checked."""
    encoding, blocks = _begun(blocks, name, given)
    if encoding != "utf-8":
        yield from (piece.encode() for piece in decoded(blocks, name, given))
        return
    yield next(blocks, b"").removeprefix(codecs.BOM_UTF8)
    yield from blocks


def name_of(source: Source) -> str:
    """Returns what messages call a file."""
    return "standard input" if source.path == STDIN else source.path


def not_in_encoding(error: UnicodeDecodeError, place: str, encoding: str, offset: int) -> NotText:
    """Returns the error for a byte that does not fit; offset: that of the decoded bytes in the file or line."""
    byte = error.object[error.start]
    remedy = "convert it, add its --encoding, such as cp1252, or --skip-bad"
    if encoding != "utf-8":  # its mark says so, or the user
        remedy = "it is cut off, or in another encoding: copy or convert it, or add --skip-bad"
    return NotText(f"{place}: not {encoding.upper()}: byte 0x{byte:02x} at offset {offset + error.start}; {remedy}")


def _begun(blocks: Iterator[bytes], name: str, given: str | None) -> tuple[str, Iterator[bytes]]:
    """Returns the encoding of a text and all of its blocks; raises NotText for a binary file."""
    first = b""
    while len(first) < 4 and (block := next(blocks, b"")):  # a mark has up to four bytes
        first += block
    if problem := not_text(first, given):
        raise NotText(f"{name}: is {problem[0]}; {problem[1]}")
    return encoding_of(first, given), chain([first], blocks)


def _is_wide(encoding: str) -> bool:
    """Returns whether NUL bytes belong to its text."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def _decompressed(compression: str, file: BinaryIO) -> Iterator[bytes]:
    if compression == ".zst":
        yield from _zstd_blocks(file)
        return
    reader = gzip.GzipFile(fileobj=file) if compression == ".gz" else file
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

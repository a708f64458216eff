"""The content of a page: its bytes on disk in; a file to read it from, decompressed, out.

Neither the page nor what it was compressed from is ever whole in memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from infctx.parquet.page_headers import Page
from infctx.parquet.snappy import decompress_snappy

if TYPE_CHECKING:
    from pathlib import Path

STEP_BYTES = 4 << 20
CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD", "BROTLI")
"""As pyarrow names them. Not LZ4, a name for two ways to write a page."""


def open_page(path: Path, page: Page, codec: str) -> BinaryIO:
    """Opens what a page holds, at its first byte: the parquet file itself, or a temporary file without compression.

    Raises ValueError for damaged compression, and OSError where there is no room for a temporary file.
    """
    file = path.open("rb", STEP_BYTES >> 2)
    file.seek(page.offset)
    if codec == "UNCOMPRESSED" or not page.is_compressed:
        return file
    with file:
        levels = file.read(sum(page.level_bytes or ()))
        blocks = _blocks(file, page.stored_bytes - len(levels))
        return _decompressed(levels, blocks, page.num_bytes, codec)


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0:
        block = file.read(min(STEP_BYTES, num_bytes))
        if not block:
            raise ValueError("a page ends too early")
        num_bytes -= len(block)
        yield block


def _decompressed(levels: bytes, blocks: Iterator[bytes], num_bytes: int, codec: str) -> BinaryIO:
    content = cast(BinaryIO, tempfile.TemporaryFile("w+b", buffering=STEP_BYTES >> 2))  # noqa: SIM115 - it is for the caller to close
    try:
        content.write(levels)
        if codec == "SNAPPY":
            content.flush()
            _write_snappy(content.fileno(), len(levels), blocks, num_bytes)
        else:
            for block in _streamed(blocks, codec):
                content.write(block)
                if content.tell() > num_bytes:
                    raise ValueError("a page is longer than its header says")
            if content.tell() != num_bytes:
                raise ValueError("a page is shorter than its header says")
        content.seek(0)
    except BaseException:
        content.close()
        raise
    return content


def _write_snappy(file: int, begin: int, blocks: Iterator[bytes], num_bytes: int) -> None:
    # Written first: to write to a mapped file on a full disk would kill the process.
    os.lseek(file, 0, os.SEEK_END)
    for step in range(begin, num_bytes, STEP_BYTES):
        os.write(file, bytes(min(STEP_BYTES, num_bytes - step)))
    mapped = mmap.mmap(file, num_bytes)
    for _ in decompress_snappy(blocks, np.frombuffer(mapped, np.uint8)[begin:]):
        mapped.madvise(mmap.MADV_DONTNEED)  # what is written stays in the file, and leaves this process


def _streamed(blocks: Iterator[bytes], codec: str) -> Iterator[bytes]:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.PythonFile(_Reader(blocks), "r"), codec.lower()) as stream:
        while block := stream.read(STEP_BYTES):
            yield block


class _Reader:
    """Blocks as a file to read."""

    closed = False

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""

    def read(self, length: int) -> bytes:
        """Returns at most `length` of the next bytes; none at the end."""
        self._rest = self._rest or next(self._blocks, b"")
        content, self._rest = self._rest[:length], self._rest[length:]
        return content

    def close(self) -> None:
        """Leaves the file to who opened it."""

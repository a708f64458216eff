"""Writes token stores as their documents come: see data/token_store for the format."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from infctx.conventions import END_OF_DOCUMENT
from infctx.data.target_mask import TargetMaskWriter
from infctx.data.token_store import BLOCK, DTYPES, HEADER, MAGIC, VERSION, file_of, store_prefix
from infctx.errors import InputError
from infctx.files import flush_to_disk, naming_errors, temporary_name

WRITTEN_CODE = 8
# A size is an int32, so a longer document is stored as several sequences.
MAX_SEQUENCE_TOKENS = 2**31 - 1


class TokenStoreWriter:
    """Writes a store as its documents come, in memory that does not grow with it; dtype code 8 (uint16).

    A context manager: the files appear under their names, the .idx last, if the block ends without an exception, and
    not at all otherwise. There is a .mask only if some token besides the first of a document is no target. Raises
    InputError if the store exists already; an OSError (disk full) carries the name of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = store_prefix(path)
        self.num_documents = 0
        self.num_tokens = 0
        self.num_targets = 0
        self._paths = [file_of(self.path, suffix) for suffix in (".bin", ".mask", ".idx")]
        for existing in filter(Path.exists, self._paths):
            raise InputError(f"{existing}: exists already; choose another name, or remove it")
        self._temporary = [temporary_name(path, "tmp") for path in self._paths]
        self._runs: list[list[int]] = []  # of the document that is being written: [number of tokens, whether targets]
        self._mask: TargetMaskWriter | None = None
        self._lengths = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - closed by close and abort
        self._bin = open(self._temporary[0], "xb", buffering=1 << 20)  # noqa: SIM115

    def extend(self, ids: np.ndarray, are_targets: bool = True) -> None:
        """Adds ids (num_tokens,), 1..65535, to the document that is being written.

        are_targets: whether a model learns to predict them
        """
        ids = np.asarray(ids)
        if ids.size and not (ids.min() > END_OF_DOCUMENT and ids.max() <= 0xFFFF):
            raise ValueError("ids of a document are 1..65535; 0 ends a document, and larger ones do not fit in uint16")
        with naming_errors(self._temporary[0]):
            self._bin.write(ids.astype("<u2", copy=False).tobytes())
        self._add(ids.size, are_targets)

    def end_document(self, is_target: bool = True) -> bool:
        """Writes the end of the document; the next ids belong to the next one.

        is_target: whether a model learns to predict the end
        Returns whether the document is in the store: one without any target is taken back.
        """
        self._add(1, is_target)
        runs, self._runs = self._runs, []
        runs[0][0] -= 1  # nothing comes before the first token, so it is no target
        runs.insert(0, [1, False])
        length = sum(count for count, _ in runs)
        targets = sum(count for count, are_targets in runs if are_targets)
        with naming_errors(self._temporary[0]):
            if not targets and length > 1:
                self._bin.seek(2 * self.num_tokens)
                self._bin.truncate()
                return False
            self._bin.write(END_OF_DOCUMENT.to_bytes(2, "little"))
            if targets < length - 1 and self._mask is None:
                self._begin_mask()
            self._lengths.write(struct.pack("<q", length))
        if self._mask:
            self._mask.add_runs(runs)
        self.num_documents += 1
        self.num_tokens += length
        self.num_targets += targets
        return True

    def _add(self, count: int, are_targets: bool) -> None:
        if self._runs and self._runs[-1][1] == are_targets:
            self._runs[-1][0] += count
        elif count:
            self._runs.append([count, are_targets])

    def _begin_mask(self) -> None:
        """Begins the mask with the documents so far: all of their tokens are targets, but the first of each."""
        self._mask = TargetMaskWriter(self._temporary[1])
        self._lengths.flush()
        for lengths in self._written_lengths():
            for length in lengths.tolist():
                self._mask.add(1, False)
                self._mask.add(length - 1, True)
        self._lengths.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Writes the index and gives the files their names; the last document must have ended."""
        try:
            if self._runs or not self.num_documents:
                raise ValueError(f"{self.path}: a store needs at least one document, and each must have ended")
            with naming_errors(self._temporary[0]):
                self._lengths.flush()
                _sync(self._bin)
                self._bin.close()
            if self._mask:
                self._mask.close()
            with naming_errors(self._temporary[2]), open(self._temporary[2], "xb") as index:
                self._write_index(index)
                _sync(index)
            for temporary, path in zip(self._temporary, self._paths, strict=True):
                if temporary.exists():  # there may be no mask
                    os.rename(temporary, path)
            flush_to_disk(self.path.parent)
        except BaseException:
            self.abort()
            raise
        self._lengths.close()

    def abort(self) -> None:
        """Removes everything that was written."""
        for file in (self._bin, self._lengths):
            # Closing writes what is buffered. On a full disk that fails again, but the file is closed all the same.
            with contextlib.suppress(OSError):
                file.close()
        if self._mask:
            self._mask.abort()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _write_index(self, index: BinaryIO) -> None:
        num_sequences = sum(len(sizes) for sizes, _ in self._sequences())
        index.write(MAGIC + HEADER.pack(VERSION, WRITTEN_CODE, num_sequences, self.num_documents + 1))
        for sizes, _ in self._sequences():
            index.write(sizes.astype("<i4").tobytes())
        offset = 0
        for sizes, _ in self._sequences():
            ends = offset + np.cumsum(sizes) * DTYPES[WRITTEN_CODE].itemsize
            index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
            offset = int(ends[-1])
        border = 0
        index.write(struct.pack("<q", border))
        for _, counts in self._sequences():
            borders = border + np.cumsum(counts)
            index.write(borders.astype("<i8").tobytes())
            border = int(borders[-1])

    def _sequences(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields one block of documents after another: sizes of the sequences, and number of sequences per document."""
        for lengths in self._written_lengths():
            counts = -(-lengths // MAX_SEQUENCE_TOKENS)
            sizes = np.full(counts.sum(), MAX_SEQUENCE_TOKENS, np.int64)
            sizes[np.cumsum(counts) - 1] = lengths - (counts - 1) * MAX_SEQUENCE_TOKENS
            yield sizes, counts

    def _written_lengths(self) -> Iterator[np.ndarray]:
        """Yields the lengths of the documents, in blocks."""
        self._lengths.seek(0)
        while block := self._lengths.read(8 * BLOCK):
            yield np.frombuffer(block, "<i8")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

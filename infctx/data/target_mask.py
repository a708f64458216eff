"""Which tokens of a store a model learns to predict: a bit for each token, beside the store, read by place.

`NAME.mask`, little endian: magic, u64 version 1, u64 tokens of the store, u64 targets (bits that are set); then the
bits, the lowest of each byte first, padded to 8 bytes; then u64 counts[ceil(tokens / 4096)], the bits set before each
block of 4,096 tokens, so that the targets in any span can be counted without reading it. The first token of a document
is never a target: nothing comes before it. A store without this file has every other token as a target.
"""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

import numpy as np

from infctx.data.store_file import StoreFile, damaged
from infctx.files import flush_to_disk, naming_errors

MAGIC = b"INFMASK\x00"
VERSION = 1
HEADER = struct.Struct("<8sQQQ")
BLOCK_TOKENS = 4096
AT_ONCE = 1 << 22  # tokens whose bits are written at once


class TargetMask:
    """The mask of a store opened for reading; its size costs no memory.

    num_targets: bits that are set in all of it
    Raises InputError for a file that is damaged, or belongs to a store of another size.
    """

    def __init__(self, path: Path, num_tokens: int) -> None:
        self.file = StoreFile(path)
        if self.file.num_bytes < HEADER.size:
            raise damaged(path, f"cut short: {self.file.num_bytes} bytes, and the header alone has {HEADER.size}")
        magic, version, tokens, self.num_targets = HEADER.unpack(self.file.read_bytes(0, HEADER.size))
        if magic != MAGIC or version != VERSION:
            raise damaged(path, f"begins with {magic!r} and version {version}, and a mask with {MAGIC!r}, {VERSION}")
        if tokens != num_tokens:
            raise damaged(path, f"is the mask of {tokens:,} tokens, and the store beside it has {num_tokens:,}")
        self._counts_begin = _counts_begin(num_tokens)
        self._num_blocks = -(-num_tokens // BLOCK_TOKENS)
        expected = self._counts_begin + 8 * self._num_blocks
        if self.file.num_bytes != expected:
            raise damaged(path, f"has {self.file.num_bytes} bytes, and a mask of {num_tokens:,} tokens {expected}")
        self._check_counts(num_tokens)

    def count(self, begin: int, end: int) -> int:
        """Returns the number of targets among tokens begin..end-1 of the store."""
        return self._before(end) - self._before(begin)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Returns whether each of tokens begin..end-1 of the store is a target, bool (end - begin,)."""
        first = begin // 8
        data = self.file.read(HEADER.size + first, -(-end // 8) - first, np.dtype(np.uint8))
        bits = np.unpackbits(data, bitorder="little")
        return bits[begin - 8 * first : end - 8 * first].astype(bool)

    def _before(self, place: int) -> int:
        block = place // BLOCK_TOKENS
        if block == self._num_blocks:
            return self.num_targets
        before = int(self.file.read(self._counts_begin + 8 * block, 1, np.dtype("<u8"))[0])
        return before + int(np.count_nonzero(self.read(block * BLOCK_TOKENS, place)))

    def _check_counts(self, num_tokens: int) -> None:
        """Checks that no block has more targets than tokens; a wrong bit is found when it is read (data/lanes)."""
        previous = 0
        for begin in range(0, self._num_blocks, AT_ONCE):
            count = min(AT_ONCE, self._num_blocks - begin)
            counts = self.file.read(self._counts_begin + 8 * begin, count, np.dtype("<u8")).astype(np.int64)
            steps = np.diff(counts, prepend=previous)
            if (steps < 0).any() or (steps > BLOCK_TOKENS).any() or (begin == 0 and counts[0] != 0):
                raise damaged(self.file.path, "its running counts are not those of any mask")
            previous = int(counts[-1])
        if not 0 <= self.num_targets - previous <= num_tokens - BLOCK_TOKENS * max(0, self._num_blocks - 1):
            raise damaged(self.file.path, f"its running counts do not end at its {self.num_targets:,} targets")


class TargetMaskWriter:
    """Writes the mask of a store as its documents come.

    path: of the file to write, which must not exist; all memory it takes is 8 bytes per 4,096 tokens
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts = array("Q")
        self._num_tokens = self._num_targets = 0
        self._rest = np.zeros(0, bool)  # bits that do not fill a block yet
        self._file = open(path, "xb", buffering=1 << 20)  # noqa: SIM115 - closed by close and abort
        with naming_errors(path):
            self._file.write(bytes(HEADER.size))

    def add(self, count: int, is_target: bool) -> None:
        """Adds a run of tokens that are all targets, or all none."""
        for begin in range(0, count, AT_ONCE):
            self._write(np.concatenate([self._rest, np.full(min(AT_ONCE, count - begin), is_target)]))
        self._num_tokens += count

    def add_runs(self, runs: list[list[int]]) -> None:
        """Adds runs: [number of tokens, whether they are targets] for each; at once if they are short, as in a chat."""
        counts, are_targets = zip(*runs, strict=True)
        if sum(counts) > AT_ONCE:
            for count, is_target in runs:
                self.add(count, bool(is_target))
        else:
            self._write(np.concatenate([self._rest, np.repeat(np.array(are_targets, bool), counts)]))
            self._num_tokens += sum(counts)

    def close(self) -> None:
        """Writes what is left and the header, and flushes the file to disk."""
        blocks = self._rest
        with naming_errors(self._path):
            if blocks.size:
                self._put(blocks)
            self._file.write(bytes(_counts_begin(self._num_tokens) - self._file.tell()))
            self._file.write(np.frombuffer(self._counts, np.uint64).astype("<u8").tobytes())
            self._file.seek(0)
            self._file.write(HEADER.pack(MAGIC, VERSION, self._num_tokens, self._num_targets))
            self._file.close()
            flush_to_disk(self._path)

    def abort(self) -> None:
        """Closes the file and leaves it as it is, to be removed."""
        try:
            self._file.close()
        except OSError:  # a full disk: closing writes what is buffered
            self._file.close()

    def _write(self, bits: np.ndarray) -> None:
        whole = len(bits) // BLOCK_TOKENS * BLOCK_TOKENS
        with naming_errors(self._path):
            if whole:
                self._put(bits[:whole])
        self._rest = bits[whole:]

    def _put(self, bits: np.ndarray) -> None:
        """Writes bits that begin with a block."""
        for begin in range(0, len(bits), BLOCK_TOKENS):
            self._counts.append(self._num_targets)
            self._num_targets += int(np.count_nonzero(bits[begin : begin + BLOCK_TOKENS]))
        self._file.write(np.packbits(bits, bitorder="little").tobytes())


def _counts_begin(num_tokens: int) -> int:
    """Returns the place of the running counts in the file."""
    return HEADER.size + -(-num_tokens // 64) * 8

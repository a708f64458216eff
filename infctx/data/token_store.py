"""Token stores in the RWKV world's binidx format: documents of token ids on disk, read by place, written as they come.

`NAME.bin` holds the tokens back to back. `NAME.idx`, little endian: magic, u64 version 1, u8 dtype code, u64 n, u64 d,
int32 sizes[n] in tokens, int64 offsets[n] in bytes, int64 doc_idx[d]. Document i is the sequences doc_idx[i] ..
doc_idx[i + 1] - 1; nearly always that is one sequence. The last token of a document is 0, the end of document.
"""

import contextlib
import hashlib
import os
import struct
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from infctx.conventions import END_OF_DOCUMENT
from infctx.errors import InputError
from infctx.files import flush_to_disk, naming_errors, temporary_name
from infctx.small_texts import read_json

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")  # version, dtype code, n, d
ARRAYS_BEGIN = len(MAGIC) + HEADER.size
DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
WRITTEN_CODE = 8
# A size is an int32, so a longer document is stored as several sequences.
MAX_SEQUENCE_TOKENS = 2**31 - 1
BLOCK = 1 << 18  # index entries that are checked or written at once
FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 256, 4096  # of each file, evenly spaced
SUMMARY_FILE = "store.json"
"""The file that `infctx prepare` writes next to the stores of a folder: tokenizer, vocab_size, sizes of each split."""


class TokenStore:
    """A store opened for reading; neither its size nor the number of its documents costs memory.

    Opening checks the whole index. Raises InputError for a file that is damaged, is no store, or is cut short later.

    path: the name without .bin and .idx
    num_documents: documents in the store
    num_tokens: tokens of all documents, ends of documents included
    tokenizer: the name of the tokenizer that made the ids, from the store.json beside the store; None without one
    """

    document_tokens = None  # documents are whole, see infctx.data.pieces

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = store_prefix(path)
        self.idx_path, self.bin_path = _file_of(self.path, ".idx"), _file_of(self.path, ".bin")
        if not self.idx_path.exists() and not self.bin_path.exists():
            raise InputError(f"{self.path}: no token store here (.idx, .bin); make one with `infctx prepare`")
        self._index, self._data = _StoreFile(self.idx_path), _StoreFile(self.bin_path)
        self._dtype, self._num_sequences, self.num_documents = self._read_header()
        self._offsets_begin = ARRAYS_BEGIN + 4 * self._num_sequences
        self._documents_begin = self._offsets_begin + 8 * self._num_sequences
        self.num_tokens = self._check_sequences()
        self._check_documents()
        self.tokenizer = _tokenizer_of(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Returns 16 hex digits that identify a store: a hash of both files' sizes and of blocks all over them."""
        digest = hashlib.sha256()
        for file in (self._index, self._data):
            digest.update(f"{file.num_bytes} ".encode())
            last = max(0, file.num_bytes - FINGERPRINT_BLOCK)
            for number in range(FINGERPRINT_BLOCKS):
                place = last * number // (FINGERPRINT_BLOCKS - 1)
                count = min(FINGERPRINT_BLOCK, file.num_bytes - place)
                digest.update(file.read(place, count, np.dtype(np.uint8)).tobytes())
        return digest.hexdigest()[:16]

    def length(self, i: int) -> int:
        """Returns the number of tokens in document i, its end included."""
        begin, end = self._span(i)
        return end - begin

    def number(self, i: int) -> int:
        """Returns the number of document i in messages."""
        return i

    def tokens(self, i: int, begin: int, end: int) -> np.ndarray:
        """Returns tokens begin..end-1 of document i, int64 (end - begin,); InputError for negative ids in the file."""
        first, last = self._span(i)
        if not 0 <= begin <= end <= last - first:
            raise IndexError(f"{self.path}: tokens {begin}..{end} of document {i}, which has {last - first}")
        stored = self._data.read((first + begin) * self._dtype.itemsize, end - begin, self._dtype)
        tokens = stored.astype(np.int64)
        if self._dtype.kind == "i" and tokens.size and tokens.min() < 0:
            place = int(np.argmax(tokens < 0))
            raise _damaged(self.bin_path, f"token {begin + place} of document {i} is {tokens[place]}, a negative id")
        return tokens

    def _span(self, i: int) -> tuple[int, int]:
        """Returns the place of document i's first token in the .bin, and of the one after its last."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"{self.path}: document {i} of {self.num_documents}")
        first, last = self._index.read(self._documents_begin + 8 * i, 2, np.dtype("<i8")).tolist()
        return self._sequence_begin(first), self._sequence_begin(last)

    def _sequence_begin(self, sequence: int) -> int:
        if sequence == self._num_sequences:
            return self.num_tokens
        return int(self._index.read(self._offsets_begin + 8 * sequence, 1, np.dtype("<i8"))[0]) // self._dtype.itemsize

    def _read_header(self) -> tuple[np.dtype, int, int]:
        path, num_bytes = self.idx_path, self._index.num_bytes
        if num_bytes < ARRAYS_BEGIN:
            raise _damaged(path, f"cut short: {num_bytes} bytes, and the header alone has {ARRAYS_BEGIN}")
        header = self._index.read(0, ARRAYS_BEGIN, np.dtype(np.uint8)).tobytes()
        if header[: len(MAGIC)] != MAGIC:
            raise _damaged(path, f"begins with {header[: len(MAGIC)]!r}, and a binidx index with {MAGIC!r}")
        version, code, num_sequences, num_borders = HEADER.unpack(header[len(MAGIC) :])
        if version != VERSION:
            raise InputError(f"{path}: version {version} of the format; convert it to version {VERSION}")
        if code not in DTYPES:
            known = ", ".join(f"{key} ({value.name})" for key, value in DTYPES.items())
            raise InputError(f"{path}: dtype code {code}; convert it to one of {known}")
        if num_sequences < 1 or num_borders < 2:
            raise InputError(f"{path}: no documents in this store; make it again with `infctx prepare`")
        expected = ARRAYS_BEGIN + 12 * num_sequences + 8 * num_borders
        if num_bytes != expected:
            problem = "cut short" if num_bytes < expected else "trailing bytes"
            raise _damaged(
                path,
                f"{problem}: {num_bytes} bytes, where {num_sequences} sequences, {num_borders} borders take {expected}",
            )
        return DTYPES[code], num_sequences, num_borders - 1

    def _check_sequences(self) -> int:
        """Checks that sizes and offsets agree with each other and with the .bin; returns the number of tokens."""
        itemsize, bin_bytes = self._dtype.itemsize, self._data.num_bytes
        expected = 0  # offset of the next sequence
        for begin in range(0, self._num_sequences, BLOCK):
            count = min(BLOCK, self._num_sequences - begin)
            sizes = self._index.read(ARRAYS_BEGIN + 4 * begin, count, np.dtype("<i4")).astype(np.int64) * itemsize
            offsets = self._index.read(self._offsets_begin + 8 * begin, count, np.dtype("<i8"))
            self._refuse(sizes < 0, begin, "has a negative size")
            self._refuse(offsets % itemsize != 0, begin, f"has an unaligned offset (tokens take {itemsize} bytes)")
            outside = (offsets < 0) | (offsets > bin_bytes - sizes)
            self._refuse(outside, begin, f"lies outside {self.bin_path}, which has {bin_bytes} bytes")
            ends = expected + np.cumsum(sizes)
            self._refuse(offsets != ends - sizes, begin, "has an offset that does not agree with the sizes before it")
            expected = int(ends[-1])
        if expected != bin_bytes:
            raise _damaged(self.bin_path, f"trailing bytes: {bin_bytes} bytes, and the index lists {expected}")
        return expected // itemsize

    def _refuse(self, wrong: np.ndarray, begin: int, problem: str) -> None:
        if wrong.any():
            raise _damaged(self.idx_path, f"sequence {begin + int(np.argmax(wrong))} {problem}")

    def _check_documents(self) -> None:
        previous = 0
        for begin in range(0, self.num_documents + 1, BLOCK):
            count = min(BLOCK, self.num_documents + 1 - begin)
            borders = self._index.read(self._documents_begin + 8 * begin, count, np.dtype("<i8"))
            if begin == 0 and borders[0] != 0:
                raise _damaged(self.idx_path, f"doc_idx begins with {borders[0]}, not with 0")
            falling = np.diff(borders, prepend=previous) < 0
            if falling.any():
                raise _damaged(self.idx_path, f"doc_idx falls at place {begin + int(np.argmax(falling))}")
            previous = int(borders[-1])
        if previous != self._num_sequences:
            raise _damaged(self.idx_path, f"doc_idx ends at {previous}, not at the {self._num_sequences} sequences")


class TokenStoreWriter:
    """Writes a store as its documents come, in memory that does not grow with it; dtype code 8 (uint16).

    A context manager: the two files appear under their names, the .idx last, if the block ends without an exception,
    and not at all otherwise. Raises InputError if the store exists already; an OSError (disk full) carries the name of
    the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = store_prefix(path)
        self.num_documents = 0
        self.num_tokens = 0
        self._paths = [_file_of(self.path, ".bin"), _file_of(self.path, ".idx")]
        for existing in filter(Path.exists, self._paths):
            raise InputError(f"{existing}: exists already; choose another name, or remove it")
        self._temporary = [temporary_name(path, "tmp") for path in self._paths]
        self._length = 0  # tokens of the document that is being written
        self._lengths = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - closed by close and abort
        self._bin = open(self._temporary[0], "xb", buffering=1 << 20)  # noqa: SIM115

    def extend(self, ids: np.ndarray) -> None:
        """Adds ids (num_tokens,), 1..65535, to the document that is being written."""
        ids = np.asarray(ids)
        if ids.size and not (ids.min() > END_OF_DOCUMENT and ids.max() <= 0xFFFF):
            raise ValueError("ids of a document are 1..65535; 0 ends a document, and larger ones do not fit in uint16")
        with naming_errors(self._temporary[0]):
            self._bin.write(ids.astype("<u2", copy=False).tobytes())
        self._length += ids.size

    def end_document(self) -> None:
        """Writes the end of the document; the next ids belong to the next one."""
        with naming_errors(self._temporary[0]):
            self._bin.write(END_OF_DOCUMENT.to_bytes(2, "little"))
            self._lengths.write(struct.pack("<q", self._length + 1))
        self.num_documents += 1
        self.num_tokens += self._length + 1
        self._length = 0

    def close(self) -> None:
        """Writes the index and gives both files their names; the last document must have ended."""
        try:
            if self._length or not self.num_documents:
                raise ValueError(f"{self.path}: a store needs at least one document, and each must have ended")
            with naming_errors(self._temporary[0]):
                self._lengths.flush()
                _sync(self._bin)
                self._bin.close()
            with naming_errors(self._temporary[1]), open(self._temporary[1], "xb") as index:
                self._write_index(index)
                _sync(index)
            for temporary, path in zip(self._temporary, self._paths, strict=True):
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
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> "TokenStoreWriter":
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
        self._lengths.seek(0)
        while block := self._lengths.read(8 * BLOCK):
            lengths = np.frombuffer(block, "<i8")
            counts = -(-lengths // MAX_SEQUENCE_TOKENS)
            sizes = np.full(counts.sum(), MAX_SEQUENCE_TOKENS, np.int64)
            sizes[np.cumsum(counts) - 1] = lengths - (counts - 1) * MAX_SEQUENCE_TOKENS
            yield sizes, counts


def store_prefix(path: str | os.PathLike[str]) -> Path:
    """Returns the name of a store, without .bin or .idx; InputError for a folder."""
    path = Path(path)
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix("")
    if not path.name:
        raise InputError(f"{path}: is a folder; name a store in it, without .bin and .idx, such as data/books/train")
    if path.is_dir() and not _file_of(path, ".idx").exists():
        stores = [str(file.with_suffix("")) for file in sorted(path.glob("*.idx"))[:3]]
        if not stores:
            raise InputError(f"{path}: is a folder without a token store; make one with `infctx prepare`")
        raise InputError(f"{path}: is a folder; name a store in it, without .bin and .idx: {' or '.join(stores)}")
    return path


def is_store(path: Path) -> bool:
    """Returns whether a token store of this name exists."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return bool(prefix.name) and _file_of(prefix, ".idx").is_file() and _file_of(prefix, ".bin").is_file()


class _StoreFile:
    """A file that is read by place. Not mapped into memory: a mapped file that is cut short while it is in use kills
    the process with SIGBUS, and the pages of a mapping count as its memory."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self.num_bytes = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; a token store is a .bin and an .idx side by side") from None
        if self.num_bytes == 0:
            raise _damaged(path, "empty")
        self.path = path

    def read(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        """Returns `count` values from byte `offset` on, read-only."""
        wanted = count * dtype.itemsize
        try:
            data = os.pread(self._descriptor, wanted, offset)
            while len(data) < wanted and (more := os.pread(self._descriptor, wanted - len(data), offset + len(data))):
                data += more  # one call gives at most 2 GiB
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
        if len(data) < wanted:
            raise InputError(
                f"{self.path}: was cut short while in use, from {self.num_bytes:,} bytes to "
                f"{os.fstat(self._descriptor).st_size:,}; make the store again, and leave it alone while it is read"
            )
        return np.frombuffer(data, dtype)


def _tokenizer_of(prefix: Path) -> str | None:
    summary = prefix.with_name(SUMMARY_FILE)
    try:
        content = read_json(summary) if summary.is_file() else {}
        known = content.get("tokenizer") if prefix.name in content.get("splits", ()) else None
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{summary}: not what `infctx prepare` writes; make the store again, or remove it") from None
    return known if isinstance(known, str) else None


def _file_of(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"{path}: {problem}; copy it again, or make it with `infctx prepare`")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

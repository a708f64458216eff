"""Token stores in the RWKV world's binidx format: documents of token ids on disk, read by place.

`NAME.bin` holds the tokens back to back. `NAME.idx`, little endian: magic, u64 version 1, u8 dtype code, u64 n, u64 d,
int32 sizes[n] in tokens, int64 offsets[n] in bytes, int64 doc_idx[d]. Document i is the sequences doc_idx[i] ..
doc_idx[i + 1] - 1; nearly always that is one sequence. The last token of a document is 0, the end of document.
`NAME.mask`, if there is one, has the tokens that are targets (data/target_mask); data/store_writer writes all three.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from infctx.data.store_file import StoreFile, damaged
from infctx.data.target_mask import TargetMask
from infctx.errors import InputError
from infctx.small_texts import read_json

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")  # version, dtype code, n, d
ARRAYS_BEGIN = len(MAGIC) + HEADER.size
DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
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
    num_targets: tokens that a model learns to predict: all but the first of each document, unless `NAME.mask` says less
    tokenizer: the name of the tokenizer that made the ids, from the store.json beside the store; None without one
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = store_prefix(path)
        self.idx_path, self.bin_path = file_of(self.path, ".idx"), file_of(self.path, ".bin")
        if not self.idx_path.exists() and not self.bin_path.exists():
            raise InputError(f"{self.path}: no token store here (.idx, .bin); make one with `infctx prepare`")
        self._index, self._data = StoreFile(self.idx_path), StoreFile(self.bin_path)
        self._dtype, self._num_sequences, self.num_documents = self._read_header()
        self._offsets_begin = ARRAYS_BEGIN + 4 * self._num_sequences
        self._documents_begin = self._offsets_begin + 8 * self._num_sequences
        self.num_tokens = self._check_sequences()
        self._check_documents()
        mask = file_of(self.path, ".mask")
        self._mask = TargetMask(mask, self.num_tokens) if mask.exists() else None
        self.num_targets = self._mask.num_targets if self._mask else self.num_tokens - self.num_documents
        self.tokenizer = _tokenizer_of(self.path)

    @property
    def limits(self) -> dict[str, int]:
        """Returns the settings that leave out documents or cut them: none, see data/selection and data/pieces."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """Returns 16 hex digits that identify a store: a hash of its files' sizes and of blocks all over them."""
        digest = hashlib.sha256()
        for file in (self._index, self._data, *([self._mask.file] if self._mask else [])):
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

    def lengths(self) -> Iterator[np.ndarray]:
        """Yields the number of tokens of each document, its end included, int64, in blocks of documents."""
        for begin in range(0, self.num_documents, BLOCK):
            count = min(BLOCK, self.num_documents - begin)
            borders = self._index.read(self._documents_begin + 8 * begin, count + 1, np.dtype("<i8"))
            first, last = int(borders[0]), int(borders[-1])
            offsets = self._index.read(self._offsets_begin + 8 * first, last - first, np.dtype("<i8"))
            places = np.append(offsets, self._sequence_begin(last) * self._dtype.itemsize)
            yield np.diff(places[borders - first]) // self._dtype.itemsize

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
            raise damaged(self.bin_path, f"token {begin + place} of document {i} is {tokens[place]}, a negative id")
        return tokens

    def count_targets(self, i: int, begin: int, end: int) -> int:
        """Returns the number of targets among tokens begin..end-1 of document i."""
        if self._mask is None:
            return max(0, end - max(begin, 1))
        first, _ = self._span(i)
        return self._mask.count(first + begin, first + end)

    def targets(self, i: int, begin: int, end: int) -> np.ndarray:
        """Returns whether each of tokens begin..end-1 of document i is a target, bool (end - begin,)."""
        if self._mask is None:
            return np.arange(begin, end) > 0
        first, _ = self._span(i)
        return self._mask.read(first + begin, first + end)

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
            raise damaged(path, f"cut short: {num_bytes} bytes, and the header alone has {ARRAYS_BEGIN}")
        header = self._index.read(0, ARRAYS_BEGIN, np.dtype(np.uint8)).tobytes()
        if header[: len(MAGIC)] != MAGIC:
            raise damaged(path, f"begins with {header[: len(MAGIC)]!r}, and a binidx index with {MAGIC!r}")
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
            raise damaged(
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
            raise damaged(self.bin_path, f"trailing bytes: {bin_bytes} bytes, and the index lists {expected}")
        return expected // itemsize

    def _refuse(self, wrong: np.ndarray, begin: int, problem: str) -> None:
        if wrong.any():
            raise damaged(self.idx_path, f"sequence {begin + int(np.argmax(wrong))} {problem}")

    def _check_documents(self) -> None:
        previous = 0
        for begin in range(0, self.num_documents + 1, BLOCK):
            count = min(BLOCK, self.num_documents + 1 - begin)
            borders = self._index.read(self._documents_begin + 8 * begin, count, np.dtype("<i8"))
            if begin == 0 and borders[0] != 0:
                raise damaged(self.idx_path, f"doc_idx begins with {borders[0]}, not with 0")
            falling = np.diff(borders, prepend=previous) < 0
            if falling.any():
                raise damaged(self.idx_path, f"doc_idx falls at place {begin + int(np.argmax(falling))}")
            previous = int(borders[-1])
        if previous != self._num_sequences:
            raise damaged(self.idx_path, f"doc_idx ends at {previous}, not at the {self._num_sequences} sequences")


def store_prefix(path: str | os.PathLike[str]) -> Path:
    """Returns the name of a store, without .bin or .idx; InputError for a folder."""
    path = Path(path)
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix("")
    if not path.name:
        raise InputError(f"{path}: is a folder; name a store in it, without .bin and .idx, such as data/books/train")
    if path.is_dir() and not file_of(path, ".idx").exists():
        stores = [str(file.with_suffix("")) for file in sorted(path.glob("*.idx"))[:3]]
        if not stores:
            raise InputError(f"{path}: is a folder without a token store; make one with `infctx prepare`")
        raise InputError(f"{path}: is a folder; name a store in it, without .bin and .idx: {' or '.join(stores)}")
    return path


def is_store(path: Path) -> bool:
    """Returns whether a token store of this name exists."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return bool(prefix.name) and file_of(prefix, ".idx").is_file() and file_of(prefix, ".bin").is_file()


def _tokenizer_of(prefix: Path) -> str | None:
    summary = prefix.with_name(SUMMARY_FILE)
    try:
        content = read_json(summary) if summary.is_file() else {}
        known = content.get("tokenizer") if prefix.name in content.get("splits", ()) else None
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{summary}: not what `infctx prepare` writes; make the store again, or remove it") from None
    return known if isinstance(known, str) else None


def file_of(prefix: Path, suffix: str) -> Path:
    """Returns a file of a store: its name with a suffix added."""
    return prefix.with_name(prefix.name + suffix)

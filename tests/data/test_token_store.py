import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infctx.data.store_writer as store_writer
import infctx.data.token_store as token_store
from infctx.data.store_writer import TokenStoreWriter
from infctx.data.token_store import TokenStore
from infctx.errors import InputError

from places import ROOT

DOCUMENTS = [[5, 6, 7, 0], [0], [1, 65535, 0], [9] * 100 + [0]]


def write_index(path: Path, sizes: list[int], code: int = 8, /, **changes: object) -> None:
    """Writes an index value by value, independently of the module; `changes` override its parts."""
    itemsize = {4: 4, 8: 2}.get(code, 2)
    ends = np.cumsum(sizes, dtype=np.int64) * itemsize
    parts = {
        "magic": b"MMIDIDX\x00\x00",
        "version": np.array([1], "<u8"),
        "code": np.array([code], "u1"),
        "n": np.array([len(sizes)], "<u8"),
        "d": np.array([len(sizes) + 1], "<u8"),
        "sizes": np.array(sizes, "<i4"),
        "offsets": np.array([0, *ends[:-1]], "<i8"),
        "doc_idx": np.arange(len(sizes) + 1, dtype="<i8"),
        "rest": b"",
    }
    assert not changes.keys() - parts.keys()
    parts.update(changes)
    path.write_bytes(b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts.values()))


def write_store(prefix: Path, documents: list[list[int]], code: int = 8, /, **changes: object) -> Path:
    dtype = {4: "<i4", 8: "<u2"}.get(code, "<u2")
    Path(f"{prefix}.bin").write_bytes(np.array([t for document in documents for t in document], dtype).tobytes())
    write_index(Path(f"{prefix}.idx"), [len(document) for document in documents], code, **changes)
    return prefix


def read_all(store: TokenStore) -> list[list[int]]:
    return [store.tokens(i, 0, store.length(i)).tolist() for i in range(store.num_documents)]


@pytest.mark.parametrize("code", [4, 8])
def test_both_dtype_codes_are_read(tmp_path, code):
    store = TokenStore(write_store(tmp_path / "a", DOCUMENTS, code))
    assert (store.num_documents, store.num_tokens, store.path) == (4, 109, tmp_path / "a")
    assert [store.length(i) for i in range(4)] == [4, 1, 3, 101]
    assert read_all(store) == DOCUMENTS
    assert store.tokens(3, 98, 101).tolist() == [9, 9, 0]
    assert store.tokens(0, 2, 2).tolist() == []
    assert store.tokens(0, 0, 4).dtype == np.int64


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_store_is_named_with_and_without_suffix(tmp_path, suffix):
    write_store(tmp_path / "v1.5", DOCUMENTS)
    assert TokenStore(f"{tmp_path / 'v1.5'}{suffix}").path == tmp_path / "v1.5"


def test_documents_of_several_sequences_and_of_none(tmp_path):
    sequences = [[1, 2], [3, 0], [4, 0], [5], [6], [0]]
    changes = {"d": np.array([5], "<u8"), "doc_idx": np.array([0, 2, 3, 3, 6], "<i8")}
    store = TokenStore(write_store(tmp_path / "a", sequences, **changes))
    assert read_all(store) == [[1, 2, 3, 0], [4, 0], [], [5, 6, 0]]


@given(st.lists(st.lists(st.integers(1, 65535), max_size=30), min_size=1, max_size=20), st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_the_format_byte_by_byte(tmp_path_factory, documents, block):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        for module in (token_store, store_writer):  # several blocks in all loops over the index
            patch.setattr(module, "BLOCK", block)
        with TokenStoreWriter(folder / "a") as writer:
            for document in documents:
                half = len(document) // 2
                writer.extend(np.array(document[:half], np.uint16))
                writer.extend(np.array(document[half:], np.int64))
                writer.end_document()
        store = TokenStore(folder / "a")
        ended = [[*document, 0] for document in documents]
        assert read_all(store) == ended
        assert (writer.num_documents, writer.num_tokens) == (store.num_documents, store.num_tokens)
    write_store(folder / "b", ended)
    for suffix in (".bin", ".idx"):
        assert (folder / f"a{suffix}").read_bytes() == (folder / f"b{suffix}").read_bytes()


def test_a_document_too_long_for_one_size_is_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "MAX_SEQUENCE_TOKENS", 4)
    documents = [list(range(1, 1 + length)) for length in (11, 2, 3, 4, 8)]
    with TokenStoreWriter(tmp_path / "a") as writer:
        for document in documents:
            writer.extend(np.array(document))
            writer.end_document()
    store = TokenStore(tmp_path / "a")
    assert read_all(store) == [[*document, 0] for document in documents]
    assert store._num_sequences == 3 + 1 + 1 + 2 + 3


def test_reads_outside_a_document_are_refused(tmp_path):
    store = TokenStore(write_store(tmp_path / "a", DOCUMENTS))
    for arguments in [(0, 0, 5), (0, -1, 2), (0, 3, 2), (4, 0, 0), (-1, 0, 0)]:
        with pytest.raises(IndexError):
            store.tokens(*arguments)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"a: no token store here .*; make one with `infctx prepare`"):
        TokenStore(tmp_path / "a")
    write_store(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(InputError, match=r"a\.bin: No such file"):
        TokenStore(tmp_path / "a")
    write_store(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.idx").unlink()
    with pytest.raises(InputError, match=r"a\.idx: No such file"):
        TokenStore(tmp_path / "a")


def test_a_folder_is_not_a_store(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        TokenStore(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_an_empty_file(tmp_path, suffix):
    write_store(tmp_path / "a", DOCUMENTS)
    (tmp_path / f"a{suffix}").write_bytes(b"")
    with pytest.raises(InputError, match=rf"a\{suffix}: empty"):
        TokenStore(tmp_path / "a")


SIZES = [len(document) for document in DOCUMENTS]  # 4 1 3 101
HUGE = np.array([2**61], "<u8")
BAD_INDEXES = {
    "wrong magic": ({"magic": b"MMIDIDX\x00\x01"}, r"a\.idx: begins with b'MMIDIDX"),
    "version": ({"version": np.array([2], "<u8")}, "version 2 of the format; convert it to version 1"),
    "code": ({"code": b"\x06"}, r"dtype code 6; convert it to one of 4 \(int32\), 8 \(uint16\)"),
    "no documents": ({"n": np.zeros(1, "<u8"), "d": np.array([1], "<u8")}, "no documents in this store"),
    "no borders": ({"d": np.zeros(1, "<u8"), "doc_idx": b""}, "no documents in this store"),
    "n too large": ({"n": HUGE}, r"cut short: \d+ bytes, where 2305843009213693952 sequences"),
    "d too large": ({"d": HUGE}, "cut short"),
    "cut short": ({"doc_idx": np.arange(4, dtype="<i8")}, "cut short"),
    "trailing": ({"rest": b"\x00"}, "trailing bytes"),
    "negative size": ({"sizes": np.array([4, -1, 5, 101], "<i4")}, "sequence 1 has a negative size"),
    "unaligned": ({"offsets": np.array([0, 8, 11, 16], "<i8")}, "sequence 2 has an unaligned offset"),
    "negative offset": ({"offsets": np.array([-2, 8, 10, 16], "<i8")}, "sequence 0 lies outside .*a.bin"),
    "outside": ({"offsets": np.array([0, 8, 10, 18], "<i8")}, "sequence 3 lies outside .*which has 218 bytes"),
    "far outside": ({"offsets": np.array([0, 8, 10, 2**63 - 2], "<i8")}, "sequence 3 lies outside"),
    "large size": ({"sizes": np.array([4, 1, 2**31 - 1, 101], "<i4")}, "sequence 2 lies outside"),
    "disagree": ({"offsets": np.array([0, 8, 8, 16], "<i8")}, "sequence 2 has an offset that does not agree"),
    "sizes disagree": ({"sizes": np.array([4, 2, 3, 100], "<i4")}, "sequence 2 has an offset that does not agree"),
    "last size short": ({"sizes": np.array([4, 1, 3, 100], "<i4")}, r"a\.bin: trailing bytes: 218 bytes, .* lists 216"),
    "doc_idx begin": ({"doc_idx": np.array([1, 1, 2, 3, 4], "<i8")}, "doc_idx begins with 1"),
    "doc_idx falls": ({"doc_idx": np.array([0, 2, 1, 3, 4], "<i8")}, "doc_idx falls at place 2"),
    "doc_idx negative": ({"doc_idx": np.array([0, -1, 2, 3, 4], "<i8")}, "doc_idx falls at place 1"),
    "doc_idx end": ({"doc_idx": np.array([0, 1, 2, 3, 5], "<i8")}, "doc_idx ends at 5, not at the 4 sequences"),
    "doc_idx early": ({"doc_idx": np.array([0, 1, 2, 3, 3], "<i8")}, "doc_idx ends at 3"),
}


@pytest.mark.parametrize("block", [1, 2, 1 << 18])
@pytest.mark.parametrize("name", BAD_INDEXES)
def test_a_damaged_index(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(token_store, "BLOCK", block)
    changes, message = BAD_INDEXES[name]
    write_store(tmp_path / "a", DOCUMENTS, **changes)
    with pytest.raises(InputError, match=message) as caught:
        TokenStore(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_an_index_cut_anywhere_is_refused(tmp_path):
    write_store(tmp_path / "a", DOCUMENTS)
    whole = (tmp_path / "a.idx").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "a.idx").write_bytes(whole[:length])
        with pytest.raises(InputError):
            TokenStore(tmp_path / "a")


def test_any_flipped_byte_of_an_index_is_refused_or_harmless(tmp_path):
    write_store(tmp_path / "a", DOCUMENTS)
    whole = (tmp_path / "a.idx").read_bytes()
    for place in range(len(whole)):
        for flip in (1, 0x80, 0xFF):
            (tmp_path / "a.idx").write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                documents = read_all(TokenStore(tmp_path / "a"))
            except InputError:
                continue
            # Borders between documents can move and remain consistent; the tokens stay.
            assert sum(documents, []) == sum(DOCUMENTS, [])


@pytest.mark.parametrize("change, message", [(-2, "sequence 3 lies outside"), (2, "trailing bytes")])
def test_a_bin_of_another_length(tmp_path, change, message):
    write_store(tmp_path / "a", DOCUMENTS)
    data = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(data[:change] if change < 0 else data + b"\x00" * change)
    with pytest.raises(InputError, match=message):
        TokenStore(tmp_path / "a")


def test_negative_ids_are_refused_when_they_are_read(tmp_path):
    store = TokenStore(write_store(tmp_path / "a", [[1, 0], [1, 2, -7, 0]], 4))
    assert store.tokens(1, 0, 2).tolist() == [1, 2]
    with pytest.raises(InputError, match=r"a\.bin: token 2 of document 1 is -7, a negative id"):
        store.tokens(1, 1, 4)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_store_cut_short_while_it_is_in_use(tmp_path, suffix):
    """A file mapped into memory would end the process with SIGBUS here: the cut is 1 MB before the end."""
    documents = [[1] * 1_000_000 + [0], *([[2, 0]] * 100_000)]
    store = TokenStore(write_store(tmp_path / "a", documents))
    assert store.tokens(100_000, 0, 2).tolist() == [2, 0]
    os.truncate(tmp_path / f"a{suffix}", 1_000_000)
    with pytest.raises(InputError, match=rf"a\{suffix}: was cut short while in use, from [0-9,]+ bytes to 1,000,000; "):
        store.tokens(100_000, 0, 2)
    if suffix == ".bin":  # the rest can be read
        assert store.tokens(0, 0, 3).tolist() == [1, 1, 1]
        with pytest.raises(InputError, match="cut short while in use"):
            store.tokens(0, 499_999, 500_001)


def test_a_read_may_need_several_system_calls(tmp_path, monkeypatch):
    store = TokenStore(write_store(tmp_path / "a", DOCUMENTS))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: pread(descriptor, min(count, 3), offset))
    assert read_all(store) == DOCUMENTS


def run(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


MEMORY = """
import sys
from infctx.data.token_store import TokenStore
store = TokenStore(sys.argv[1])
longest = store.num_documents - 1
for begin in range(0, min(store.length(longest), 300_000_000), 1_000_000):
    store.tokens(longest, begin, min(begin + 1_000_000, store.length(longest)))
for i in range(0, store.num_documents, max(1, store.num_documents // 20_000)):
    store.tokens(i, 0, 1)
# Not ru_maxrss, which begins with what the process that started this one had.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_a_large_store_needs_no_more_memory_than_a_small_one(tmp_path):
    """8 GB of tokens (a sparse file) and an index of 3 million documents (60 MB), 0.6 GB of it read."""
    # A size is an int32: the last document is two sequences.
    sizes = np.concatenate([np.full(2_999_999, 17), [2_000_000_000, 2_000_000_000 - 17 * 2_999_999]])
    ends = np.cumsum(sizes) * 2
    changes = {
        "d": np.array([3_000_001], "<u8"),
        "sizes": sizes.astype("<i4"),
        "offsets": np.concatenate([[0], ends[:-1]]).astype("<i8"),
        "doc_idx": np.concatenate([np.arange(3_000_000), [3_000_001]]).astype("<i8"),
    }
    write_index(tmp_path / "large.idx", sizes.tolist(), **changes)
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(8_000_000_000)
    write_store(tmp_path / "small", [[1] * 1_000_000, [2, 0]])
    small, large = (int(run(MEMORY, tmp_path / name)) for name in ("small", "large"))
    assert large < small + 32 * 1024  # KiB: a block of the index


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), TokenStoreWriter(tmp_path / "a") as writer:
        writer.extend(np.array([1, 2]))
        writer.end_document()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_files_appear_at_the_end_and_the_index_comes_last(tmp_path, monkeypatch):
    renamed = []
    rename = os.rename

    def watched(source, target):
        renamed.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    with TokenStoreWriter(tmp_path / "a") as writer:
        writer.extend(np.array([1, 2]))
        writer.end_document()
        assert renamed == []
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    assert renamed == ["a.bin", "a.idx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_an_existing_store_is_not_overwritten(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"a\{suffix}: exists already; choose"):
        TokenStoreWriter(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("ids", [[1, 0, 2], [65536], [-1]])
def test_ids_that_a_document_cannot_have(tmp_path, ids):
    with pytest.raises(ValueError, match="1..65535"), TokenStoreWriter(tmp_path / "a") as writer:
        writer.extend(np.array(ids))
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_documents_or_with_an_open_one_is_not_closed(tmp_path):
    with pytest.raises(ValueError, match="at least one document"), TokenStoreWriter(tmp_path / "a"):
        pass
    with pytest.raises(ValueError, match="must have ended"), TokenStoreWriter(tmp_path / "a") as writer:
        writer.end_document()
        writer.extend(np.array([1]))
    assert list(tmp_path.iterdir()) == []


DISK_FULL = """
import errno, os, resource, signal, sys
import numpy as np
from infctx.data.store_writer import TokenStoreWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with TokenStoreWriter(sys.argv[1]) as writer:
        for _ in range(int(sys.argv[3])):
            writer.extend(np.ones(int(sys.argv[4]), np.uint16))
            writer.end_document()
except OSError as error:
    print(error.errno, error.filename)
print(os.listdir(os.path.dirname(sys.argv[1])))
"""


@pytest.mark.parametrize(
    "limit, documents, length, suffix",
    [
        (10_000_000, 8, 1_000_000, "bin"),  # while documents are added
        (10_000, 8, 1_000, "bin"),  # when the buffer is written at the end
        (10_000, 1000, 1, "idx"),  # in the index
    ],
)
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, limit, documents, length, suffix):
    message, left = run(DISK_FULL, tmp_path / "a", limit, documents, length).splitlines()
    number, name = message.split(" ", 1)
    assert int(number) == errno.EFBIG
    assert Path(name).name.startswith(f".a.{suffix}")
    assert left == "[]"

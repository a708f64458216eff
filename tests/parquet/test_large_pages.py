"""Large pages of parquet files, judged by pyarrow; its compressor judges ours of snappy."""

import errno
import os
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import infctx.documents.tables as tables_module
import infctx.parquet.large_pages as large_pages
from infctx.parquet.large_pages import find_long_columns, read_rows
from infctx.parquet.snappy import decompress_snappy

from readings import refused, texts

WORDS = ["word", " ", "\n", '"', "é", "文字", "🙂"]


def large_pages_from(monkeypatch, num_bytes):
    monkeypatch.setattr(large_pages, "LARGE_PAGE_BYTES", num_bytes)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_nulls_and_repeated_texts_in_large_pages(tmp_path, monkeypatch, use_dictionary, version):
    rng = random.Random(7)
    different = ["".join(rng.choices(WORDS, k=40)) + str(i) for i in range(300)]
    columns = {name: rng.choices([*different, None, ""], k=997) for name in ("prompt", "completion")}
    columns["completion"][100:600] = ["again"] * 500  # a run of one number
    pyarrow.parquet.write_table(
        pyarrow.table(columns), tmp_path / "a.parquet", use_dictionary=use_dictionary, data_page_version=version
    )
    results = []
    for large in (1 << 30, 1):
        large_pages_from(monkeypatch, large)
        results.append(texts(tmp_path / "a.parquet", skip_bad=True))
    assert results[0] == results[1]
    rows = zip(*columns.values(), strict=True)
    assert len(results[0]) == sum(prompt is not None and bool((answer or "").strip()) for prompt, answer in rows)


@pytest.mark.parametrize("seed", range(8))
def test_lists_of_objects_in_large_pages(tmp_path, monkeypatch, seed):
    """With and without null in each place; rows and keys in their order, as pyarrow reads them."""
    large_pages_from(monkeypatch, 1)
    rng = random.Random(seed)
    list_null, item_null, key_null = (bool(seed & bit) for bit in (1, 2, 4))

    def some_text():
        return None if key_null and rng.random() < 0.2 else "".join(rng.choices(WORDS, k=rng.randint(0, 30)))

    def some_object():
        return None if item_null and rng.random() < 0.2 else {"role": some_text(), "content": some_text()}

    def some_list():
        return None if list_null and rng.random() < 0.2 else [some_object() for _ in range(rng.choice([0, 1, 2, 9]))]

    item = pyarrow.struct([pyarrow.field(key, pyarrow.string(), key_null) for key in ("role", "content")])
    lists = pyarrow.list_(pyarrow.field("element", item, item_null))
    schema = pyarrow.schema([pyarrow.field("messages", lists, list_null), ("id", "int32"), ("system", "string")])
    rows = [{"messages": some_list(), "id": i, "system": rng.choice(["s", None])} for i in range(211)]
    path = tmp_path / "a.parquet"
    version = rng.choice(["1.0", "2.0"])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema), path, row_group_size=100, data_page_version=version, data_page_size=500
    )
    found, read = [], tables_module._decoded
    with pyarrow.parquet.ParquetFile(path) as file:
        for group in range(3):
            columns = find_long_columns(file, path, group, ["messages", "system"])
            found += [(read(messages), read(system)) for messages, system in read_rows(columns, 1 << 20)]
            assert find_long_columns(file, path, group, ["messages", "id"]) is None
    assert found == [(row["messages"], row["system"]) for row in rows]


@pytest.mark.parametrize(
    "column",
    [
        [["a"]],  # a list of texts
        [[{"role": "a", "content": [{"text": "b"}]}]],  # deeper
        [[{"role": "a", "weight": 1}]],  # numbers
        [{"a": "b"}],  # an object without a list
        [b"a"],
    ],
)
def test_other_columns_are_left_to_pyarrow(tmp_path, monkeypatch, column):
    large_pages_from(monkeypatch, 1)
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    with pyarrow.parquet.ParquetFile(tmp_path / "a.parquet") as file:
        assert find_long_columns(file, tmp_path / "a.parquet", 0, ["messages"]) is None


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_row_too_long_in_a_large_page_is_left_out_alone(tmp_path, monkeypatch, use_dictionary):
    large_pages_from(monkeypatch, 1)
    monkeypatch.setattr(tables_module, "MAX_RECORD_BYTES", 50)
    rows = ["a" * length for length in (50, 51, 0, 60, 7)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", use_dictionary=use_dictionary)
    assert list(map(len, texts(tmp_path / "a.parquet", skip_bad=True))) == [50, 0, 7]
    turns = [[{"role": "user", "content": "a" * length}, {"role": "assistant", "content": "b"}] for length in (60, 20)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), tmp_path / "b.parquet")
    assert len(texts(tmp_path / "b.parquet", skip_bad=True)) == 1
    refused(r"a\.parquet, row 2: a row of more than 64 MiB, too long", tmp_path / "a.parquet")


def test_no_room_for_a_large_page(tmp_path, monkeypatch):
    large_pages_from(monkeypatch, 1)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet", compression="snappy")
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    refused(r"a\.parquet: has pages too large for memory, and .* no room .*; set TMPDIR to a folder", tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_snappy_in_any_blocks(seed):
    """Copies that reach far back and into themselves, literals cut by blocks; judged by pyarrow's compressor."""
    rng = random.Random(seed)
    parts = [rng.choice([b"ab" * rng.randint(1, 500), rng.randbytes(rng.randint(1, 70_000))]) for _ in range(20)]
    whole = b"".join(parts)
    stored = pyarrow.compress(whole, codec="snappy", asbytes=True)
    target = np.zeros(len(whole), np.uint8)
    size = rng.choice([1, 3, 1000])
    progress = list(decompress_snappy((stored[i : i + size] for i in range(0, len(stored), size)), target))
    assert target.tobytes() == whole and progress == sorted(progress) and progress[-1] == len(whole)
    with pytest.raises(ValueError, match="end too early"):
        list(decompress_snappy(iter([stored[:-1]]), target))
    with pytest.raises(ValueError, match="length"):
        list(decompress_snappy(iter([stored]), target[1:]))


def test_snappy_copies_from_far_back():
    """Four bytes of distance, which pyarrow's compressor never writes."""
    literal = bytes(range(256)) * 300
    stored = b"\x84\xd8\x04" + b"\xf8" + (len(literal) - 1).to_bytes(3, "little") + literal
    stored += b"\x0f" + (76_000).to_bytes(4, "little")
    target = np.zeros(len(literal) + 4, np.uint8)
    list(decompress_snappy(iter([stored]), target))
    assert target.tobytes() == literal + literal[800:804]

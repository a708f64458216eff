"""Tables: csv judged by the standard library, parquet by pyarrow, each reading the same file as a whole."""

import csv
import gzip
import io
import random
import sys

import pyarrow
import pyarrow.parquet
import pytest

import infctx.documents.blocks as blocks_module
import infctx.documents.tables as tables_module
import infctx.parquet.large_pages as large_pages
import infctx.parquet.page_content as page_content
from infctx.errors import InputError

from readings import refused, texts

WORDS = ["word", " ", "\n", "\r\n", '"', "\\", "é", "文字", "🙂", "\u2028", "\x85", ",", ";", "\t", "'"]


def some_rows(seed, count=50):
    rng = random.Random(seed)
    rows = [["".join(rng.choices(WORDS, k=rng.choice([0, 1, 20, 300]))) for _ in range(3)] for _ in range(count)]
    return [["1", *row[:2]] for row in rows]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t"), ("csv", ";"), ("csv", "\t")])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_csv_is_what_the_standard_library_reads(tmp_path, monkeypatch, block, suffix, separator, ending):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block)
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, lineterminator=ending)
    writer.writerows([["id", "text", "last column"], *some_rows(block, 8 if block == 1 else 50)])
    path = tmp_path / f"a.{suffix}"
    path.write_text("\ufeff" + text.getvalue(), encoding="utf-8", newline="")
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=separator))
    assert texts(path) == [row["text"] for row in rows]
    assert texts(path, text_column="last column") == [row["last column"] for row in rows]
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    if suffix == "csv":
        assert texts(tmp_path / "b.csv.gz") == [row["text"] for row in rows]
        path.write_text(f'"id"{separator}"a, ""b"", {separator}"{separator}text\n1{separator}x{separator}y\n')
        assert texts(path) == ["y"]


def test_the_limit_of_the_csv_module_is_put_back(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert [len(text) for text in texts(tmp_path / "a.csv")] == [300_000]
    assert csv.field_size_limit() == before


def test_a_row_of_too_many_values_is_left_out_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "FEW_BYTES", 100)
    monkeypatch.setattr(tables_module, "MOST_VALUES", 20)
    rows = ["text,x", "a,b", "a" * 100 + "," * 21, "c" * 100 + ",d", "e" * 50 + "," * 30]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    assert texts(tmp_path / "a.csv", skip_bad=True) == ["a", "c" * 100]


def test_bad_rows_are_left_out_alone(tmp_path):
    rows = b'id,text\n1,a\n2\n3,b,c\n\n4,"b"c\n5,\xff\n6,"d\ne"\n7,f\n'
    (tmp_path / "a.csv").write_bytes(rows)
    assert texts(tmp_path / "a.csv", skip_bad=True) == ["a", "d\ne", "f"]


def some_table(seed, count=700):
    rng = random.Random(seed)
    words = ["".join(rng.choices(WORDS, k=rng.choice([0, 1, 20, 300]))) for _ in range(count)]
    return pyarrow.table({"id": range(count), "text": words, "content": words[::-1], "nested": [[{"a": 1}]] * count})


def large_pages_from(monkeypatch, num_bytes):
    monkeypatch.setattr(large_pages, "LARGE_PAGE_BYTES", num_bytes)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize(
    ("rows", "large"), [(1, 1 << 30), (63, 1 << 30), (10_000, 1 << 30), (11, 1), (63, 1), (10_000, 5000)]
)
def test_parquet_is_what_pyarrow_reads(tmp_path, monkeypatch, compression, rows, large):
    """From a size on pages are read by us: all, some, none."""
    large_pages_from(monkeypatch, large)
    monkeypatch.setattr(page_content, "STEP_BYTES", 4 << 10)
    path = tmp_path / "a.parquet"
    table = some_table(rows, 150)
    table = table.set_column(1, "text", table["text"].cast("large_string"))
    pyarrow.parquet.write_table(
        table,
        path,
        row_group_size=rows,
        compression=compression,
        data_page_version="2.0" if rows == 63 else "1.0",
        use_dictionary=rows == 63,
        data_page_size=3000,
        write_batch_size=10,
    )
    whole = pyarrow.parquet.read_table(path)
    assert texts(path) == whole["text"].to_pylist()
    assert texts(path, text_column="content") == whole["content"].to_pylist()
    path.rename(tmp_path / "a.data")
    assert texts(tmp_path / "a.data") == whole["text"].to_pylist()  # by its first bytes


def test_parquet_in_a_folder(tmp_path):
    for name in ("b", "a"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), tmp_path / f"{name}.parquet")
    assert texts(tmp_path) == ["a", "b"]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"a\.parquet: pyarrow, which reads parquet, is missing; pip install 'infctx\[parquet\]'", tmp_path)


@pytest.mark.parametrize("large", [1, 1 << 30])
@pytest.mark.parametrize("where", [0, 4, 50, 0.5, -1, -8])
def test_a_truncated_parquet_file(tmp_path, monkeypatch, where, large):
    large_pages_from(monkeypatch, large)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(some_table(3), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(where * len(whole)) if isinstance(where, float) else where])
    with pytest.raises(InputError, match=r"a\.parquet: (empty|not a parquet file|a damaged parquet file)") as caught:
        texts(path)
    assert "\n" not in str(caught.value)

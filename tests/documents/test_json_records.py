"""JSON in any layout, judged by the standard library's parser of the whole file."""

import gzip
import json
import random
import tracemalloc

import pytest

import infctx.documents.blocks as blocks_module
import infctx.documents.json_records as json_module
from infctx.documents.document import AS_THEY_ARE
from infctx.documents.inputs import find_sources
from infctx.documents.read import read_documents

from readings import refused, texts

WORDS = ["word", " ", "\n", '"', "\\", "é", "文字", "🙂", "\u2028", "[", "]", "{", "}", ",", "\x00", "\t"]


def some_records(seed, count=60):
    rng = random.Random(seed)
    return [
        {
            "id": rng.choice([0, -1.5e300, None, True, [1, {"text": "inner"}], 10**30]),
            "text": "".join(rng.choices(WORDS, k=rng.choice([0, 1, 20, 300]))),
        }
        for _ in range(count)
    ]


def layouts(records, rng):
    """Yields the same records in each layout that is read: an array, lines, objects one after another."""
    for ascii_only in (True, False):
        indent = rng.choice([None, 1])
        dumped = [json.dumps(record, ensure_ascii=ascii_only, indent=indent) for record in records]
        yield "[" + rng.choice([",", ", ", "\n,\r\n\t"]).join(dumped) + "]\n \n"
        yield "\n".join(dumped)
        yield "".join(dumped)
        yield json.dumps(records, ensure_ascii=ascii_only, indent=4)
        yield "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)


@pytest.mark.parametrize("block", [1, 2, 7, 1000, 1 << 20])
@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_every_layout_is_read(tmp_path, monkeypatch, block, suffix):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block)
    records = some_records(block, 60 if block > 10 else 6)
    path = tmp_path / f"a.{suffix}"
    for content in layouts(records, random.Random(block)):
        data = content.encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        assert texts(path) == [record["text"] for record in records]


def test_the_content_decides_and_not_the_suffix(tmp_path):
    (tmp_path / "array.jsonl").write_text('\n [{"text": "a"},\n{"text": "b"}]')
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts(tmp_path / "array.jsonl") == texts(tmp_path / "lines.json") == ["a", "b"]
    (tmp_path / "named.txt").write_text('[{"text": "a"}]')
    assert texts(tmp_path / "named.txt", format="json") == ["a"]
    assert texts(tmp_path / "named.txt") == ['[{"text": "a"}]']
    (tmp_path / "empty.json").write_text("[]")
    refused(r"empty\.json: no documents in there", tmp_path / "empty.json")


def test_places_are_lines_and_numbers_of_records(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"text": "a"}, {"text": "b"},\n\n{"text":\n"c"}]')
    sources, _ = find_sources([str(tmp_path / "a.json")])
    places = [document.place.removeprefix(str(tmp_path)) for document in read_documents(sources, AS_THEY_ARE)]
    assert places == ["/a.json:2, record 1", "/a.json:2, record 2", "/a.json:4, record 3"]


def test_an_array_is_read_in_little_memory(tmp_path):
    with open(tmp_path / "a.json", "w") as file:
        file.write(
            "[" + ",".join(json.dumps({"text": "word " * 10_000, "other": "x" * 1000}) for _ in range(800)) + "]"
        )
    assert (tmp_path / "a.json").stat().st_size > 40_000_000
    tracemalloc.start()
    assert sum(map(len, iter_texts(tmp_path / "a.json"))) == 800 * 50_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000


def iter_texts(path):
    sources, _ = find_sources([str(path)])
    for document in read_documents(sources, AS_THEY_ARE):
        for part in document.parts:
            yield from part.pieces


def test_a_record_may_be_long_but_not_too_long(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "b" * (4 << 20)}, {"text": "c"}]))
    assert list(map(len, texts(tmp_path / "a.json"))) == [4 << 20, 1]
    monkeypatch.setattr(json_module, "MAX_RECORD_BYTES", 1 << 20)
    refused(r"a\.json:1, record 1: a record of more than 1 MiB", tmp_path / "a.json")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_long_record_may_not_have_too_many_values(tmp_path, monkeypatch, suffix):
    """What stands in strings does not count, nor does what comes after a long record."""
    monkeypatch.setattr(json_module, "FEW_BYTES", 2000)
    monkeypatch.setattr(json_module, "MOST_VALUES", 300)
    monkeypatch.setattr(json_module, "BLOCK_BYTES", 100)
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 100)
    records = [
        {"text": '\\",[{"\\' * 500},
        *[{"text": "a", "x": ["b", []]}] * 200,
        {"text": "c" * 2000, "x": [1] * 290},
    ]
    path = tmp_path / f"a.{suffix}"
    write = json.dumps if suffix == "json" else lambda records: "\n".join(map(json.dumps, records))
    path.write_text(write(records))
    assert texts(path) == [record["text"] for record in records]
    for values in ([1] * 1000, [[]] * 400, [{"a": 1}] * 200):
        path.write_text(write([*records, {"text": "a" * 2000, "x": values}]))
        assert texts(path, skip_bad=True) == [record["text"] for record in records]
        refused(rf"a\.{suffix}:.*: a record of 0 MiB with more than 300 values, too many", path)


@pytest.mark.parametrize("block", [1, 3])  # a line inside a block is never too long
def test_long_lines_are_left_out_alone(tmp_path, monkeypatch, block):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block)
    monkeypatch.setattr(json_module, "MAX_RECORD_BYTES", 50)
    lengths = [0, 30, 38, 42, 60, 1000, 10, 70]
    lines = "\n".join(json.dumps({"text": "b" * length}) for length in lengths)
    (tmp_path / "a.jsonl").write_text(lines)
    kept = [length for length in lengths if len(json.dumps({"text": "b" * length})) <= 50]
    assert list(map(len, texts(tmp_path / "a.jsonl", skip_bad=True))) == kept

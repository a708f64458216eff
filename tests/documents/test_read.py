import codecs
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest
import zstandard

import infctx.documents.blocks as blocks_module
import infctx.documents.json_records as json_module
from infctx.documents.document import Reading
from infctx.documents.inputs import find_sources
from infctx.documents.read import ReadLog, read_documents
from infctx.errors import InputError

from readings import refused, texts


def compress(data: bytes, suffix: str) -> bytes:
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix](data)


SUFFIXES = ["", ".gz", ".zst"]
TEXT = "\r\nfirst\r\nsecond\rthird\n\n\x01\x85\u2028 🙂 end \n"


@pytest.mark.parametrize("compression", SUFFIXES)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_a_text_file_is_one_unchanged_document(tmp_path, suffix, compression):
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(compress(TEXT.encode(), compression))
    assert texts(path) == [TEXT]


@pytest.mark.parametrize("compression", SUFFIXES)
def test_a_line_of_jsonl_is_a_document(tmp_path, compression):
    lines = ["", json.dumps({"text": TEXT}), "  ", '{"id": 1, "text": "b"}\r', '{"text": ""}', '{"text": "\\u2028é"}']
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(compress("\n".join(lines).encode(), compression))
    documents = [
        (d.place, "".join(piece for part in d.parts for piece in part.pieces))
        for d in read_documents(find_sources([str(path)])[0], Reading())
    ]
    assert documents == [(f"{path}:2", TEXT), (f"{path}:4", "b"), (f"{path}:5", ""), (f"{path}:6", "\u2028é")]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("compression", SUFFIXES)
def test_blocks_may_end_anywhere(tmp_path, monkeypatch, block, compression):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block)
    monkeypatch.setattr(blocks_module, "ZSTD_BLOCK_BYTES", block)
    (tmp_path / f"a.txt{compression}").write_bytes(compress(codecs.BOM_UTF8 + TEXT.encode(), compression))
    lines = "\n".join(json.dumps({"text": part}, ensure_ascii=False) for part in ("🙂🙂", "bé", "")) + "\n"
    (tmp_path / f"b.jsonl{compression}").write_bytes(compress(codecs.BOM_UTF8 + lines.encode(), compression))
    assert texts(tmp_path) == [TEXT, "🙂🙂", "bé", ""]


def test_only_one_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 * 2 + b"a")
    assert texts(tmp_path / "a.txt") == ["\ufeffa"]


def test_empty_files_that_were_not_named_are_empty_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"b")
    (tmp_path / "c.jsonl").write_bytes(b"")
    assert texts(tmp_path) == ["", "b"]


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize("input_format, expected", [("text", ['{"text": "a"}\n']), ("jsonl", ["a"])])
def test_standard_input(monkeypatch, input_format, expected):
    monkeypatch.setattr("sys.stdin", Stdin(b'{"text": "a"}\n'))
    assert texts("-", format=input_format) == expected


@pytest.mark.parametrize("compression", SUFFIXES)
def test_progress_adds_up_to_the_bytes_on_disk(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(compress(b"".join(b"%d " % i for i in range(400_000)), compression))
    counts = []
    sources, _ = find_sources([str(path)])
    for document in read_documents(sources, Reading(), ReadLog(counts.append)):
        [piece for part in document.parts for piece in part.pieces]
    assert sum(counts) == sources[0].num_bytes == path.stat().st_size
    assert len(counts) > 1


@pytest.mark.parametrize("compression", SUFFIXES)
def test_members_and_frames_laid_end_to_end(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" if compression == ".zst" else b""
    path.write_bytes(compress(b"one ", compression) + skippable + compress(b"two", compression))
    assert texts(path) == ["one two"]


@pytest.mark.parametrize("compression", SUFFIXES)
def test_a_long_text_comes_in_bounded_pieces(tmp_path, compression):
    """40 MB of text, nearly all of it one byte repeated, so that a compressed block is a large text."""
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(compress(b" " * 40_000_000 + "🙂".encode(), compression))
    tracemalloc.start()
    lengths = [
        len(piece)
        for document in read_documents(find_sources([str(path)])[0], Reading())
        for part in document.parts
        for piece in part.pieces
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == 40_000_001
    assert max(lengths) <= blocks_module.BLOCK_BYTES
    # A zstd block of 4 KiB may hold all of this text; otherwise a few blocks are in memory.
    assert peak < (100 if compression == ".zst" else 10) * 1_000_000


def test_a_long_document_of_jsonl_comes_in_bounded_pieces(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ab" * 1_500_000}))
    (document,) = read_documents(find_sources([str(tmp_path / "a.jsonl")])[0], Reading())
    pieces = [piece for part in document.parts for piece in part.pieces]
    assert "".join(pieces) == "ab" * 1_500_000
    assert max(map(len, pieces)) <= blocks_module.BLOCK_BYTES


@pytest.mark.parametrize("compression", SUFFIXES)
def test_an_empty_file(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(compress(b"", compression))
    refused("a.txt.*: empty", path)
    path.write_bytes(b"")
    refused("a.txt.*: empty", path)


def test_empty_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", Stdin(b""))
    refused("standard input: empty", "-", format="text")


def test_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    refused(r"a\.jsonl: no documents", tmp_path / "a.jsonl")


@pytest.mark.parametrize("block", [1, 4, 1 << 20])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(
    "bad, place", [(b"\xff", 0), (b"\xe2\x82A", 0), (b"ab\xed\xa0\x80", 2), (b"ab\xf0\x9f\x99", 2)]
)
def test_a_text_that_is_not_utf8(tmp_path, monkeypatch, block, bom, bad, place):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block)
    head = bom + "añ🙂".encode()
    (tmp_path / "a.txt").write_bytes(head + bad)
    byte = (head + bad)[len(head) + place]
    refused(rf"a\.txt: not UTF-8: byte 0x{byte:02x} at offset {len(head) + place}; ", tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "cp1252", "gb18030"])
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_any_encoding(tmp_path, monkeypatch, encoding, block):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", block)
    text = "añ€ " * 9 + ("" if encoding == "cp1252" else "🙂文")
    lines = "".join(json.dumps({"text": part}, ensure_ascii=False) + "\n" for part in (text, "é"))
    rows = f'text\n"{text}"\né\n'
    for name, content in (("a.txt", text), ("b.jsonl", lines), ("c.csv", rows)):
        (tmp_path / name).write_text(content, encoding=encoding, newline="")
    assert texts(tmp_path, encoding=encoding) == [text, text, "é", text, "é"]
    if encoding == "utf-16-be":
        for name in ("a.txt", "b.jsonl", "c.csv"):
            place, problem = (name.replace(".", r"\."), "not UTF-16 .*; give --encoding utf-16-le or utf-16-be, or add")
            refused(f"{place}: {problem}", tmp_path / name, encoding="utf-16")
    if encoding.startswith("utf"):
        for name, content in (("a.txt", text), ("b.jsonl", lines), ("c.csv", rows)):
            (tmp_path / name).write_text("\ufeff" + content, encoding=encoding, newline="")
        assert texts(tmp_path) == texts(tmp_path, encoding="cp1252") == [text, text, "é", text, "é"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', r"a\.jsonl:3: not JSON \(Expecting ',' delimiter, column 13\)"),
        (b"text", r"a\.jsonl:3: not JSON \(Expecting value, column 1\)"),
        (b'{"text": "a"} {"text": "b"}', r"a\.jsonl:3: not JSON \(Extra data, column 15\)"),
        (b"[" * 100_000, r"a\.jsonl:3: not JSON \(.*recursion"),
        (b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl:3: (not JSON|`text` is int)"),
        (b'["text"]', r"a\.jsonl:3: not a JSON object but list; write \{\"text\""),
        (b'{"content": "a", "id": 2}', r"a\.jsonl:3: no key `text` \(keys: 'content', 'id'\)"),
        (b"{}", r"a\.jsonl:3: no key `text` \(keys: none\)"),
        (b'{"text": 5}', r"a\.jsonl:3: `text` is int, not a string"),
        (b'{"text": null}', r"a\.jsonl:3: `text` is null, not a string"),
        (b'{"text": "a\xff"}', r"a\.jsonl:3: not UTF-8: byte 0xff at offset 11"),
        (b'{"text": "a\\ud83d"}', r"a\.jsonl:3: `text` holds a lone surrogate, U\+D83D"),
    ],
)
@pytest.mark.parametrize("compression", SUFFIXES)
def test_a_broken_line(tmp_path, line, message, compression):
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(compress(b'{"text": "\\ud83d\\ude42"}\n\n' + line + b'\n{"text": "c"}\n', compression))
    refused(message.replace("jsonl:", rf"jsonl{compression}:"), path)


def test_a_line_too_long_to_parse(tmp_path, monkeypatch):
    monkeypatch.setattr(json_module, "MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + json.dumps({"text": "b" * (4 << 20)}))
    refused(r"a\.jsonl:3: a line of more than 1 MiB.*into a \.txt file", path)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_damaged_compression(tmp_path, compression, suffix):
    path = tmp_path / f"a{suffix}{compression}"
    lines = b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(10_000))
    whole = compress(lines, compression)
    for length in (1, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(rf"damaged \{compression} file", path)
    for damaged in (b"not compressed at all" * 10, whole + b"rest", whole[:-20] + b"\x55" * 20):
        path.write_bytes(damaged)
        refused(rf"a\{suffix}\{compression}: damaged \{compression} file", path)


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a")
    sources, _ = find_sources([str(path)])
    Path(path).unlink()
    with pytest.raises(InputError, match=r"a\.txt: cannot be read \(No such file"):
        list(read_documents(sources, Reading()))

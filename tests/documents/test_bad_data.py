"""Bad data of many kinds: each is one line with the file, the line or row, and what to do; --skip-bad leaves it out."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import infctx.documents.json_records as json_module
from infctx.documents.document import Reading
from infctx.prepare.prepare import prepare

from readings import refused, texts


def parquet(**columns):
    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue().to_pybytes()


def twice(*texts):
    """A parquet file with several columns named text."""
    file = pyarrow.BufferOutputStream()
    names = ["text"] * len(texts)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array([text]) for text in texts], names), file)
    return file.getvalue().to_pybytes()


def invalid_utf8():
    """A parquet file whose second text is not UTF-8."""
    data = pyarrow.py_buffer(b"good\xffbad")
    offsets = pyarrow.py_buffer(pyarrow.array([0, 4, 5, 8], "int32").buffers()[1].to_pybytes()[:16])
    return parquet(text=pyarrow.StringArray.from_buffers(3, offsets, data))


LINE = '{"text": "a"}\n'
LONG = '{"text": "' + "b" * (1 << 20) + '"}\n'
KEY = "give the document's text this key, or name another with --text-column"
REMOVE = "correct the line, or add --skip-bad"

BAD = [
    # name, content, message after the name (... is any text), texts that --skip-bad leaves
    ("no text.jsonl", '{"body": "b", "id": 1}\n' + LINE, f":1: no key `text` (keys: 'body', 'id'); {KEY}", "a"),
    ("numbers.jsonl", LINE + '{"text": 5}\n', ":2: `text` is int, not a string; correct or remove", "a"),
    ("nulls.jsonl", '{"text": null}\n' + LINE, ":1: `text` is null, not a string; correct or remove", "a"),
    ("surrogate.jsonl", LINE + '{"text": "\\ud83d"}', ":2: `text` holds a lone surrogate, U+D83D; remove it", "a"),
    ("list.jsonl", LINE + '["b"]\n', ':2: not a JSON object but list; write {"text": "..."}', "a"),
    (
        "cut.jsonl",
        LINE * 2 + '{"text": "b',
        ":3: not JSON (Unterminated string starting at, column 10); correct",
        "aa",
    ),
    ("python.jsonl", "{'text': 'b'}\n" + LINE, f":1: not JSON (Expecting property name ..., column 2); {REMOVE}", "a"),
    ("deep.jsonl", LINE + "[" * 100_000, ":2: not JSON (...recursion...); correct", "a"),
    ("mixed.jsonl", LINE + "id,text\n1,b\n", f":2: not JSON (Expecting value, column 1); {REMOVE}", "a"),
    ("latin line.jsonl", LINE.encode() + b'{"text": "\xe9"}', ":2: not UTF-8: byte 0xe9 at offset 10; convert it", "a"),
    (
        "zero.jsonl",
        LINE + '{"text": "b\0"}',
        ": is a binary file (byte 25 is NUL); convert",
        None,
    ),
    (
        "long.jsonl",
        LINE + LONG + LINE,
        ":2: a line of more than 0 MiB, too ...; put this document into a .txt",
        "aa",
    ),
    ("text.jsonl", "# Notes\n\nWords.", f":1: not JSON (Expecting value, column 1); {REMOVE}", None),
    ("blank.jsonl", "\n \n", ": no documents in there; check the inputs", None),
    ("cut.json", '[{"text": "a"}, {"text": "b"}', ":1: not JSON (it ends without ',' or ']', ...cut off", "ab"),
    (
        "cut inside.json",
        '[{"text": "a"},\n{"text": "b',
        ":2, record 2: not JSON (Unterm...line 2); the file is cut",
        "a",
    ),
    ("no comma.json", '[{"text": "a"}\n{"text": "b"}]', ":2: not JSON ('{' where ',' should be, ...; correct it", "a"),
    ("more.json", '[{"text": "a"}]\n{"text": "b"}', ":2: there is more after the end of its array; remove it", "a"),
    ("texts.json", '["a", {"text": "b"}]', ":1, record 1: not a JSON object but str; write", "b"),
    ("whole.json", '{"data": [{"text": "a"}]}', f":1: no key `text` (keys: 'data'); {KEY}", None),
    ("deep.json", '[{"text": "a"}, ' + "[" * 100_000, ":1, record 2: not JSON (...recursion...); correct", "a"),
    ("trailing.json", '[{"text": "a"},]', ":1, record 2: not JSON (Expecting value, line 1); ", "a"),
    ("empty.csv", "", ": empty; name a file with text in it", None),
    ("newlines.csv", "\n\n", ":3: no line with the names of the columns; write it first, such as id,text", None),
    ("no header.csv", "1,some words\n2,more\n", f":1: no key `text` (keys: '1', 'some words'); {KEY}", None),
    (
        "ragged.csv",
        'id,text\n1,a\n2,"b\nb",c\n',
        ":3: 3 values, and the first line names 2 ...into quotes",
        "a",
    ),
    (
        "short.tsv",
        "id\ttext\n1\n2\ta\n",
        ":2: 1 value, and the first line names 2 columns; put values",
        "a",
    ),
    ("twice.csv", "text,text\na,b\n", ":1: two columns are named text; rename one of them", None),
    ("quotes.csv", 'id,text\n1,"a"b\n2,a\n', ":2: not csv (',' expected after '\"'); correct the quotes", "a"),
    ("mac.csv", "id,text\r1,a\r", ":1: not csv (a carriage return alone, outside quotes); end the lines as", None),
    ("open.csv", 'id,text\n1,a\n2,"b\n3,c\n', ":3: not csv (unexpected end of data); correct the quotes", "a"),
    (
        "latin.csv",
        b"id,text\n1,a\n2,\xe9\n",
        ":3: not UTF-8: byte 0xe9 at offset 2; convert it, add its --encoding",
        "a",
    ),
    ("long.csv", "id,text\n1,a\n2," + LONG, ":3: a line of more than 0 MiB", "a"),
    ("no text.parquet", parquet(id=[1], body=["a"]), f": no key `text` (keys: 'id', 'body'); {KEY}", None),
    ("twice.parquet", twice("a", "b"), ": two columns are named text; rename one of them", None),
    ("cut.parquet", parquet(text=["a"])[:-9], ": a damaged parquet file (...); copy it again", None),
    ("stub.parquet", b"stub", ": not a parquet file; name it by what it holds, or give its --format", None),
    (
        "numbers.parquet",
        parquet(text=[1, 2]),
        ", row 1: `text` is int, not a string; correct",
        None,
    ),
    ("null.parquet", parquet(text=["a", None]), ", row 2: `text` is null, not a string; correct or remove", "a"),
    ("bytes.parquet", parquet(text=[b"a"]), ", row 1: `text` is bytes, not a string; correct or remove", None),
    ("invalid.parquet", invalid_utf8(), ", row 2: not UTF-8: byte 0xff at offset 0; convert it", "goodbad"),
    ("really.txt", parquet(text=["a"]), ": is a parquet file; add --format parquet", None),
    ("twice.parquet.gz", gzip.compress(parquet(text=["a"])), ": a compressed parquet file; decompress it first", None),
    (
        "latin.txt",
        "café".encode("latin-1"),
        ": not UTF-8: byte 0xe9 at offset 3; convert it, add its",
        None,
    ),
    ("picture.txt", b"\x89PNG\0\0", ": is a binary file (byte 4 is NUL); convert it to UTF-8 text first", None),
    ("zero.txt", b"x" * (1 << 20) + b"ab\0", ": byte 1,048,578 is NUL, which no text has; convert it", None),
    ("letter.txt", b"%PDF-1.7 words", ": is a PDF; convert it to UTF-8 text first", None),
    ("wide.txt", "hello, world".encode("utf-16-be"), ": is text in UTF-16 without ...; add --encoding utf-16-be", None),
    (
        "cut wide.txt",
        "\ufeffhello".encode("utf-16-le")[:-1],
        ": not UTF-16-LE: byte 0x6f at offset 10; it is cut off, or in another",
        None,
    ),
    ("nothing.txt.zst", zstandard.ZstdCompressor().compress(b""), ": empty; name a file with text in it", None),
    ("not.jsonl.zst", LINE * 9, ": damaged .zst file (...); copy or compress it again", None),
    (
        "half.jsonl.gz",
        gzip.compress(LINE.encode() * 9000)[:-9],
        ": damaged .gz",
        None,
    ),
    ("page.html", "<p>", ": is HTML; convert it to text first, for with --format text its tags would be trained", None),
    ("words.doc", "words", ": its suffix is not one of .txt, .md, ...; say what it holds, such as --format text", None),
]


@pytest.mark.parametrize(("name", "content", "message", "left"), BAD, ids=[row[0] for row in BAD])
def test_bad_data_is_one_line_or_left_out(tmp_path, monkeypatch, name, content, message, left):
    monkeypatch.setattr(json_module, "MAX_RECORD_BYTES", 300_000)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(re.escape(name + message).replace(r"\.\.\.", ".*"), tmp_path / name)
    (tmp_path / "z.txt").write_text("z")
    assert texts_left(tmp_path, name) == (left or "") + "z"


def texts_left(folder, name):
    """Returns what --skip-bad leaves of a file and a good one; all that it leaves out is listed."""
    inputs = [str(folder / name), str(folder / "z.txt")]
    summary = prepare(inputs, folder / "out", tokenizer="bytes", reading=Reading(skip_bad=True))
    skipped = folder / "out" / "skipped.txt"
    lines = skipped.read_text().splitlines() if skipped.exists() else []
    assert all(name in line for line in lines)
    assert bool(lines) == (name != "blank.jsonl") == (f"left out {len(lines)} bad file" in str(summary))
    data = (folder / "out" / "train.bin").read_bytes()[::2]
    return bytes(byte - 1 for byte in data if byte).decode()


def test_there_are_forty_kinds():
    assert len(BAD) >= 40


def test_several_files_in_another_encoding_are_listed_at_once(tmp_path):
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_bytes("é".encode("latin-1" if number % 2 else "utf-8"))
    with pytest.raises(
        ValueError, match="12 files cannot be read as text; give their --encoding, or leave them out"
    ) as caught:
        prepare([str(tmp_path)], tmp_path / "out", tokenizer="bytes")
    assert [line.split(": ")[0][-6:] for line in caught.value.lines[1:]] == [f"{n:02}.txt" for n in range(1, 25, 2)]
    assert texts(tmp_path, skip_bad=True) == ["é"] * 13


def test_a_file_that_vanishes(tmp_path, monkeypatch):
    monkeypatch.setattr("infctx.prepare.prepare._check_output", lambda *_: (tmp_path / "a.jsonl").unlink())
    for skip_bad in (False, True):
        (tmp_path / "a.jsonl").write_text(LINE)
        (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b"}))
        inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
        reading = Reading(skip_bad=skip_bad)
        if skip_bad:
            prepare(inputs, tmp_path / "out", tokenizer="bytes", reading=reading)
            assert "a.jsonl: cannot be read (No such file" in (tmp_path / "out" / "skipped.txt").read_text()
        else:
            with pytest.raises(
                ValueError, match=r"a\.jsonl: cannot be read \(No such file or directory\); check the file"
            ):
                prepare(inputs, tmp_path / "out", tokenizer="bytes", reading=reading)


def test_files_whose_names_are_not_utf8(tmp_path):
    for name, content in (
        ("a\udcff.jsonl", LINE + "5"),
        ("b\udcff.parquet", parquet(text=["b"])),
        ("c\udcff.txt", b"\xe9"),
    ):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    prepare([str(tmp_path)], tmp_path / "out", tokenizer="bytes", reading=Reading(skip_bad=True))
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.partition(f"{tmp_path}/")[2].partition(";")[0] for line in skipped] == [
        "a\\udcff.jsonl:2: not a JSON object but int",
        "b\\udcff.parquet: pyarrow wants a name in UTF-8",
        "c\\udcff.txt: not UTF-8: byte 0xe9 at offset 0",
    ]


def test_an_unknown_encoding_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for name in ("utf-9", "hex", "", "a\0b", "undefined", "raw_unicode_escape", "utf-7"):
        refused("--encoding: .* is not known; give one such as cp1252", tmp_path / "a.txt", encoding=name)

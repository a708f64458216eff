"""The files that inputs lead to, and the messages about those left out."""

import gzip
import os
import threading

import pytest
import zstandard

from infctx.documents.document import Reading
from infctx.documents.inputs import find_sources
from infctx.prepare.prepare import prepare

from readings import refused, texts


def notes(*inputs, format=None):
    return find_sources([str(name) for name in inputs], Reading(format=format))[1]


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_folders_are_searched_and_sorted_and_other_suffixes_left_out(tmp_path):
    write(tmp_path, {name: name for name in ("b/z.txt", "b/a.md", "b/ignored.pdf", "README")})
    write(tmp_path, {"a.txt.gz": gzip.compress(b"a.txt.gz"), "c.jsonl": '{"text": "c.jsonl"}'})
    assert texts(tmp_path) == ["a.txt.gz", "b/a.md", "b/z.txt", "c.jsonl"]
    assert texts(tmp_path / "c.jsonl", tmp_path / "b") == ["c.jsonl", "b/a.md", "b/z.txt"]
    assert texts(tmp_path / "b" / "*") == ["b/a.md", "b/z.txt"]
    assert texts(tmp_path / "**") == ["a.txt.gz", "b/a.md", "b/z.txt", "c.jsonl"]
    assert texts(tmp_path / "*" / "*.txt") == ["b/z.txt"]


def test_a_name_with_brackets_is_a_name_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("pattern")
    assert texts(tmp_path / "a[1].txt") == ["brackets"]


def test_a_named_file_of_another_suffix_with_a_format(tmp_path):
    (tmp_path / "a.log.gz").write_bytes(gzip.compress(b"log"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "b"}')
    assert texts(tmp_path / "a.log.gz", tmp_path / "b.jsonl", format="text") == ["log", "b"]


def test_files_left_out_are_counted_the_commonest_kinds_first(tmp_path):
    write(tmp_path, {f"{i}.py": "code" for i in range(979)} | {"a.txt": "a", "b.html": "<p>", "sub/c.pdf": b"%PDF-1.7"})
    line = "left out 981 files: 979 .py, 1 .html, 1 .pdf; --format text takes those that are text too"
    assert notes(tmp_path) == [line]
    assert notes(f"{tmp_path}/**") == [line]
    assert notes(tmp_path / "*.txt") == []
    write(tmp_path, {f"b.{suffix}": "" for suffix in ("a", "c", "tar.gz", "d", "PY")} | {"LICENSE": ""})
    (line,) = notes(tmp_path)
    assert line.startswith("left out 987 files: 980 .py, 1 .a, 1 .c, 1 .d, 1 .html, and 3 more kinds; ")


def test_a_format_takes_all_texts_of_folders_and_globs(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.py": "b", "c.jsonl": '{"text": "c"}', "d": "d", "e/f.rs.gz": gzip.compress(b"f")})
    assert texts(tmp_path, format="text") == ["a", "b", "c", "d", "f"]
    assert texts(tmp_path / "*", format="text") == ["a", "b", "c", "d", "f"]
    assert notes(tmp_path, format="text") == []
    write(tmp_path, {name: '{"text": "line"}' for name in ("b.py", "d")} | {"e/f.rs.gz": b""})
    assert texts(tmp_path, format="jsonl") == ["a", "line", "c", "line"]


BINARY = {
    "a.pdf": b"%PDF-1.7\n no zeros here",
    "a.epub": b"PK\x03\x04" + b"." * 26 + b"mimetypeapplication/epub+zip",
    "a.docx": b"PK\x03\x04 no zeros here",
    "a.dat": b"text, and then\0",
    "a.log": b"BZh91AY&SY no zeros",
    "a.png.zst": zstandard.ZstdCompressor().compress(b"\x89PNG\0"),
}
KINDS = ("a PDF", "an EPUB", "a zip archive", "a binary file.*", "a bzip2 archive", "a binary file.*")


def test_binary_files_are_left_out_and_counted(tmp_path):
    write(tmp_path, {"a.py": "a", **BINARY, "b.pdf": BINARY["a.pdf"]})
    assert texts(tmp_path, format="text") == ["a"]
    kinds = "2 .pdf, 1 .dat, 1 .docx, 1 .epub, 1 .log, and 1 more kind"
    assert notes(tmp_path, format="text") == [f"left out 7 binary files: {kinds}; convert them to UTF-8 text first"]


@pytest.mark.parametrize("input_format", [None, "text", "jsonl"])
@pytest.mark.parametrize("name, kind", list(zip(BINARY, KINDS, strict=True)))
def test_a_binary_file_named_directly(tmp_path, name, kind, input_format):
    write(tmp_path, BINARY)
    refused(rf"{name}: is {kind}; convert it to UTF-8 text first", tmp_path / name, format=input_format)


def test_text_in_utf16_without_a_mark_is_recognized(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "a.txt").write_text("hello, world", encoding=encoding)
        (tmp_path / "a.log").write_text("hello, world", encoding=encoding)
        refused(rf"a\.txt: is text in UTF-16 without .*; add --encoding {encoding}", tmp_path / "a.txt")
        refused(rf"a\.log: is text in UTF-16 without .*; add --encoding {encoding}", tmp_path / "a.log", format="text")
        assert texts(tmp_path / "a.log", format="text", encoding=encoding) == ["hello, world"]


def test_hidden_files_are_not_taken_by_a_format_unless_they_are_named(tmp_path):
    write(tmp_path, {"a.py": "a", ".env": "secret"})
    write(tmp_path, {".git/HEAD": "ref", ".git/x.sample": "x", ".git/notes.txt": "notes"})
    assert texts(tmp_path, format="text") == ["notes", "a"]
    line = "left out 3 hidden files: 2 without a suffix, 1 .sample; name those that you want"
    assert notes(tmp_path, format="text") == [line]
    assert texts(tmp_path, tmp_path / ".env", format="text") == ["notes", "a", "secret"]
    assert "left out 2 hidden files" in notes(tmp_path, tmp_path / ".env", format="text")[0]
    assert texts(tmp_path / ".git", format="text") == ["ref", "notes", "x"]


def test_a_file_reached_twice_is_taken_once(tmp_path):
    write(tmp_path, {"books/a.txt": "a", "books/b.txt": "b", "books/c.py": "c"})
    books = tmp_path / "books"
    assert texts(books / "b.txt", books, f"{books}/../books/*.txt") == ["b", "a"]
    assert notes(books, books / "a.txt")[1:] == [f"1 file named twice, taken once: {books / 'a.txt'}"]
    (tmp_path / "link.txt").symlink_to(books / "a.txt")
    assert texts(books, tmp_path / "link.txt") == ["a", "b"]
    assert notes(books, books)[0].startswith("left out 1 file: 1 .py;")  # not two
    assert notes(*[books] * 3)[1] == (
        f"4 files named twice, taken once: {books / 'a.txt'}, {books / 'b.txt'}, {books / 'a.txt'} and 1 more"
    )
    write(tmp_path, {"books/a.txt": ""})
    refused(r"a\.txt: empty", books, books / "a.txt")  # as if it were named alone


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("piped",), daemon=True)
    writer.start()
    assert texts(tmp_path / "pipe", format="text") == ["piped"]


def test_a_missing_file(tmp_path):
    refused(r"no\.txt: no such file or folder", tmp_path / "no.txt")


def test_a_pattern_without_match(tmp_path):
    refused(r"\*\.txt: no file matches this pattern", tmp_path / "*.txt")


def test_no_inputs():
    refused("nothing to read")


def test_standard_input_without_format_or_twice():
    refused("add --format text or --format jsonl", "-")
    refused("named twice", "-", "-", format="text")


def test_an_unknown_format():
    refused("--format: 'doc' is not known; choose one of text, jsonl, json, csv", "-", format="doc")


def test_nothing_to_read(tmp_path):
    write(tmp_path, {"a.pdf": b"%PDF", "b.py": "b"})
    line = "nothing in there to read; left out 2 files: 1 .pdf, 1 .py; --format text takes those that are text too"
    refused(line, tmp_path)
    refused(line, tmp_path / "*")
    refused("left out 1 binary file: 1 .pdf; convert", tmp_path / "*.pdf", format="text")
    write(tmp_path, {"c/d.txt": "d", "c/e.py": "e"})
    refused(r"\*\.py: nothing in there to read; left out 1 file: 1 .py", tmp_path / "c", tmp_path / "*.py")
    (tmp_path / "empty").mkdir()
    refused("empty: nothing in there to read; check the path", tmp_path / "empty")


@pytest.mark.parametrize("name", ["a.log", "a", "a.py.gz", "a.toml"])
def test_a_suffix_that_does_not_imply_a_format(tmp_path, name):
    write(tmp_path, {name: gzip.compress(b"a") if name.endswith(".gz") else b"a"})
    refused(rf"{name}: its suffix is not one of .txt, .md, .*; say what it holds, such as --format", tmp_path / name)


def test_html_named_directly(tmp_path):
    write(tmp_path, {"a.HTML": "<p>a"})
    refused(r"a\.HTML: is HTML; .*its tags would be trained on", tmp_path / "a.HTML")
    assert texts(tmp_path / "a.HTML", format="text") == ["<p>a"]


def test_files_that_are_left_out_are_named_before_the_work_and_at_the_end(tmp_path, caplog):
    write(tmp_path, {"in/a.txt": "a", "in/b.py": "b", "in/c.rs": "c"})
    caplog.set_level("INFO", "infctx")
    line = "left out 2 files: 1 .py, 1 .rs; --format text takes those that are text too"
    summary = prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer="bytes")
    assert [record.message for record in caplog.records] == [line]
    assert str(summary).splitlines()[1:] == [line]
    summary = prepare([str(tmp_path / "in")], tmp_path / "all", tokenizer="bytes", reading=Reading(format="text"))
    assert (summary.splits["train"].documents, summary.notes) == (3, [])

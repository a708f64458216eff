"""The check of words finds each banned word with its line, and exceptions that excuse nothing."""

import re

import pytest

import check_words
from places import ROOT

WORDS = (
    *("behind", "told", "Tells", "can not", "goes on", "stands for", "so many", "hands it on", "lacks", "alas"),
    *("cannot be had", "is no more", "needs not", "asks of", "a matter of", "of its own", "mended", "reckoned"),
    *("for want of", "is said", "misspelt", "neighbours"),
)


def found(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return [(finding.line, finding.word) for finding in check_words.find_words(folder / name)]


@pytest.mark.parametrize("word", WORDS)
def test_each_word_is_found_with_its_line(tmp_path, word):
    code = f'"""One.\n\nTwo {word} three.\n"""\n\nx = 1  # it {word} so\ny = f"{{x}} {word} x"\n'
    assert found(tmp_path, "a.py", code) == [(3, word), (6, word), (7, word)]
    for name, text in {
        "a.cu": f"int x;\nint y;  // it {word} so\n",
        "a.md": f"# Page\nIt {word} so.\n",
        "a.yaml": f"a: 1\nb: 2  # it {word} so\n",
        "Makefile": f"all:\n\t@echo 'it {word} so'\n",
    }.items():
        assert found(tmp_path, name, text) == [(2, word)]


def test_every_pattern_has_an_example_here():
    for pattern in check_words.BANNED:
        assert any(re.fullmatch(pattern, word, re.IGNORECASE) for word in WORDS), pattern


def test_a_phrase_may_continue_on_the_next_line(tmp_path):
    assert found(tmp_path, "a.py", "x = 1\n# The run goes\n# on.\n") == [(2, "goes on")]
    assert found(tmp_path, "a.py", "def test_it_goes_on(): ...\n") == [(1, "goes on")]


def test_code_is_not_prose(tmp_path):
    assert found(tmp_path, "a.py", "behind = told = lacking = 1  # fine\n") == []
    assert found(tmp_path, "a.cu", "int behind;\n") == found(tmp_path, "a.yaml", "behind: 1\n") == []


def test_an_exception_excuses_its_line_and_must_excuse_one(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("The rank furthest behind.\n")
    assert check_words.check([file], {}) == [f"{file}:1: 'behind'; use: after"]
    assert check_words.check([file], {(str(file), "furthest behind"): "of progress"}) == []
    (stale,) = check_words.check([], {(str(file), "furthest behind"): "of progress"})
    assert "no line has 'furthest behind'" in stale


def test_the_repository_passes(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert check_words.main() == 0, capsys.readouterr().out

"""Folders as one document; git itself is the judge of what .gitignore leaves."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from infctx.documents.document import Reading
from infctx.documents.folders import repository_files
from infctx.documents.inputs import find_sources

from readings import refused, texts


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def git(folder, *words):
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout


NAMES = ["a.py", "b.log", "keep.log", "build", "docs", "x.txt", "a b.md", "[x].txt", "é.py", "data"]
RULES = [
    "*.log",
    "!keep.log",
    "build/",
    "/docs",
    "docs/*.txt",
    "**/data",
    "data/**",
    "!data/",
    "a*",
    "!/a.py",
    "# c",
    "",
]
RULES += ["x.*", "\\[x\\].txt", "é.py", "doc?", "a b.md ", "*/b.log", "!*/x.txt", "/build/docs/", "[a-c].*", "*", "!*/"]


@pytest.mark.parametrize("seed", range(25))
def test_gitignore_means_what_git_means(tmp_path, seed):
    rng = random.Random(seed)
    places = [Path(*rng.choices(NAMES, k=rng.choice([1, 2, 3, 4]))) for _ in range(40)]
    for place in places:
        path = tmp_path / place
        if not path.exists() and not any(parent.is_file() for parent in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    folders = [tmp_path, *(path for path in sorted(tmp_path.rglob("*")) if path.is_dir())]
    for folder in rng.sample(folders, k=min(3, len(folders))):
        (folder / ".gitignore").write_text("\n".join(rng.choices(RULES, k=rng.choice([1, 3, 6]))) + "\n")
    git(tmp_path, "init", "-q")
    listed = git(tmp_path, "ls-files", "-z", "--others", "--exclude-standard").split("\0")
    expected = sorted(name for name in listed if name and not name.endswith(".gitignore"))
    found = [path for path, reason in repository_files(tmp_path, None, lambda error: None) if not reason]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in found) == expected


TREE = {
    "src/main.py": "import os\n",
    "src/deep/er/no_newline.c": "int x;",
    "README.md": "Read\n\nme\n",
    "a.txt": "\ufeffwith a mark\r\n",
    "empty.py": "",
    "package.json": "{}",
    "logo.png": b"\x89PNG\0",
    "data.bin": b"\0\1",
    ".gitignore": "build/\n*.tmp\n",
    "x.tmp": "x",
    "build/out.txt": "x",
    ".github/flow.yaml": "x",
    ".git/HEAD": "ref",
}
DOCUMENT = """==> README.md <==
Read

me

==> a.txt <==
with a mark\r

==> empty.py <==

==> package.json <==
{}

==> src/deep/er/no_newline.c <==
int x;

==> src/main.py <==
import os

"""


def test_a_repository_is_one_document(tmp_path):
    write(tmp_path / "one", TREE)
    write(tmp_path / "two", {"b.py": "b"})
    assert texts(tmp_path / "one", join="repository") == [DOCUMENT]
    second = "==> b.py <==\nb\n\n"
    assert texts(tmp_path / "one", tmp_path / "two", join="repository") == [DOCUMENT, second]
    assert texts(f"{tmp_path}/*", join="repository") == [DOCUMENT, second]
    assert texts(tmp_path / "two" / "b.py", tmp_path / "two", join="repository", format="text") == ["b", second]
    _, notes = find_sources([str(tmp_path / "one")], Reading(join="repository"))
    assert notes == [
        "left out 2 hidden files: 1 .github/, 1 without a suffix; name those that you want",
        "left out 2 binary files: 1 .bin, 1 .png; convert them to UTF-8 text first",
        "left out 2 ignored files: 1 .tmp, 1 build/; a .gitignore names them",
    ]


def test_a_heading_is_one_line_of_utf8(tmp_path):
    write(tmp_path / "one", {"a\nb.py": "a", "c\udcff.py": "c"})
    assert texts(tmp_path / "one", join="repository") == ["==> a\\nb.py <==\na\n\n==> c\\udcff.py <==\nc\n\n"]


def test_links_are_not_followed(tmp_path):
    write(tmp_path / "one", {"a.py": "a"})
    (tmp_path / "one" / "loop").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "b.py").symlink_to(tmp_path / "one" / "a.py")
    (tmp_path / "one" / "gone.py").symlink_to(tmp_path / "gone")
    assert texts(tmp_path / "one", join="repository") == ["==> a.py <==\na\n\n"]
    (tmp_path / "one" / "c.txt").write_text("c")
    assert texts(tmp_path / "one") == ["c"]


def test_a_repository_with_a_file_in_another_encoding(tmp_path):
    write(tmp_path / "one", {"a.py": "a", "b.py": "é".encode("latin-1"), "c.py": "é".encode("utf-16")})
    refused(r"b\.py: not UTF-8: byte 0xe9 at offset 0", tmp_path / "one", join="repository")
    kept = "==> a.py <==\na\n\n==> c.py <==\né\n\n"
    assert texts(tmp_path / "one", join="repository", skip_bad=True) == [kept]
    whole = "==> a.py <==\na\n\n==> b.py <==\né\n\n==> c.py <==\né\n\n"
    assert texts(tmp_path / "one", join="repository", encoding="cp1252") == [whole]


def test_a_repository_without_texts(tmp_path):
    write(tmp_path / "one", {"a.bin": b"\0"})
    refused("one: nothing in there to read", tmp_path / "one", join="repository")


@pytest.mark.parametrize("join", [None, "repository"])
def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch, join):
    write(tmp_path, {"a.txt": "a", "secret/b.txt": "b"})
    scandir, listdir = os.scandir, os.listdir

    def deny(function):
        def checked(path="."):
            if Path(path).name == "secret":
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return checked

    monkeypatch.setattr(os, "scandir", deny(scandir))
    monkeypatch.setattr(os, "listdir", deny(listdir))
    refused(r"secret: cannot be read \(Permission denied\); check who may read it", tmp_path, join=join)
    bad = []
    sources, _ = find_sources([str(tmp_path)], Reading(join=join, skip_bad=True), bad.append)
    assert len(sources) == len(bad) == 1

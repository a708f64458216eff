"""Atomic folders: what a killed process leaves is removed by the next one, and what a living one fills is not."""

import fcntl
import subprocess
import sys

import pytest

from infctx.files import atomic_folder

from places import ROOT

FILL = """
import sys
from pathlib import Path
from infctx.files import atomic_folder

with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("theirs")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def filling(path):
    """A process in the middle of filling `path`, and the name of its temporary folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", FILL, str(path)], cwd=ROOT, text=True, **pipes)
    return process, process.stdout.readline().strip()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(path, text):
    with atomic_folder(path) as folder:
        (folder / "a").write_text(text)


def test_what_a_killed_process_leaves_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "out"
    killed, left = filling(path)
    killed.kill()
    killed.communicate(timeout=60)
    assert names(tmp_path) == [left]  # it had no chance
    (tmp_path / ".out.0123abcd.old").mkdir()  # a folder that was replaced, and nothing is in its place yet
    make(tmp_path / "another", "mine")
    assert names(tmp_path) == sorted([".out.0123abcd.old", left, "another"])  # names of others are theirs
    make(path, "mine")
    assert names(tmp_path) == [".out.0123abcd.old", "another", "out"]
    make(path, "new")
    assert names(tmp_path) == ["another", "out"]
    assert (path / "a").read_text() == "new"


def test_two_at_once_do_not_remove_each_other(tmp_path):
    path = tmp_path / "out"
    other, theirs = filling(path)
    with atomic_folder(path) as folder:
        assert names(tmp_path) == sorted([theirs, folder.name])
        (folder / "a").write_text("mine")
    assert names(tmp_path) == sorted([theirs, "out"])
    output, errors = other.communicate(timeout=60)  # its input ends, so it finishes
    assert (other.returncode, errors) == (0, "")
    assert names(tmp_path) == ["out"]
    assert (path / "a").read_text() == "theirs"


def test_a_folder_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = fcntl.flock, []

    def slow(descriptor, how):
        if how == fcntl.LOCK_EX and not removed:
            (found,) = tmp_path.iterdir()
            found.rmdir()  # as another process would that has seen it without a lock
            removed.append(found)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    make(tmp_path / "out", "mine")
    assert removed and names(tmp_path) == ["out"]


def test_where_nothing_can_be_locked_nothing_is_removed(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    make(tmp_path / "out", "mine")
    assert names(tmp_path) == [".out.0123abcd.tmp", "out"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []

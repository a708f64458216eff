"""Atomic files and folders: each is written completely or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path` to write to; at the end it is flushed to disk and renamed to `path`.

    On an exception the temporary file is removed and `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path, "tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # the temporary name means nothing to the user
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `path` to fill; at the end its files are flushed and it is renamed to `path`.

    A folder that already exists at `path` is replaced once the new one is complete.  On an exception the temporary
    folder is removed and `path` is unchanged.  A killed process cannot remove its temporary folder; the next process
    that makes the same `path` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    try:
        folder, lock = _locked_folder(path)
    except OSError as error:
        error.filename = str(path)
        raise
    old = folder.with_suffix(".old")
    try:
        yield folder
        for file in folder.iterdir():
            flush_to_disk(file)
        flush_to_disk(folder)
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(folder, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
        flush_to_disk(path.parent)
    except OSError as error:  # the temporary name means nothing to the user
        error.filename = str(error.filename or path).replace(str(folder), str(path))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Makes a temporary folder; returns it and the descriptor that holds its lock while open."""
    while True:
        folder = temporary_name(path, "tmp")
        folder.mkdir()
        # Until it is locked, another process may think it is abandoned and remove it; then this makes a new one.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks, where no folder counts as abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Removes leftovers of killed processes that were writing `path`: temporary folders whose lock nobody holds, and
    replaced folders whose removal was interrupted."""
    name = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{8}[.](tmp|old)")
    for folder in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name) and entry.is_dir()]:
        # Until the new folder is in place, the replaced one is the only copy.
        if folder.suffix == ".old" and (folder.with_suffix(".tmp").exists() or not path.exists()):
            continue
        with contextlib.suppress(OSError):  # in use, or just removed by another process
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError: one from a write does not have it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def temporary_name(path: Path, kind: str) -> Path:
    """Returns an unused hidden name next to `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def flush_to_disk(path: Path) -> None:
    """Makes the content of a file, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Atomic files: what is written is whole or is not there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; at the end it is flushed to disk and takes its name.

    On an exception the temporary file is removed and `path` is as it was.
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
            error.filename = str(path)  # the temporary name says nothing to the user
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` to fill; at the end its files are flushed and it takes its name.

    A folder that stands at `path` is replaced, once the new one is complete.  On an exception the temporary folder is
    removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, old = temporary_name(path, "tmp"), temporary_name(path, "old")
    folder.mkdir()
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
    except OSError as error:  # the temporary name says nothing to the user
        error.filename = str(error.filename or path).replace(str(folder), str(path))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Puts the file's name into an OSError: that of a write does not have one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def temporary_name(path: Path, kind: str) -> Path:
    """A hidden name beside `path` that nothing else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def flush_to_disk(path: Path) -> None:
    """Makes the content of a file, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

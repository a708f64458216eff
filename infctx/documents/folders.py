"""Folders: a folder in; the files below it out, sorted; for a repository, those that its .gitignore files leave."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from pathspec import GitIgnoreSpec

from infctx.documents.blocks import not_text
from infctx.errors import InputError

IGNORE_FILE = ".gitignore"
BINARY_BYTES = 8000  # git looks for NUL in as many
OTHER, JSON, HIDDEN, BINARY, IGNORED, LINK = "", "json ", "hidden ", "binary ", "ignored ", "linked "
"""Reasons to leave a file out."""
OnBad = Callable[[InputError], object]


def files_below(folder: Path, on_bad: OnBad) -> list[Path]:
    """Returns all files below a folder, sorted. Links to folders are not followed.

    on_bad: called with the error of each folder that cannot be read
    """
    found = []
    for place, _, names in os.walk(folder, onerror=lambda error: on_bad(cannot_read(error))):
        found += [path for path in (Path(place, name) for name in names) if path.is_file()]
    return sorted(found)


def repository_files(folder: Path, encoding: str | None, on_bad: OnBad) -> Iterator[tuple[Path, str]]:
    """Yields (file, reason to leave it out) of a repository, sorted; the reason is "" for a text.

    Hidden files, binary ones, links, and what a .gitignore names are left out, and so are folders, each as a whole; as
    for git, the innermost .gitignore with a word about a file decides. .git itself is no part of it.
    """
    yield from _files_in(folder, [], encoding, on_bad)


def cannot_read(error: OSError) -> InputError:
    """Returns the error for a file or folder that the system does not let us read."""
    return InputError(f"{error.filename}: cannot be read ({error.strerror}); check who may read it, or leave it out")


def _files_in(
    folder: Path, rules: list[tuple[Path, GitIgnoreSpec]], encoding: str | None, on_bad: OnBad
) -> Iterator[tuple[Path, str]]:
    try:
        entries = sorted(folder.iterdir())
        if (ignore := folder / IGNORE_FILE).is_file():
            rules = [*rules, (folder, _rules_of(ignore))]
    except OSError as error:
        on_bad(cannot_read(error))
        return
    for path in entries:
        if path.name == ".git":
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        if _is_ignored(path, is_folder, rules):
            yield path, IGNORED
        elif path.name.startswith("."):
            yield path, HIDDEN
        elif path.is_symlink():
            yield path, LINK
        elif is_folder:
            yield from _files_in(path, rules, encoding, on_bad)
        elif path.is_file():
            try:
                with open(path, "rb") as file:
                    yield path, BINARY if not_text(file.read(BINARY_BYTES), encoding) else OTHER
            except OSError as error:
                on_bad(cannot_read(error))


def _rules_of(ignore: Path) -> GitIgnoreSpec:
    """Reads a .gitignore; a line that is no pattern means nothing, as for git."""
    lines = []
    for line in ignore.read_bytes().decode(errors="replace").split("\n"):
        with suppress(ValueError, re.error):
            GitIgnoreSpec.from_lines([line])
            lines.append(line)
    return GitIgnoreSpec.from_lines(lines)


def _is_ignored(path: Path, is_folder: bool, rules: list[tuple[Path, GitIgnoreSpec]]) -> bool:
    for folder, rule in reversed(rules):
        name = path.relative_to(folder).as_posix() + ("/" if is_folder else "")
        if (ignored := rule.check_file(name).include) is not None:
            return ignored
    return False

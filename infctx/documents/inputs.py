"""Inputs: names of files, folders and globs in, the files to read out, and a line about everything that is left out.

Folders and globs give the files whose suffix says what they hold, but no .json, which is more often a setting than
data. With a format, they give files of any other suffix too, except for hidden files and files that are binary. With
`join`, a folder is one source. "-" is standard input; the name of a token store, without .bin and .idx, is a store.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from infctx.documents.blocks import check_encoding, first_bytes, not_text
from infctx.documents.document import AS_THEY_ARE, FORMATS, REPOSITORY, STDIN, STORE, Reading, Source
from infctx.documents.folders import BINARY, HIDDEN, IGNORED, JSON, LINK, OTHER, OnBad, files_below, repository_files
from infctx.errors import InputError
from infctx.hub.names import PREFIX, hub_name
from infctx.small_texts import counted, quoted
from infctx.suffixes import COMPRESSIONS, FORMATS_BY_SUFFIX

KNOWN = ".txt, .md, .jsonl, .json, .csv, .tsv, .parquet (or .gz, .zst of them)"
REMEDIES = {
    OTHER: "--format text takes those that are text too",
    JSON: "--format json takes them as records",
    HIDDEN: "name those that you want",
    BINARY: "convert them to UTF-8 text first",
    IGNORED: "a .gitignore names them",
    LINK: "name what they lead to",
}
MOST_KINDS, MOST_NAMES = 5, 3  # that a line lists


@dataclass
class _File:
    """A file that an input leads to. Two inputs lead to the same file if its real path is the same."""

    path: Path
    named: bool = False
    hidden: bool = False
    is_repository: bool = False

    @cached_property
    def real(self) -> str:
        return os.path.realpath(self.path)


def find_sources(
    inputs: Sequence[str], reading: Reading = AS_THEY_ARE, on_bad: OnBad | None = None
) -> tuple[list[Source], list[str]]:
    """Returns the files that `inputs` name, in their order, each folder and glob sorted by name; and lines for the user
    about files left out or named twice, and about datasets on the hub.

    reading: its format is that of standard input, of named files, and of files with any other suffix
    on_bad: called with the error of each file and folder that cannot be read; without it, the first one is raised
    Raises InputError for names without files, and for files named directly that cannot be read as text.
    """
    _check(inputs, reading)
    found: dict[str, Source] = {}  # by real path
    about_hub: list[str] = []
    left_out: dict[str, tuple[str, str]] = {}  # by real path: the reason, and the kind of file
    bad: set[str] = set()
    twice: list[str] = []
    report = on_bad or _raise
    for name in inputs:
        if name == STDIN:
            found[STDIN] = _standard_input(reading.format)
            continue
        if name.startswith(PREFIX):
            sources, line = _of_hub(name, reading)
            found |= {source.path: source for source in sources}
            about_hub.append(line)
            continue
        if store := _store(name):
            real = os.path.realpath(store.path)
            twice += [name] if real in found else []
            found[real] = store
            continue
        files = _files_of(name, reading, report)
        for file in files:
            source = found.get(file.real) or _source(file, reading, left_out, report)
            if source is None:
                bad.add(file.real)
            elif file.real in found:
                twice.append(str(file.path))
                found[file.real].named |= file.named
            elif isinstance(source, Source):
                found[file.real] = source
                left_out.pop(file.real, None)  # its folder came first, and now it is named
            else:
                left_out[file.real] = source
        if not any(file.real in found or file.real in bad for file in files):
            if inside := next((file.path for file in files if _store(str(file.path))), None):
                raise InputError(f"{name}: holds token stores, not texts; name one, such as {inside.with_suffix('')}")
            lines = _left_out_lines(left_out[file.real] for file in files)
            raise InputError(f"{name}: nothing in there to read; {'; '.join(lines) or 'check the path'}")
    return list(found.values()), [*about_hub, *_left_out_lines(left_out.values()), *_twice_lines(twice)]


def _of_hub(name: str, reading: Reading) -> tuple[list[Source], str]:
    """Returns the files of a dataset on the hub, none downloaded yet, and a line about them."""
    from infctx.hub.datasets import dataset_files, kind_of  # they load huggingface_hub
    from infctx.hub.files import describe_bytes
    from infctx.hub.repository import is_offline

    sources = []
    for file in dataset_files(name, reading.split, reading.config):
        suffix = kind_of(file.path)
        compression = Path(file.path).suffix.lower()
        compression = compression if compression in COMPRESSIONS else ""
        sources.append(Source(str(file), reading.format or FORMATS_BY_SUFFIX[suffix], compression, True, hub_file=file))
    size = describe_bytes(sum(source.num_bytes for source in sources))
    what = f"{counted(len(sources), 'file')} of {suffix}, {size}"
    if is_offline():
        return sources, f"{name}: HF_HUB_OFFLINE is set, so only what the cache has of it is read: {what}"
    return sources, f"{name}: {what}, downloaded as they are read"


def _check(inputs: Sequence[str], reading: Reading) -> None:
    if reading.format not in (None, *FORMATS):
        raise InputError(f"--format: {reading.format!r} is not known; choose one of {', '.join(FORMATS)}")
    if reading.join not in (None, REPOSITORY):
        raise InputError(f"--join: {reading.join!r} is not known; {REPOSITORY} makes one document of a folder")
    check_encoding(reading.encoding)
    if not inputs:
        raise InputError("nothing to read; name files, folders, globs, or - for standard input")
    if list(inputs).count(STDIN) > 1:
        raise InputError("standard input (-) is named twice; it can be read only once")
    for option, value in (("--split", reading.split), ("--config", reading.config)):
        if value is not None and not any(name.startswith(PREFIX) for name in inputs):
            raise InputError(f"{option}: is for datasets on the hub, {PREFIX}OWNER/DATASET; leave it out")


def _raise(error: InputError) -> None:
    raise error


def _standard_input(input_format: str | None) -> Source:
    if input_format is None:
        raise InputError("standard input has no suffix that gives its format; add --format text or --format jsonl")
    if input_format == "parquet":
        raise InputError("standard input cannot be parquet, which is not read from its beginning; name the file")
    return Source(STDIN, input_format, "", True)


def _store(name: str) -> Source | None:
    """Returns a token store as a source, if that is what a name means."""
    prefix = name.removesuffix(".idx").removesuffix(".bin")
    files = [Path(prefix + suffix) for suffix in (".idx", ".bin")]
    is_one = all(file.is_file() for file in files) and (prefix != name or not Path(name).exists())
    return Source(prefix, STORE, "", True, files) if is_one else None


def _files_of(name: str, reading: Reading, on_bad: OnBad) -> list[_File]:
    """Yields the files that an input leads to; InputError if there are none."""
    path = Path(name)
    if path.is_dir():
        return _below(path, reading, on_bad)
    if path.exists():
        return [_File(path, named=True)]
    if not glob.has_magic(name):
        raise InputError(f"{name}: no such file or folder; {_remedy(name)}")
    matches = [Path(match) for match in glob.glob(name, recursive=True)]
    if not matches:
        raise InputError(f"{name}: no file matches this pattern; check it, and put it in quotes")
    # With ** a file can be matched by itself and through its folder.
    found = (
        file for match in matches for file in (_below(match, reading, on_bad) if match.is_dir() else [_File(match)])
    )
    files = {file.path: file for file in found}
    return [files[path] for path in sorted(files) if path.is_file() or files[path].is_repository]


def _remedy(name: str) -> str:
    """Returns what to do about a name where nothing is."""
    halves = [suffix for suffix in (".bin", ".idx") if Path(name + suffix).is_file()]
    if halves:
        return f"of a token store there is only {name}{halves[0]}, so copy the other file too"
    is_like_one = "." not in name and hub_name(name) is not None
    return f"check the path, or write {PREFIX}{name} for a dataset on the hub" if is_like_one else "check the path"


def _below(folder: Path, reading: Reading, on_bad: OnBad) -> list[_File]:
    if reading.join:
        return [_File(folder, is_repository=True)]
    return [
        _File(path, hidden=any(part.startswith(".") for part in path.relative_to(folder).parts))
        for path in files_below(folder, on_bad)
    ]


def _source(
    file: _File, reading: Reading, left_out: dict[str, tuple[str, str]], on_bad: OnBad
) -> Source | tuple[str, str] | None:
    """Returns a file or repository as a source, or the reason to leave it out and its kind; None if it is bad."""
    if file.is_repository:
        return _repository(file.path, reading, left_out, on_bad)
    try:
        return _taken(file, reading)
    except InputError as error:
        on_bad(error)
        return None


def _repository(
    folder: Path, reading: Reading, left_out: dict[str, tuple[str, str]], on_bad: OnBad
) -> Source | tuple[str, str]:
    """Returns a folder as one source; adds what is left out of it."""
    files = []
    for path, reason in repository_files(folder, reading.encoding, on_bad):
        if reason:
            kind = f"{path.name}/" if path.is_dir() else path.suffix.lower()
            left_out[os.path.realpath(path)] = reason, quoted(kind, 20) or "without a suffix"
        else:
            files.append(path)
    return Source(str(folder), REPOSITORY, "", True, files) if files else (OTHER, "folder without a text")


def _taken(file: _File, reading: Reading) -> Source | tuple[str, str]:
    """Returns the file as a source, or the reason to leave it out and its kind."""
    path, named = file.path, file.named
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    suffix = (path.with_suffix("") if compression else path).suffix.lower()
    known = FORMATS_BY_SUFFIX.get(suffix) if named or suffix != ".json" else None
    # Raw JSON or csv is no text to learn from, however the files were named.
    is_forced = named and reading.format not in (None, "text")
    source = Source(str(path), (not is_forced and known) or reading.format or "text", compression, named)
    if known:
        return source
    kind = quoted(suffix + compression, 20) or "without a suffix"
    if file.hidden:
        return HIDDEN, kind
    if reading.format is None and not named:
        return JSON if suffix == ".json" else OTHER, kind
    first = first_bytes(source) if path.is_file() else b""  # a pipe can be read only once
    if first.startswith(b"PAR1") and reading.format in (None, "parquet"):
        return Source(str(path), "parquet", compression, named)
    problem = not_text(first, reading.encoding)
    if problem and not named:
        return BINARY, kind
    if problem:
        raise InputError(f"{path}: is {problem[0]}; {problem[1]}")
    if reading.format is None and suffix in (".html", ".htm", ".xhtml"):
        raise InputError(
            f"{path}: is HTML; convert it to text first, for with --format text its tags would be trained on as text"
        )
    if reading.format is None:
        raise InputError(f"{path}: its suffix is not one of {KNOWN}; say what it holds, such as --format text")
    return source


def _left_out_lines(left_out: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a line for each reason: how many files of which kinds, the commonest first, and how to include them."""
    counts = Counter(left_out)
    lines = []
    for reason, remedy in REMEDIES.items():
        kinds = sorted((-count, kind) for (why, kind), count in counts.items() if why == reason)
        if not kinds:
            continue
        total = -sum(count for count, _ in kinds)
        listed = [f"{-count:,} {kind}" for count, kind in kinds[:MOST_KINDS]]
        if more := len(kinds) - MOST_KINDS if len(kinds) > MOST_KINDS else 0:
            listed.append(f"and {counted(more, 'more kind')}")
        lines.append(f"left out {counted(total, f'{reason}file')}: {', '.join(listed)}; {remedy}")
    return lines


def _twice_lines(twice: Sequence[str]) -> list[str]:
    if not twice:
        return []
    more = f" and {len(twice) - MOST_NAMES:,} more" if len(twice) > MOST_NAMES else ""
    names = ", ".join(twice[:MOST_NAMES]) + more
    return [f"{counted(len(twice), 'file')} named twice, taken once: {names}"]

"""Which files of a dataset's repository hold its documents: `hf:OWNER/DATASET`, split and configuration in; files out.

The repository's own card decides where it names files; otherwise their names do, by the usual convention: the split
stands in the path, between letters and digits of other words, as in data/train-00000-of-00012.parquet.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import yaml

from infctx.errors import InputError
from infctx.hub.files import HubFile, download
from infctx.hub.names import PREFIX, HubName, hub_name
from infctx.hub.repository import cached_files, first_few, is_offline, list_files
from infctx.small_texts import quoted
from infctx.suffixes import COMPRESSIONS, FORMATS_BY_SUFFIX

KINDS = tuple(FORMATS_BY_SUFFIX)
"""Suffixes of files with documents.  If a split has several kinds, the first of these is the set, others are copies."""
NO_DATA = re.compile(r"(?i)(readme|license|dataset_infos?|metadata|config|.*index)\.(md|txt|jsonl?)")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of splits, and the words for them in the names of files."""
CARD = "README.md"
DEFAULT = "default"
MOST_CARD_CHARS = 1 << 20

Splits = dict[str, list[HubFile]]


def dataset_files(text: str, split: str | None = None, config: str | None = None) -> list[HubFile]:
    """Asks the hub which files hold a split of a dataset, in the order of their names; downloads none of them.

    Offline, these are the files of it in the cache, which may be fewer.

    text: hf:OWNER/DATASET, also with @REVISION, and with :FILE or :PATTERN for these files, whatever their split
    split: None: "train", or the only one there is
    config: one of several sets in the repository; None: its default
    Raises InputError, with what there is, for a split or configuration that is not there, and for a set that is code.
    """
    name = hub_name(text)
    if name is None:
        raise InputError(f"{quoted(text)}: is no dataset on the hub; give {PREFIX}OWNER/DATASET, with both parts")
    whole = HubName(name.repository, name.revision, None)
    files = (cached_files(whole, "dataset") if is_offline() else []) or list_files(whole, "dataset")
    if name.file:
        return _named(name, files)
    data = [file for file in files if kind_of(file.path) and not NO_DATA.fullmatch(PurePosixPath(file.path).name)]
    if not data:
        raise _no_data(name, files)
    found = _splits(name, files, data, config)
    wanted = split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    if wanted not in found:
        raise InputError(f"{name}: has no split {quoted(wanted)}; choose one with --split: {', '.join(found)}")
    first = min((KINDS.index(kind_of(file.path)) for file in found[wanted]), default=0)
    return [file for file in found[wanted] if kind_of(file.path) == KINDS[first]]


def kind_of(path: str) -> str:
    """Returns the suffix that says what a file holds, such as .jsonl for x.jsonl.gz; "" for no kind of documents."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    hidden = any(part.startswith(".") for part in PurePosixPath(path).parts)
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS and not hidden else ""


def _named(name: HubName, files: list[HubFile]) -> list[HubFile]:
    """Returns the files of a name's own pattern."""
    assert name.file is not None
    found = [file for file in files if file.path == name.file] or [
        file for file in files if fnmatch(file.path, name.file)
    ]
    if not found:
        raise InputError(f"{name}: has no such file; there are", *first_few([file.path for file in files]))
    return found


def _no_data(name: HubName, files: list[HubFile]) -> InputError:
    scripts = [file.path for file in files if file.path.endswith(".py") and "/" not in file.path]
    if scripts:
        return InputError(
            f"{name}: holds no data, only the script that gets it ({scripts[0]}), and infctx runs no code of others; "
            "look for a copy of it in parquet"
        )
    return InputError(
        f"{name}: holds no documents in {', '.join(KINDS)}; there are", *first_few([file.path for file in files])
    )


def _splits(name: HubName, files: list[HubFile], data: list[HubFile], config: str | None) -> Splits:
    """Returns the files of each split, of one configuration."""
    card = next((file for file in files if file.path == CARD), None)
    configs = _configs_of_card(card) if card else {}
    if config is None:
        if len(configs) > 1 and DEFAULT not in configs:
            raise InputError(
                f"{name}: holds several sets; choose one with --config: {', '.join(first_few([*configs]))}"
            )
        return _by_patterns(configs.get(DEFAULT) or next(iter(configs.values()), []), data) or _by_names(data)
    if config in configs:
        return _by_patterns(configs[config], data)
    below = [file for file in data if config in PurePosixPath(file.path).parts[:-1]]
    if below:
        return _by_names(below)
    folders = sorted({part for file in data for part in PurePosixPath(file.path).parts[:-1]})
    known = [key for key in (*configs, *folders) if key != DEFAULT]
    remedy = f"choose one with --config: {', '.join(first_few(known))}" if known else "leave --config out"
    raise InputError(f"{name}: has no configuration {quoted(config)}; {remedy}")


def _configs_of_card(card: HubFile) -> dict[str, Any]:
    """Returns the data_files of each configuration that a repository's README names; DEFAULT is the one to take."""
    text = download(card).read_text(encoding="utf-8", errors="replace")[:MOST_CARD_CHARS]
    front = re.match(r"---\s*\n(.*?)\n---", text, re.S)
    try:
        content = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return {}
    entries = content.get("configs") if isinstance(content, dict) else None
    entries = entries if isinstance(entries, list) else []
    named = [entry for entry in entries if isinstance(entry, dict) and entry.get("data_files")]
    configs = {str(entry.get("config_name", DEFAULT)): entry["data_files"] for entry in named}
    chosen = next((entry["data_files"] for entry in named if entry.get("default") is True), None)
    return configs | ({DEFAULT: chosen} if chosen else {})


def _by_patterns(entries: Any, data: list[HubFile]) -> Splits:
    """Returns the files of each split that a card names: a pattern, a list of them, or a list of split and path."""
    splits: Splits = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, entry)
        patterns = paths if isinstance(paths, list) else [paths]
        found = [file for file in data if any(fnmatch(file.path, str(pattern)) for pattern in patterns)]
        if found:
            splits.setdefault(str(split or "train"), []).extend(found)
    return splits


def _by_names(data: list[HubFile]) -> Splits:
    """Returns the files of each split by the words in their paths; all of them as "train" if none has such a word."""
    splits: Splits = {}
    for split, words in SPLITS.items():
        word = re.compile(rf"(?i)(?<![a-z0-9])({'|'.join(words)})(?![a-z0-9])")
        found = [file for file in data if word.search(file.path)]
        if found:
            splits[split] = found
    return splits or {"train": data}

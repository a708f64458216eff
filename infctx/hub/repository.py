"""What a repository holds: the list of its files, the one model among them, names like a wrong one."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from infctx.errors import InputError
from infctx.hub.failures import NoSuchFile, Unreachable, explained
from infctx.hub.files import HubFile, cached, describe_bytes, download
from infctx.hub.names import HubName
from infctx.small_texts import counted

MOST_LISTED = 12
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weights of a model in Hugging Face's layout, the better first."""


def list_files(name: HubName, kind: str = "model") -> list[HubFile]:
    """Asks the hub for all files of a repository, sorted by path; raises InputError."""
    with explained(str(name), name.repository):
        tree = HfApi().list_repo_tree(name.repository, recursive=True, revision=name.revision, repo_type=kind)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
    return sorted(HubFile(name.repository, file.path, kind, name.revision, file.size) for file in files)


def is_offline() -> bool:
    """Returns whether the user wants no connection: HF_HUB_OFFLINE."""
    return bool(constants.HF_HUB_OFFLINE)


def cached_files(name: HubName, kind: str = "model") -> list[HubFile]:
    """Returns the files of a repository that are in the cache, sorted by path; asks nobody."""
    try:
        found = snapshot_download(name.repository, repo_type=kind, revision=name.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return []
    return sorted(
        HubFile(name.repository, path.relative_to(found).as_posix(), kind, name.revision, path.stat().st_size)
        for path in Path(found).rglob("*")
        if path.is_file()
    )


def cached_model(name: HubName) -> Path | None:
    """Returns the file, or the folder in Hugging Face's layout, if all of it is in the cache; asks nobody."""
    if name.file:
        return cached(HubFile(name.repository, name.file, revision=name.revision))
    try:
        folder = Path(snapshot_download(name.repository, revision=name.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    there = [HubFile(name.repository, path.name, revision=name.revision) for path in folder.iterdir() if path.is_file()]
    models = [model for model in models_among(there) if is_whole(model)]
    return _place(models[0], folder) if len(models) == 1 else None


def download_model(name: HubName) -> Path:
    """Returns the file, or the folder in Hugging Face's layout, in the cache, downloaded if it is not there yet.

    Raises InputError, with what there is to choose from if the repository alone does not say it.
    """
    if name.file:
        try:
            return download(HubFile(name.repository, name.file, revision=name.revision))
        except NoSuchFile as error:
            raise InputError(str(error), *_like(name, list_files(name))) from None
    found = cached_model(name)
    if found is not None and found.is_dir():
        return found
    try:
        files = list_files(name)
    except Unreachable:
        if found is not None:
            return found
        raise
    model = _only_model(name, files)
    return _place(model, [download(file) for file in model][0].parent)


def models_among(files: list[HubFile]) -> list[list[HubFile]]:
    """Returns the models in a repository, each as its files: the one in Hugging Face's layout, or every other file."""
    top = {file.path: file for file in files if "/" not in file.path}
    for weights in FOLDER_WEIGHTS:
        parts = [top[path] for path in top if path == weights or _is_part(path, weights)]
        if parts:
            return [[*(top[path] for path in ("config.json", f"{weights}.index.json") if path in top), *parts]]
    return [[file] for path, file in top.items() if path.endswith((".pth", ".safetensors"))]


def is_whole(model: list[HubFile]) -> bool:
    """Returns whether no part is missing of a model in several files."""
    parts = [found for file in model if (found := re.search(r"-\d+-of-(\d+)\.", file.path))]
    return all(int(part[1]) == len(parts) for part in parts)


def _is_part(path: str, weights: str) -> bool:
    stem, _, suffix = weights.partition(".")
    return re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", path) is not None


def _place(model: list[HubFile], folder: Path) -> Path:
    is_folder = any(file.path in FOLDER_WEIGHTS or file.path.endswith(".index.json") for file in model)
    return folder if is_folder else folder / model[0].path


def _only_model(name: HubName, files: list[HubFile]) -> list[HubFile]:
    models = models_among(files)
    if len(models) == 1:
        return models[0]
    if not models:
        raise InputError(
            f"{name}: holds no weights that infctx reads (.pth, .safetensors, or a folder in Hugging Face's layout); "
            "name another repository",
            *first_few([str(file.path) for file in files]),
        )
    choices = [f"{model[-1]}  ({describe_bytes(sum(file.num_bytes or 0 for file in model))})" for model in models]
    raise InputError(f"{name}: holds {counted(len(models), 'model')}; name one of them:", *first_few(choices))


def _like(name: HubName, files: list[HubFile]) -> list[str]:
    """Returns lines with the names most like the one that is not there."""
    paths = [file.path for file in files]
    close = difflib.get_close_matches(name.file or "", paths, n=3, cutoff=0.5) or paths
    return first_few([str(HubName(name.repository, name.revision, path)) for path in close])


def first_few(lines: list[str]) -> list[str]:
    """Cuts a list that would be too long to read, and says so."""
    more = len(lines) - MOST_LISTED
    return [*lines[:MOST_LISTED], *([f"and {more:,} more"] if more > 0 else [])]

"""A checkpoint on disk: the files in its folder, whether they are complete, and which of a run's checkpoints is newest.

A checkpoint is a folder `step-000123`, written under a temporary name and renamed once it is complete:

    model.safetensors      weights under their official names; a run that freezes them, and leaves them in the file that
                           model.weights names, has instead one or both of
    state.safetensors      only the initial state
    adapter.safetensors    only an adapter, and the weights that learn with it (formats/adapter_file)
    optimizer.safetensors  moments and step counts of the optimizer, as <parameter>/<name>
    carry.safetensors      the carried state of all lanes, the units of a tuned state, the random generators
    progress.json          step, position in the documents, tokens seen
    config.yaml            every setting of the run
    manifest.json          size and SHA-256 of each file above

Many ranks write their tensors in shares, NAME-00001-of-00004.safetensors and so on, the weights with Hugging Face's
index.  It is the same checkpoint: a run on any number of ranks, with any strategy, resumes from it.

A relative link `best` next to a run's checkpoints leads to the one with the lowest held-out loss, so it is a checkpoint
for every program, also where it is copied without its target: scp, archives and hubs copy what it leads to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, RootModel

from infctx.errors import InputError
from infctx.small_texts import read_json_as, read_yaml

CHECKPOINT_WEIGHTS = "model.safetensors"
"""The file of a checkpoint that holds the model."""
INDEX = f"{CHECKPOINT_WEIGHTS}.index.json"
"""Hugging Face's index of weights in several files: {"weight_map": {tensor: file}}."""
STATE_FILE = "state.safetensors"
"""The file of a state, in form infctx, in the folder of a run or a checkpoint."""
ADAPTER_FILE = "adapter.safetensors"
"""The file of an adapter, in the folder of a run or a checkpoint."""
STEP_NAME = r"step-\d{6,}"
"""The names of checkpoints."""
MANIFEST, PROGRESS, SETTINGS = "manifest.json", "progress.json", "config.yaml"
BEST = "best"
"""The link next to a run's checkpoints that leads to the best of them."""
LOCK = ".lock"
"""A file in every run's folder: the run that holds its lock trains there."""
TUNED_OVER = "weights"
"""Key in a tuned state's metadata: the fingerprint of the weights that it was tuned over."""

Size = Annotated[int, Field(ge=0, lt=1 << 63)]

log = logging.getLogger(__name__)


class Manifest(RootModel):
    """manifest.json: file name -> size and SHA-256."""

    root: dict[
        Annotated[str, Field(pattern=r"^[0-9A-Za-z_][0-9A-Za-z_.-]*$", max_length=255)],
        tuple[Size, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]],
    ]


class WeightIndex(BaseModel):
    """model.safetensors.index.json, ours and Hugging Face's; its other keys are ignored."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^\p{C}]+$", max_length=255)]]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint after a step, for a run whose checkpoints are in `folder`."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Returns all checkpoints of a run, oldest first, complete or not."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(STEP_NAME, path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(folder: Path, hashes: bool = True) -> Path | None:
    """Returns the newest complete checkpoint, None if there are no checkpoints at all.

    hashes: reads every file to check its hash; otherwise only sizes are checked
    A torn checkpoint is skipped with one line in the log.  If every one is torn, this raises InputError, so that no run
    starts over on top of another's remains.
    """
    torn: list[str] = []
    for path in reversed(checkpoints(folder)):
        problem = find_damage(path, hashes)
        if problem is None:
            for damaged in torn if hashes else ():  # once per start
                log.warning("checkpoint %s; using the one before", damaged)
            return path
        torn.append(f"{path} is torn ({problem})")
    if torn:
        raise InputError(f"no whole checkpoint is left: {', '.join(torn)}; remove them to start anew")
    return None


def find_damage(path: Path, hashes: bool = True) -> str | None:
    """Describes the damage to a checkpoint folder in a few words; returns None if every file is as it was written."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        entries = read_manifest(path)
    except ValueError:
        return f"{MANIFEST} is not readable"
    for name, (size, digest) in entries.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
        if hashes and size_and_hash(file)[1] != digest:
            return f"{name} has other content than was written"
    return _find_gap(path, entries.keys())


def _find_gap(path: Path, names: Collection[str]) -> str | None:
    """Describes the first thing missing from a manifest of these names, None if nothing is."""
    if not {CHECKPOINT_WEIGHTS, INDEX, STATE_FILE, ADAPTER_FILE} & set(names):
        return f"{MANIFEST} lists no model, no state and no adapter"
    for stem in ("optimizer", "carry"):
        if not _shares(stem, names):
            return f"{MANIFEST} lists no file of the {stem}"
    for name in (PROGRESS, SETTINGS):
        if name not in names:
            return f"{MANIFEST} does not list {name}"
    carries = _shares("carry", names)
    counts = {int(name[-17:-12]) for name in carries if "-of-" in name}  # carry-00001-of-00004.safetensors
    if counts not in (set(), {len(carries)}):
        return f"{MANIFEST} lists {len(carries)} of {max(counts)} files of the carry"
    if INDEX in names:
        try:
            wanted = set(read_json_as(WeightIndex, path / INDEX).weight_map.values())
        except ValueError:
            return f"{INDEX} is not readable"
        if not wanted <= set(names):
            return f"{MANIFEST} does not list all files of {INDEX}"
    return None


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Returns file name -> size and SHA-256 of a checkpoint's files; raises ValueError if it is not a manifest."""
    return read_json_as(Manifest, path / MANIFEST).root


def listed_files(path: Path) -> set[str] | None:
    """Returns the names of a checkpoint's files; None if the folder is not a checkpoint."""
    try:
        return set(read_manifest(path)) if (path / MANIFEST).is_file() else None
    except ValueError as error:
        raise InputError(f"{path / MANIFEST}: is not readable ({error}); copy the checkpoint again") from None


def tensor_files(path: Path, stem: str) -> list[Path]:
    """Returns the files of a checkpoint's "optimizer" or "carry", in the order of the ranks that wrote them."""
    return [path / name for name in _shares(stem, listed_files(path) or ())]


def _shares(stem: str, names: Collection[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors", name))


def write_manifest(folder: Path, entries: dict[str, tuple[int, str]]) -> None:
    """Writes the manifest; entries: file name -> its `size_and_hash`."""
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def size_and_hash(file: Path) -> tuple[int, str]:
    """Returns size in bytes and SHA-256; reads the whole file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return file.stat().st_size, digest.hexdigest()


def holds_weights(folder: Path) -> bool:
    """Returns whether a checkpoint has the weights themselves, in one file or several."""
    listed = listed_files(folder)
    names = [name for name in (CHECKPOINT_WEIGHTS, INDEX) if listed is None or name in listed]
    return any((folder / name).is_file() for name in names)


def saved_settings(path: Path) -> dict[str, Any]:
    """Returns the settings that a checkpoint was saved with, as section -> setting -> value."""
    content, _ = read_yaml((path / SETTINGS).read_text(encoding="utf-8", errors="replace"), str(path / SETTINGS))
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise InputError(f"{path / SETTINGS}: holds no settings of a run; copy the checkpoint again")
    return content


def remove_leftovers(folder: Path) -> None:
    """Removes a killed run's half-written and half-removed checkpoints; only the folder's run may call it."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)
    for path in folder.glob(f".{BEST}.*"):
        path.unlink()

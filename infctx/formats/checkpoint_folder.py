"""A checkpoint on disk: what its folder holds, whether that is whole, and which of a run's checkpoints is the newest.

A checkpoint is a folder `step-000123`, written under a temporary name and renamed when it is whole:

    model.safetensors      weights under their official names; of a run that tunes a state, in its place:
    state.safetensors      the initial state alone (the weights stay in the file that model.weights names)
    optimizer.safetensors  moments and step counts of the optimizer, as <parameter>/<name>
    carry.safetensors      the carried state of all lanes, the units of a tuned state, the random generators
    progress.json          step, position in the documents, tokens seen
    config.yaml            every setting of the run
    manifest.json          size and SHA-256 of each file above

Many ranks write their tensors in shares, NAME-00001-of-00004.safetensors and so on, the weights with Hugging Face's
index.  It is the same checkpoint: a run on any number of ranks, with any strategy, goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from infctx.errors import InputError

CHECKPOINT_WEIGHTS = "model.safetensors"
"""The file of a checkpoint that holds the model."""
INDEX = f"{CHECKPOINT_WEIGHTS}.index.json"
"""Hugging Face's index of weights in several files: {"weight_map": {tensor: file}}."""
STATE_FILE = "state.safetensors"
"""The name of a state of form infctx in the folder of a run or a checkpoint."""
MANIFEST, PROGRESS, SETTINGS = "manifest.json", "progress.json", "config.yaml"
TUNED_OVER = "weights"
"""Key of the metadata of a tuned state: fingerprint of the weights that it was tuned over."""

log = logging.getLogger(__name__)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint behind a step lies, of a run whose checkpoints are in `folder`."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first, whole or not."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(folder: Path, hashes: bool = True) -> Path | None:
    """The newest whole checkpoint, None if there is none at all.

    hashes: reads every file of it for its hash; else only their sizes tell whether it is whole.
    A torn one is passed over with one line in the log; if every one is torn, InputError says so, so that no run
    starts anew over the remains of another.
    """
    torn: list[str] = []
    for path in reversed(checkpoints(folder)):
        problem = find_damage(path, hashes)
        if problem is None:
            for damaged in torn:
                log.warning("checkpoint %s; using the one before", damaged)
            return path
        torn.append(f"{path} is torn ({problem})")
    if torn:
        raise InputError(f"no whole checkpoint is left: {', '.join(torn)}; remove them to start anew")
    return None


def find_damage(path: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None if every file is as it was written."""
    try:
        entries = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in entries.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
            if hashes and size_and_hash(file)[1] != digest:
                return f"{name} has other content than was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None if entries.keys() & {CHECKPOINT_WEIGHTS, INDEX, STATE_FILE} else f"{MANIFEST} is empty"


def write_manifest(folder: Path, entries: dict[str, tuple[int, str]]) -> None:
    """entries: what `size_and_hash` says of each file."""
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def size_and_hash(file: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256; reads all of the file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return file.stat().st_size, digest.hexdigest()


def holds_weights(folder: Path) -> bool:
    """Whether a checkpoint has the weights themselves, in one file or in many."""
    return (folder / CHECKPOINT_WEIGHTS).is_file() or (folder / INDEX).is_file()


def saved_settings(path: Path) -> dict[str, Any]:
    """The settings that a checkpoint was saved with, as section -> setting -> value."""
    return yaml.safe_load((path / SETTINGS).read_text(encoding="utf-8"))


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run left half written or half removed; for the run that owns the folder."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)

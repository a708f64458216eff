"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-000123`, written under a temporary name and renamed when it is whole:

    model.safetensors      weights under their official names; of a run that tunes a state, in its place:
    state.safetensors      the initial state alone (the weights stay in the file that model.weights names)
    optimizer.safetensors  moments and step counts of the optimizer, as <parameter>/<name>
    carry.safetensors      the carried state of all lanes, the units of a tuned state, the random generators
    progress.json          step, position in the documents, tokens seen
    config.yaml            every setting of the run
    manifest.json          size and SHA-256 of each file above

Of many ranks each writes its share of the tensors (train/shares), the weights with Hugging Face's index.  It is the
same checkpoint: a run on any number of ranks, with any strategy, goes on from it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import yaml
from torch import Tensor

from infctx.config import Config, dump_config
from infctx.distributed.ranks import Ranks
from infctx.errors import InputError
from infctx.files import atomic_folder, temporary_name
from infctx.formats.state_file import STATE_FILE, save_state
from infctx.formats.weights import CHECKPOINT_WEIGHTS
from infctx.model.state import State
from infctx.train.shares import INDEX, Holder, read_carry, read_moments, write_carry, write_moments, write_weights

TUNED_OVER = "weights"
"""Key of the metadata of a tuned state: fingerprint of the weights that it was tuned over."""
MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """What a run knows besides its tensors: steps done, position of the lanes (None before the first), tokens seen."""

    step: int
    position: dict[str, Any] | None
    num_tokens: int


def save_checkpoint(folder: Path, engine: Holder, carry: State, progress: Progress, config: Config) -> Path:
    """Writes `folder/step-N`, whole or not at all, then removes the oldest beyond `run.keep_checkpoints`.

    Every rank must call it, with a folder that all of them see; an error of one is raised on all.
    """
    ranks = engine.ranks
    path = folder / f"step-{progress.step:06d}"
    with atomic_folder(path) if ranks.is_first else nullcontext() as temporary:
        temporary = ranks.from_first(lambda: temporary)
        learned = engine.learned_state() if config.model.freezes_weights else None
        entries = ranks.together(lambda: _write_share(temporary, engine, learned, carry, progress, config))
        if ranks.is_first:
            manifest = {name: entry for share in entries for name, entry in share.items()}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if ranks.is_first:
        for old in checkpoints(folder)[: -config.run.keep_checkpoints]:
            hidden = temporary_name(old, "old")
            os.replace(old, hidden)
            shutil.rmtree(hidden)
    ranks.from_first(lambda: None)
    return path


def _write_share(
    folder: Path, engine: Holder, learned: State | None, carry: State, progress: Progress, config: Config
) -> dict[str, tuple[int, str]]:
    """Writes this rank's files; returns their fingerprints."""
    ranks, others = engine.ranks, _generators(carry.wkv.device) | _units(engine.model.initial_units)
    files = write_weights(folder, engine) if learned is None else []
    files += write_moments(folder, engine) + write_carry(folder, carry, others, ranks)
    if ranks.is_first:
        if learned is not None:
            metadata = {TUNED_OVER: engine.model.weights_fingerprint}
            save_state(learned, folder / STATE_FILE, "infctx", metadata=metadata)
            files.append(folder / STATE_FILE)
        texts = {"progress.json": json.dumps(progress._asdict()), "config.yaml": dump_config(_found_anywhere(config))}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            files.append(folder / name)
    return {file.name: _fingerprint(file) for file in sorted(files)}


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first, whole or not."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, None if there is none at all.

    A torn one is passed over with one line in the log; if every one is torn, InputError says so, so that no run
    starts anew over the remains of another.
    """
    torn = []
    for path in reversed(checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            for damaged in torn:
                log.warning("checkpoint %s; using the one before", damaged)
            return path
        torn.append(f"{path} is torn ({problem})")
    if torn:
        raise InputError(f"no whole checkpoint is left: {', '.join(torn)}; remove them to start anew")
    return None


def changed_settings(path: Path, config: Config) -> list[str]:
    """The settings that differ from those a checkpoint was saved with, as `section.setting old -> new`."""
    before, now = saved_settings(path), _found_anywhere(config).model_dump(mode="json")
    return [
        f"{section}.{name} {before.get(section, {}).get(name)} -> {value}"
        for section, settings in now.items()
        for name, value in settings.items()
        if before.get(section, {}).get(name) != value
    ]


def _found_anywhere(config: Config) -> Config:
    """With the whole path of the weights that a state is tuned over: a tuned run is a model wherever one stands."""
    if not config.model.freezes_weights:
        return config
    model = config.model.model_copy(update={"weights": config.model.weights.absolute()})
    return config.model_copy(update={"model": model})


def saved_settings(path: Path) -> dict[str, Any]:
    """The settings that a checkpoint was saved with, as section -> setting -> value."""
    return yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))


def lock_folder(folder: Path) -> IO[str]:
    """Makes this process the one that trains in a folder, until the returned file is closed; else InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another run is training there; wait for it or choose another run.folder") from None
    return lock


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run left half written or half removed; for the run that owns the folder."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None if every file is as it was written."""
    try:
        entries = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in entries.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
            if _fingerprint(file)[1] != digest:
                return f"{name} has other content than was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None if entries.keys() & {CHECKPOINT_WEIGHTS, INDEX, STATE_FILE} else f"{MANIFEST} is empty"


def load_progress(path: Path, engine: Holder) -> tuple[State, Progress]:
    """Fills the optimizer and the random generators from a checkpoint; returns the carried state of this rank's lanes,
    on the CPU, and the progress."""
    read_moments(path, engine)
    state, others = read_carry(path, engine.ranks)
    torch.set_rng_state(others["random_cpu"])
    if "random_cuda" in others and torch.cuda.is_available():
        torch.cuda.set_rng_state(others["random_cuda"])
    return state, Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))


def load_units(path: Path) -> State | None:
    """What the tuned state of a checkpoint counts in."""
    _, others = read_carry(path, Ranks())
    return State(*(others[f"unit_{name}"] for name in State._fields)) if "unit_wkv" in others else None


def _units(units: State | None) -> dict[str, Tensor]:
    return {} if units is None else {f"unit_{name}": unit.cpu().contiguous() for name, unit in units._asdict().items()}


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The random generators of the CPU and of a GPU."""
    states = {"random_cpu": torch.get_rng_state()}
    return states | ({"random_cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _fingerprint(file: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return file.stat().st_size, digest.hexdigest()

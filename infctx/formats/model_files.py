"""Finds and opens a model: a weights file, a checkpoint or the folder of a run in; its files, or the model, out.

A model with an adapter is opened as one, merged.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from infctx.adapters.stored import CONFIG_FILE
from infctx.errors import InputError
from infctx.formats.adapter_file import is_adapter_file, merged_weights, read_adapter
from infctx.formats.checkpoint_folder import (
    ADAPTER_FILE,
    MANIFEST,
    STATE_FILE,
    TUNED_OVER,
    holds_weights,
    newest_checkpoint,
    saved_settings,
)
from infctx.formats.state_file import is_state_file, load_state
from infctx.formats.tensor_file import read_metadata
from infctx.formats.weights import StoredWeights, has_fingerprint, open_weights, read_model
from infctx.hub.models import fetch_model
from infctx.hub.names import hub_name
from infctx.hub.published import refuse_stopped_download
from infctx.model.quantized import FrozenDtype
from infctx.model.rwkv import RWKV, Compute
from infctx.small_texts import quoted

RUN_WEIGHTS = "model.pth"
"""The weights that a finished run leaves in its folder."""

log = logging.getLogger(__name__)


MOST_PATH = 4096
"""Bytes of the longest path on Linux."""


class ModelFiles(NamedTuple):
    """Weights for `infctx.load_model`, the state tuned over them, if any, and adapters, each trained over the weights
    and those before it."""

    weights: Path
    state: Path | None
    adapters: tuple[Path, ...] = ()


def load_model(
    path: str | Path,
    dtype: torch.dtype | FrozenDtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> RWKV:
    """Reads a model of RWKV-5.2, 6 or 7; version and every size come from the file.

    path: a `.pth` (a dict of tensors; no code in it is run) or a `.safetensors`, with the official names, those of
    Hugging Face's rwkv-5-world and rwkv-6-world, or those of fla; or a folder: a run, a checkpoint, or a model in
    Hugging Face's layout, in one file or several; or a name on the hub, OWNER/REPO:FILE, which is downloaded once
    `blocks.N.att.time_state` tensors, or the tuned state of a run, become the model's initial state.
    dtype: of the weights; or "int8" or "nf4": matrices quantized, the rest in bf16, and no weight learns

    Raises InputError naming the file and the tensor for anything else.
    """
    return open_model(Path(path), None, dtype, device, Compute(backend=backend))


def open_model(
    path: Path | ModelFiles,
    state: Path | None = None,
    dtype: torch.dtype | FrozenDtype = torch.float32,
    device: torch.device | str = "cpu",
    compute: Compute = Compute(),  # noqa: B008  (frozen)
    same_weights: bool = False,
) -> RWKV:
    """Opens the model at `path`; documents start from `state` if it is given, otherwise from the model's own state.

    dtype: of the weights; or how matrices that do not learn are kept: then the embedding and the head are in bf16, and
           the rest in compute.dtype
    same_weights: raises InputError if the state was tuned over other weights, instead of a warning in the log
    """
    files = path if isinstance(path, ModelFiles) else find_model(path)
    stored = open_base(files)
    model = read_model(stored, dtype, device, compute)
    state = fetch_model(state) if state else files.state
    if state is not None:
        model.set_initial_state(load_state(state, model))
        if is_of_others(state, files, stored if isinstance(dtype, str) else model):
            problem = f"{state}: was tuned over other weights than {files.weights} holds"
            if same_weights:
                raise InputError(f"{problem}; name those weights, or choose another run.folder")
            log.warning("%s", problem)
    return model


def open_base(files: ModelFiles) -> StoredWeights:
    """Opens weights, merged with their adapters; warns of an adapter that was trained over others."""
    stored = open_weights(files.weights)
    for path in files.adapters:
        learned = read_adapter(path, stored.sizes)
        if learned.tuned_over is not None and not has_fingerprint(stored, learned.tuned_over):
            log.warning("%s: was trained over other weights than %s holds", path, files.weights)
        stored = merged_weights(stored, learned)
    return stored


def is_of_others(state: Path, files: ModelFiles, model: RWKV | StoredWeights) -> bool:
    """Returns whether a state was tuned over others than these: over the whole model, or with its last adapter."""
    if not tuned_over_others(state, model):
        return False
    return not files.adapters or tuned_over_others(state, open_base(files._replace(adapters=files.adapters[:-1])))


def tuned_over_others(state: Path, weights: RWKV | StoredWeights) -> bool:
    """Returns whether a state, by the metadata of its file, checkpoint or run, was tuned over other weights."""
    tuned_over = read_metadata(state / STATE_FILE if state.is_dir() else state).get(TUNED_OVER)
    return tuned_over is not None and not has_fingerprint(weights, tuned_over)


def find_model(path: Path, hashes: bool = True, seen: tuple[Path, ...] = ()) -> ModelFiles:
    """Returns the files of a model; for a run, its newest complete checkpoint, or model.pth if it has none.

    hashes: reads all of that checkpoint to check that it is complete, see `newest_checkpoint`
    seen: checkpoints of states or adapters that led here, each tuned over the weights of the next
    What is on the hub is downloaded, unless it is in the cache.  Raises InputError if there is no model.
    """
    path = fetch_model(path)
    if not path.is_dir():
        refuse_stopped_download(path)
        if path.is_file() and is_state_file(path):
            raise InputError(
                f"{path}: is a state, not a model; name the model, and give this file with --state or "
                "model.initial_state"
            )
        if path.is_file() and is_adapter_file(path):
            raise InputError(f"{path}: is an adapter, not a model; name the model, and give this file with --adapter")
        return ModelFiles(path, None)
    if holds_weights(path):
        return ModelFiles(path, None)
    here = [name for name in (ADAPTER_FILE, STATE_FILE) if (path / name).is_file()]
    if here and (path / MANIFEST).is_file():  # a run's folder has only the files that were learned
        what, option = ("an adapter", "--adapter") if here[0] == ADAPTER_FILE else ("a state", "--state")
        named = saved_settings(path).get("model", {}).get("weights")
        if not isinstance(named, str) or not named:
            raise InputError(f"{path}: holds {what}, and its settings do not say over which weights; copy it again")
        weights = Path(named)
        if len(named) > MOST_PATH or not (weights.exists() or hub_name(weights)):
            raise InputError(
                f"{path}: holds {what} tuned over {quoted(named, 200)}, and that is not there; run this where it is, "
                f"or name the model and give {path / here[0]} with {option}"
            )
        if path.resolve() in seen:
            raise InputError(f"{path}: holds {what} that is tuned over itself, by its settings; copy it again")
        return _with_learned(find_model(weights, hashes, (*seen, path.resolve())), path)
    newest = newest_checkpoint(path / "checkpoints", hashes) or newest_checkpoint(path, hashes)
    if newest is not None:
        return find_model(newest, hashes, seen)
    if (path / RUN_WEIGHTS).is_file():  # the checkpoints of this run were removed
        return ModelFiles(path / RUN_WEIGHTS, None)
    if any(path.glob("*.index.json")) or (path / "pytorch_model.bin").is_file():
        return ModelFiles(path, None)
    raise InputError(f"{path}: holds no checkpoint; give a .pth, a .safetensors, a checkpoint or a run's folder")


def with_adapter(files: ModelFiles, path: Path) -> ModelFiles:
    """Returns the files of a model with an adapter more: a file, a folder of RWKV-PEFT's, a checkpoint, or a run.

    The state that a run learned with the adapter comes along.  Raises InputError if there is no adapter.
    """
    path = fetch_model(path)
    if not path.is_dir() or (path / CONFIG_FILE).is_file():
        return files._replace(adapters=(*files.adapters, path))
    found = find_adapter(path)
    if found is None:
        raise InputError(f"{path}: holds no adapter; name a file (.safetensors), or a run with model.learn: adapter")
    return _with_learned(files, found.parent)


def find_adapter(path: Path) -> Path | None:
    """Returns the adapter of a run or a checkpoint; None if it has none."""
    if path.is_dir() and not (path / MANIFEST).is_file():
        path = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path) or path
    return path / ADAPTER_FILE if (path / ADAPTER_FILE).is_file() else None


def _with_learned(files: ModelFiles, folder: Path) -> ModelFiles:
    """Returns the files of a model with what a folder has of an adapter and a state."""
    adapter, state = folder / ADAPTER_FILE, folder / STATE_FILE
    adapters = (*files.adapters, adapter) if adapter.is_file() else files.adapters
    return ModelFiles(files.weights, state if state.is_file() else files.state, adapters)


def find_state(path: Path) -> Path | None:
    """Returns the state file at `path`, or that of a tuned run or checkpoint; its weights need not exist."""
    if path.is_file():
        return path if is_state_file(path) else None
    if not path.is_dir() or holds_weights(path):
        return None
    if (path / MANIFEST).is_file():
        return path / STATE_FILE if (path / STATE_FILE).is_file() else None
    newest = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
    return None if newest is None else find_state(newest)

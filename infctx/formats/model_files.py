"""Finds and opens a model: a weights file, a checkpoint or the folder of a run in; its files, or the model, out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from infctx.errors import InputError
from infctx.formats.checkpoint_folder import (
    MANIFEST,
    STATE_FILE,
    TUNED_OVER,
    holds_weights,
    newest_checkpoint,
    saved_settings,
)
from infctx.formats.hub_models import fetch_model
from infctx.formats.state_file import is_state_file, load_state
from infctx.formats.tensor_file import read_metadata
from infctx.formats.weights import StoredWeights, has_fingerprint, open_weights, read_model
from infctx.hub.names import hub_name
from infctx.hub.published import refuse_stopped_download
from infctx.model.rwkv import RWKV, Compute
from infctx.small_texts import quoted

RUN_WEIGHTS = "model.pth"
"""The weights that a finished run leaves in its folder."""

log = logging.getLogger(__name__)


MOST_PATH = 4096
"""Bytes of the longest path on Linux."""


class ModelFiles(NamedTuple):
    """Weights for `infctx.load_model`, and the state tuned over them, if any."""

    weights: Path
    state: Path | None


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", backend: str = "auto"
) -> RWKV:
    """Reads a model of RWKV-5.2, 6 or 7; version and every size come from the file.

    path: a `.pth` (a dict of tensors; no code in it is run) or a `.safetensors`, with the official names, those of
    Hugging Face's rwkv-5-world and rwkv-6-world, or those of fla; or a folder: a run, a checkpoint, or a model in
    Hugging Face's layout, in one file or several; or a name on the hub, OWNER/REPO:FILE, which is downloaded once
    `blocks.N.att.time_state` tensors, or the tuned state of a run, become the model's initial state.

    Raises InputError naming the file and the tensor for anything else.
    """
    return open_model(Path(path), None, dtype, device, Compute(backend=backend))


def open_model(
    path: Path | ModelFiles,
    state: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    compute: Compute = Compute(),  # noqa: B008  (frozen)
    same_weights: bool = False,
) -> RWKV:
    """Opens the model at `path`; documents start from `state` if it is given, otherwise from the model's own state.

    same_weights: raises InputError if the state was tuned over other weights, instead of a warning in the log
    """
    files = path if isinstance(path, ModelFiles) else find_model(path)
    model = read_model(open_weights(files.weights), dtype, device, compute)
    state = fetch_model(state) if state else files.state
    if state is not None:
        model.set_initial_state(load_state(state, model))
        if tuned_over_others(state, model):
            problem = f"{state}: was tuned over other weights than {files.weights} holds"
            if same_weights:
                raise InputError(f"{problem}; name those weights, or choose another run.folder")
            log.warning("%s", problem)
    return model


def tuned_over_others(state: Path, weights: RWKV | StoredWeights) -> bool:
    """Returns whether a state, by the metadata of its file, checkpoint or run, was tuned over other weights."""
    tuned_over = read_metadata(state / STATE_FILE if state.is_dir() else state).get(TUNED_OVER)
    return tuned_over is not None and not has_fingerprint(weights, tuned_over)


def find_model(path: Path, hashes: bool = True, seen: tuple[Path, ...] = ()) -> ModelFiles:
    """Returns the files of a model; for a run, its newest complete checkpoint, or model.pth if it has none.

    hashes: reads all of that checkpoint to check that it is complete, see `newest_checkpoint`
    seen: state checkpoints that led here, each tuned over the weights of the next
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
        return ModelFiles(path, None)
    if holds_weights(path):
        return ModelFiles(path, None)
    if (path / STATE_FILE).is_file() and (path / MANIFEST).is_file():  # a run's folder has only the first
        named = saved_settings(path).get("model", {}).get("weights")
        if not isinstance(named, str) or not named:
            raise InputError(f"{path}: holds a state, and its settings do not say over which weights; copy it again")
        weights = Path(named)
        if len(named) > MOST_PATH or not (weights.exists() or hub_name(weights)):
            raise InputError(
                f"{path}: holds a state tuned over {quoted(named, 200)}, and that is not there; run this where it is, "
                f"or name the model and give {path / STATE_FILE} with --state"
            )
        if path.resolve() in seen:
            raise InputError(f"{path}: holds a state that is tuned over itself, by its settings; copy it again")
        return ModelFiles(find_model(weights, hashes, (*seen, path.resolve())).weights, path / STATE_FILE)
    newest = newest_checkpoint(path / "checkpoints", hashes) or newest_checkpoint(path, hashes)
    if newest is not None:
        return find_model(newest, hashes, seen)
    if (path / RUN_WEIGHTS).is_file():  # the checkpoints of this run were removed
        return ModelFiles(path / RUN_WEIGHTS, None)
    if any(path.glob("*.index.json")) or (path / "pytorch_model.bin").is_file():
        return ModelFiles(path, None)
    raise InputError(f"{path}: holds no checkpoint; give a .pth, a .safetensors, a checkpoint or a run's folder")


def find_state(path: Path) -> Path | None:
    """Returns the state file at `path`, or that of a tuned run or checkpoint; its weights need not exist."""
    if path.is_file():
        return path if is_state_file(path) else None
    if not path.is_dir() or holds_weights(path):
        return None
    if (path / MANIFEST).is_file():
        return path / STATE_FILE
    newest = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
    return None if newest is None else find_state(newest)

"""Checkpoints: everything a run needs to resume as if it had never stopped.

`infctx.formats.checkpoint_folder` describes the files in a checkpoint.  Here every rank writes its share of them, and
reads them again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from infctx.adapters.stored import Header
from infctx.distributed.engine import Engine
from infctx.distributed.ranks import Ranks
from infctx.errors import InputError
from infctx.evaluate.record import Evaluation
from infctx.files import atomic_folder, temporary_name
from infctx.formats.adapter_file import write_adapter
from infctx.formats.checkpoint_folder import (
    ADAPTER_FILE,
    BEST,
    LOCK,
    PROGRESS,
    SETTINGS,
    STATE_FILE,
    TUNED_OVER,
    Size,
    checkpoint_path,
    checkpoints,
    saved_settings,
    size_and_hash,
    write_manifest,
)
from infctx.formats.state_file import save_state
from infctx.hub.names import hub_name
from infctx.model.state import State
from infctx.ops.precision import state_dtype
from infctx.settings.config import Config
from infctx.settings.load import dump_config
from infctx.small_texts import quoted, read_json_as
from infctx.train.run import Progress, Run
from infctx.train.shares import (
    ANOTHER_CHECKPOINT,
    learned_weights,
    read_carry,
    read_moments,
    write_carry,
    write_moments,
    write_weights,
)

log = logging.getLogger(__name__)


def save_checkpoint(run: Run) -> Path:
    """Saves the run as `step-N`, completely or not at all, then keeps the newest run.keep_checkpoints and the best.

    Every rank must call it, with a folder that all of them see; an error on one is raised on all.
    """
    engine, ranks, settings = run.engine, run.engine.ranks, run.plan.config.run
    engine.mark("checkpoint")
    path = checkpoint_path(settings.checkpoints, run.progress.step)
    with atomic_folder(path) if ranks.is_first else nullcontext() as own:
        temporary = ranks.from_first(lambda: own)
        assert temporary is not None  # rank 0 made it
        state = engine.learned_state() if run.plan.config.model.learns_state else None
        adapter = learned_weights(engine) if run.plan.config.model.learned_adapter else None
        entries = ranks.together(lambda: _write_share(temporary, run, state, adapter))
        if ranks.is_first:
            write_manifest(temporary, {name: entry for share in entries for name, entry in share.items()})
    if ranks.is_first:
        best = _link_best(settings.checkpoints, run.best, run.best is run.measured)
        for old in checkpoints(settings.checkpoints)[: -settings.keep_checkpoints]:
            if old != best:
                hidden = temporary_name(old, "old")
                os.replace(old, hidden)
                shutil.rmtree(hidden)
    ranks.from_first(lambda: None)
    return path


def _link_best(folder: Path, best: Evaluation | None, is_new: bool) -> Path | None:
    """Makes the link `best` lead to the checkpoint of an evaluation; returns that checkpoint.

    Without an evaluation, as after a run that measured nothing, it returns the one to which the link leads.
    is_new: whether to warn if there can be no link
    """
    link = folder / BEST
    now = link.with_name(os.readlink(link)) if link.is_symlink() else None
    path = checkpoint_path(folder, best.step or 0) if best else now
    if path and path != now:
        temporary = temporary_name(link, "tmp")
        try:
            temporary.symlink_to(path.name, target_is_directory=True)
            os.replace(temporary, link)
        except OSError as error:  # a file system without links, or a copy of a checkpoint in its place
            temporary.unlink(missing_ok=True)
            if is_new:
                log.warning("%s: cannot become a link to %s, the best (%s)", link, path.name, error.strerror)
    return path


def _write_share(
    folder: Path, run: Run, state: State | None, adapter: dict[str, Tensor] | None
) -> dict[str, tuple[int, str]]:
    """Writes this rank's files; returns their sizes and hashes."""
    engine, ranks = run.engine, run.engine.ranks
    others = _generators(run.carry.wkv.device) | _units(engine.model.initial_units)
    files = [] if run.plan.config.model.freezes_weights else write_weights(folder, engine)
    files += write_moments(folder, engine) + write_carry(folder, run.carry, others, ranks)
    if ranks.is_first:
        if state is not None:
            assert run.tuned_over is not None
            save_state(state, folder / STATE_FILE, "infctx", metadata={TUNED_OVER: run.tuned_over})
            files.append(folder / STATE_FILE)
        if adapter is not None:
            files.append(save_adapter(folder, run, adapter))
        texts = {PROGRESS: json.dumps(run.progress._asdict()), SETTINGS: dump_config(_found_anywhere(run.plan.config))}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            files.append(folder / name)
    return {file.name: size_and_hash(file) for file in sorted(files)}


def save_adapter(folder: Path, run: Run, learned: dict[str, Tensor]) -> Path:
    """Writes an adapter, and the weights that learned with it, into a folder; returns the file."""
    settings = run.plan.config.model.learned_adapter
    assert settings is not None and run.tuned_over is not None
    write_adapter(learned, folder / ADAPTER_FILE, Header.of(settings, run.tuned_over), run.model.sizes)
    return folder / ADAPTER_FILE


def changed_settings(path: Path, config: Config) -> list[str]:
    """Returns the settings that have changed since a checkpoint was saved, as `section.setting old -> new`."""
    before, now, changed = saved_settings(path), _found_anywhere(config).model_dump(mode="json"), []
    for section, settings in now.items():
        fields = type(getattr(config, section)).model_fields
        for name, value in settings.items():
            old = before.get(section, {}).get(name, fields[name].default)  # an older infctx did not know all of them
            if old != value:
                changed.append(f"{section}.{name} {quoted(str(old))} -> {value}")
    return changed


def _found_anywhere(config: Config) -> Config:
    """Makes the path of frozen weights absolute, so that a tuned run can be used as a model from any folder."""
    if not config.model.freezes_weights or config.model.weights is None or hub_name(config.model.weights):
        return config
    model = config.model.model_copy(update={"weights": config.model.weights.absolute()})
    return config.model_copy(update={"model": model})


def lock_folder(folder: Path) -> IO[str]:
    """Locks a folder for training until the returned file is closed; InputError if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another run is training there; wait for it or choose another run.folder") from None
    return lock


def load_progress(path: Path, engine: Engine) -> tuple[State, Progress]:
    """Restores the optimizer and the random generators from a checkpoint.

    Returns the carried state of this rank's lanes, on the CPU, and the progress.  Raises InputError for content that no
    run would write.
    """
    read_moments(path, engine)
    state, others = read_carry(path, engine.ranks)
    dtype = state_dtype(engine.model.embedding.weight.dtype)
    wanted = State.zeros(engine.model.sizes, state.batch_size, dtype, "meta")
    if [(part.shape, part.dtype) for part in state] != [(part.shape, part.dtype) for part in wanted]:
        raise InputError(f"{path}: its carry belongs to a model of other sizes or another dtype; {ANOTHER_CHECKPOINT}")
    try:
        torch.set_rng_state(others["random_cpu"])
        if "random_cuda" in others and torch.cuda.is_available():
            torch.cuda.set_rng_state(others["random_cuda"])
    except (KeyError, TypeError, RuntimeError):
        raise InputError(f"{path}: has no state of the random generators; {ANOTHER_CHECKPOINT}") from None
    progress = _read_progress(path / PROGRESS)
    lanes = state.batch_size * engine.ranks.data_ranks
    if progress.position and progress.position.get("num_lanes", lanes) != lanes:
        raise InputError(f"{path}: its carry has {lanes} lanes, its position another number; {ANOTHER_CHECKPOINT}")
    return state, progress


WholeNumber = Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)]
ShortText = Annotated[str, Field(max_length=64, pattern=r"^[^\p{C}]*$")]


class _SavedProgress(BaseModel):
    """The content of progress.json; infctx.data.lanes gives the position its meaning."""

    step: Size
    position: dict[ShortText, bool | WholeNumber | ShortText | list[WholeNumber] | list[ShortText] | None] | None
    num_tokens: Size


def _read_progress(file: Path) -> Progress:
    try:
        saved = read_json_as(_SavedProgress, file)
    except ValueError as error:
        raise InputError(f"{file}: has no valid progress of a run ({error}); {ANOTHER_CHECKPOINT}") from None
    return Progress(saved.step, saved.position, saved.num_tokens)


def load_units(path: Path) -> State | None:
    """Returns the units of a checkpoint's tuned state, if any; InputError if they do not fit its carry."""
    carry, others = read_carry(path, Ranks())
    found = [others.get(f"unit_{name}") for name in State._fields]
    if found == [None] * len(found):
        return None
    units = [unit for unit, part in zip(found, carry, strict=True) if unit is not None and _counts_in(part[:, 0], unit)]
    if len(units) < len(found):
        raise InputError(f"{path}: the units of its state do not fit its carry; {ANOTHER_CHECKPOINT}")
    return State(*units)


def _counts_in(part: Tensor, unit: Tensor) -> bool:
    """Returns whether a unit fits a part of a state: along each dimension, one for all values or one for each."""
    fits = unit.ndim == part.ndim and all(has in (1, size) for has, size in zip(unit.shape, part.shape, strict=True))
    return fits and unit.dtype == part.dtype and bool(((unit > 0) & unit.isfinite()).all())


def _units(units: State | None) -> dict[str, Tensor]:
    return {} if units is None else {f"unit_{name}": unit.cpu().contiguous() for name, unit in units._asdict().items()}


def _generators(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of the random generators of the CPU and, if the device is one, of the GPU."""
    states = {"random_cpu": torch.get_rng_state()}
    return states | ({"random_cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})

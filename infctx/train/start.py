"""The start of a run: devices and a plan in; a `Run` out, new or resumed from its newest complete checkpoint."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from infctx.data.curriculum import Curriculum
from infctx.data.lanes import Lanes
from infctx.data.sources import describe_sources, open_sources
from infctx.distributed.devices import Devices
from infctx.distributed.engine import Engine
from infctx.distributed.ranks import Ranks
from infctx.distributed.watchdog import Watchdog
from infctx.distributed.zero import ZeroEngine
from infctx.errors import InputError
from infctx.evaluate.held_out import fine_tunes, held_out_readings, measure_before
from infctx.evaluate.loss_by_position import refuse_tokens_beyond
from infctx.evaluate.quantized import compare_before
from infctx.evaluate.record import HELD_OUT
from infctx.files import atomic_file
from infctx.formats.adapter_file import read_adapter
from infctx.formats.checkpoint_folder import (
    ADAPTER_FILE,
    BEST,
    LOCK,
    SETTINGS,
    STATE_FILE,
    checkpoints,
    listed_files,
    newest_checkpoint,
    remove_leftovers,
)
from infctx.formats.model_files import RUN_WEIGHTS, ModelFiles, open_base, open_model
from infctx.formats.weights import fingerprint
from infctx.model.build import new_model
from infctx.model.loss import SegmentLoss
from infctx.model.quantized import FrozenDtype
from infctx.model.rwkv import RWKV, Compute
from infctx.model.sizes import describe
from infctx.model.state import State
from infctx.ops.precision import state_dtype
from infctx.plan.plan import Plan
from infctx.recurrence.time_parallel import TimeRanks
from infctx.report.starts import record_start
from infctx.settings.config import Config
from infctx.settings.load import dump_config
from infctx.small_texts import counted
from infctx.train.checkpoint import changed_settings, load_progress, load_units, lock_folder
from infctx.train.evaluation import resume_evaluations
from infctx.train.learn import freeze_weights, learn_adapter, natural_units, resume_adapter
from infctx.train.optimizer import make_optimizer
from infctx.train.run import STATE_FILES, Progress, Run

SETTINGS_HEAD = "# Every setting of this run; infctx writes this file at each start."

log = logging.getLogger(__name__)


def open_run(devices: Devices, watchdog: Watchdog | None = None) -> Run:
    """Opens a new run, or the one in the folder, as its newest complete checkpoint left it."""
    fabric, ranks, plan = devices
    config = plan.config
    if config.run.threads or fabric.device.type == "cpu":
        torch.set_num_threads(config.run.threads or max(1, torch.get_num_threads() // config.distributed.devices))
    torch.manual_seed(config.run.seed)
    checkpoint = ranks.from_first(lambda: find_checkpoint(config))
    if not checkpoint:  # measured by another run, and replaced like its step log
        ranks.from_first(lambda: (config.run.folder / HELD_OUT).unlink(missing_ok=True))
    # Until zero3 has spread it over the ranks, a model that learns may be too large for one device.
    too_large = plan.strategy == "zero3" and not config.model.freezes_weights
    device = torch.device("cpu") if too_large else fabric.device
    model = make_model(plan, checkpoint, device, ranks.join_time())
    held_out = held_out_readings(config, model.sizes.vocab_size)
    if held_out:  # fail now, not when all the work is done
        ranks.from_first(lambda: refuse_tokens_beyond(held_out))
        if fine_tunes(config) and not checkpoint:
            open_lanes(config, model.sizes.vocab_size)  # find mistakes before spending minutes
            ranks.from_first(lambda: measure_before(plan, model, fabric.device, watchdog))
        if config.model.frozen_dtype in ("int8", "nf4") and not checkpoint:
            ranks.from_first(lambda: compare_before(plan, model, held_out, watchdog))
    tuned_over = frozen_fingerprint(plan, model, checkpoint)
    if config.model.learns_state:
        model.set_initial_units(state_units(config, model, checkpoint, ranks))
    optimizer = make_optimizer(
        model,
        config.optimizer,
        config.model.learned_adapter,
        seed=config.run.seed,
        on_host=plan.strategy == "ddp" and config.distributed.offload_optimizer,
        compute=model.compute.dtype,
    )
    kind = Engine if plan.strategy == "ddp" else ZeroEngine
    segment_loss = SegmentLoss(model, config.optimizer.l2wrap, len(config.data.all_sources))
    engine = kind(devices, segment_loss, optimizer, config.optimizer.clip_norm)
    engine.watchdog = watchdog
    carry, progress = _new_carry(config, engine), Progress(step=0, position=None, num_tokens=0)
    if checkpoint:
        carry, progress = load_progress(checkpoint, engine)
    lanes = open_lanes(config, model.sizes.vocab_size, progress.position, ranks)
    ranks.from_first(lambda: write_settings(config))
    ranks.from_first(lambda: record_start(plan, progress.step + 1))
    log.info("%s, %s", checkpoint or config.model.weights or "new weights", describe(model.sizes))
    for line in describe_sources(config, lanes.mixture):
        log.info("%s", line)
    if ranks.world_size > 1:
        log.info("%s", devices.describe())
    if checkpoint:
        log.info("%s%s", _resumes(progress.step, config), _changes(checkpoint, config))
    run = Run(plan, model, engine, lanes, carry.to(fabric.device), progress, tuned_over, checkpoint, held_out)
    run.best = ranks.from_first(lambda: resume_evaluations(config, progress.step)) if held_out else None
    return run


def find_checkpoint(config: Config) -> Path | None:
    """Returns the checkpoint to resume from, None for a new run; removes half-written leftovers of a killed run."""
    folder = config.run.checkpoints
    remove_leftovers(folder)
    if config.run.resume == "never" and checkpoints(folder):
        raise InputError(f"{folder}: holds checkpoints, and run.resume is never; choose another run.folder, or auto")
    newest = newest_checkpoint(folder)
    if newest is None:
        (folder / BEST).unlink(missing_ok=True)
    learned = [name for name in (RUN_WEIGHTS, ADAPTER_FILE, *STATE_FILES) if (config.run.folder / name).exists()]
    if newest is None and learned:
        raise InputError(
            f"{config.run.folder / learned[0]}: is of a run whose checkpoints are gone, and would be "
            "replaced; move it away, or choose another run.folder"
        )
    return newest


def write_settings(config: Config) -> None:
    """Writes every setting of this start into the run's folder; keeps a config.yaml that a person wrote there."""
    path = config.run.folder / SETTINGS
    if path.exists() and not path.read_bytes().startswith(SETTINGS_HEAD.encode()):
        log.warning("%s: was not written by infctx, so it stays; the checkpoints have this run's settings", path)
        return
    with atomic_file(path) as temporary:
        temporary.write_text(f"{SETTINGS_HEAD}\n{dump_config(config)}", encoding="utf-8")


def make_model(plan: Plan, checkpoint: Path | None, device: torch.device, time_ranks: TimeRanks | None = None) -> RWKV:
    """Returns the model of the checkpoint or of `model.weights`, or a new one, that computes in run.precision.

    Weights that learn are fp32.  Frozen weights always come from `model.weights`, and are held in run.precision or as
    model.frozen_dtype says.
    """
    config, settings = plan.config, plan.config.model
    if checkpoint and _learned_in(checkpoint) != settings.learn.removesuffix("_and_shifts"):
        raise InputError(f"{checkpoint}: is of a run with another model.learn; choose another run.folder")
    precision = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    compute = Compute(precision, settings.recompute_blocks, settings.backend, time_ranks, config.window.carry)
    if checkpoint or plan.weights:
        model = _open_model(plan, checkpoint, settings.frozen_dtype or precision, device, compute)
    else:
        assert plan.sizes is not None  # the plan refuses a run without
        model = new_model(plan.sizes, device, torch.float32, config.run.seed, compute)
    if model.initial_time_shift is not None and settings.learn != "initial_state_and_shifts":
        raise InputError(
            f"{checkpoint or settings.initial_state or settings.weights}: the state has shift vectors, and model.learn "
            f"{settings.learn} has no place for them; start from a state without them, or learn them too"
        )
    if settings.learned_adapter:
        assert plan.weights is not None  # an adapter learns over existing weights
        learn_adapter(model, config, plan.weights)
        if checkpoint:
            frozen = open_base(plan.weights) if settings.frozen_dtype else model  # quantized, it does not show which
            resume_adapter(model, settings.learned_adapter, checkpoint / ADAPTER_FILE, frozen)
    elif settings.freezes_weights:
        freeze_weights(model, shifts=settings.learn == "initial_state_and_shifts")
    if config.window.carry == "lane":  # no document starts from the initial state, so it cannot learn
        for part in model.initial_parts():
            if part is not None:
                part.requires_grad_(False)
    return model


def frozen_fingerprint(plan: Plan, model: RWKV, checkpoint: Path | None) -> str | None:
    """Returns the fingerprint of the weights that stay; None if none do."""
    settings = plan.config.model
    if settings.learned_adapter and checkpoint:  # some weights may have learned with the adapter
        return read_adapter(checkpoint / ADAPTER_FILE, model.sizes).tuned_over
    if settings.frozen_dtype:  # quantized weights do not show which they were
        assert plan.weights is not None
        return fingerprint(open_base(plan.weights))
    return fingerprint(model) if settings.freezes_weights else None


def _learned_in(checkpoint: Path) -> str:
    """Returns what a checkpoint's run learns, as a value of model.learn."""
    names = listed_files(checkpoint) or ()
    return "adapter" if ADAPTER_FILE in names else "initial_state" if STATE_FILE in names else "weights"


def _open_model(
    plan: Plan,
    checkpoint: Path | None,
    frozen_dtype: torch.dtype | FrozenDtype,
    device: torch.device,
    compute: Compute,
) -> RWKV:
    """Reads a model from files; its sizes must be those of the plan."""
    settings, wanted = plan.config.model, plan.sizes
    files = ModelFiles(checkpoint, None) if checkpoint and not settings.freezes_weights else plan.weights
    assert files is not None  # a state is tuned over existing weights
    source, state = settings.weights, settings.initial_state
    if checkpoint:
        learned = checkpoint / STATE_FILE if settings.learns_state else None
        source, state = (source, learned) if settings.freezes_weights else (checkpoint, None)
    dtype = frozen_dtype if settings.freezes_weights else torch.float32
    model = open_model(files, state, dtype, device, compute, same_weights=bool(checkpoint))
    if wanted not in (None, model.sizes):
        raise InputError(
            f"{source}: holds another model than the settings ask for; set its sizes back, or choose another "
            "run.folder",
            f"it holds {describe(model.sizes)}",
            f"the settings ask for {describe(wanted)}",
        )
    return model


def state_units(config: Config, model: RWKV, checkpoint: Path | None, ranks: Ranks) -> State:
    """Returns the units of the state that learns: the checkpoint's, or measured in the first window of all lanes."""
    units = load_units(checkpoint) if checkpoint else None
    if units is None:
        window, _ = next(open_lanes(config, model.sizes.vocab_size))
        with model.alone():  # every rank computes all of it, with the same result
            units = natural_units(model, window, config.window, config.rank_lanes)
    device, found = model.embedding.weight.device, units
    return ranks.from_first(lambda: found.to("cpu")).to(device)


def open_lanes(
    config: Config, vocab_size: int, position: dict[str, Any] | None = None, ranks: Ranks | None = None
) -> Lanes:
    """Returns the windows of the configured documents after `position`, for all lanes or a rank's."""
    asked, unit = config.data.curriculum, config.window.segment_tokens
    return Lanes(
        open_sources(config, vocab_size),
        num_lanes=config.window.lanes,
        window_tokens=config.window.window_tokens,
        seed=config.run.seed,
        vocab_size=vocab_size,
        shuffle=config.data.shuffle,
        lanes=ranks.lanes(config.window.lanes) if ranks else None,
        curriculum=Curriculum(asked.from_tokens, asked.to_tokens, asked.steps, unit) if asked else None,
        position=position,
    )


@contextmanager
def only_run_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Holds the lock of a run's folder; raises InputError on every rank if another run has it.

    If the run is refused before it starts, a folder made for it is removed again.
    """
    is_new = not folder.exists()
    with ExitStack() as locks:
        ranks.from_first(lambda: bool(locks.enter_context(lock_folder(folder))))
        try:
            yield
        except InputError:
            if is_new and ranks.is_first and [path.name for path in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)
            raise


def _new_carry(config: Config, engine: Engine) -> State:
    """Returns what the first document of each lane finds: the initial state where lanes carry it on, else any."""
    sizes, dtype = engine.model.sizes, state_dtype(engine.model.embedding.weight.dtype)
    zeros = State.zeros(sizes, config.rank_lanes, dtype, "cpu")
    initial = engine.learned_state()
    if config.window.carry == "document" or initial is None:
        return zeros
    return State(*(part.to("cpu", dtype).expand_as(zero).clone() for part, zero in zip(initial, zeros, strict=True)))


def _resumes(step: int, config: Config) -> str:
    steps = config.optimizer.steps
    if step < steps:
        return f"resuming after step {step} of {steps}"
    more = "raise optimizer.steps to train longer, or choose another run.folder for another run"
    return f"this run is complete, with {counted(step, 'step')} of {steps}; {more}"


def _changes(checkpoint: Path, config: Config) -> str:
    changed = changed_settings(checkpoint, config)
    return f"; changed since: {', '.join(changed)}" if changed else ""

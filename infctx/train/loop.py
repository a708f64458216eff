"""Training: a configuration in; checkpoints, weights and reports in the run's folder out.  Start reading here.

    infctx train configs/finch-tiny.yaml           or        make train CONFIG=configs/finch-tiny.yaml

A step: the next window of every lane (data/lanes), forward over its seams and backward over its segments
(train/window), clip, AdamW (train/optimizer), report (train/metrics), now and then a checkpoint (train/checkpoint).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from infctx.config import Config
from infctx.data.lanes import Lanes, Window
from infctx.data.pieces import Pieces
from infctx.data.token_store import TokenStore
from infctx.distributed.engine import Devices, Engine, open_devices, open_engine, watched
from infctx.distributed.ranks import Ranks, started_by_launcher
from infctx.errors import InputError, TrainingFailed
from infctx.evaluate.loss_by_position import evaluate_store, format_table, refuse_tokens_beyond, summarise
from infctx.formats.model_files import open_model
from infctx.formats.state_file import STATE_FILE
from infctx.formats.weights import build_model, save_weights
from infctx.model.loss import SegmentLoss
from infctx.model.rwkv import RWKV
from infctx.model.sizes import describe
from infctx.model.state import State, state_dtype
from infctx.plan.plan import model_sizes, pick_device, refuse_what_lacks
from infctx.train.checkpoint import (
    Progress,
    changed_settings,
    checkpoints,
    load_progress,
    load_units,
    lock_folder,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from infctx.train.failure import explain_failure, find_failure
from infctx.train.learn import finish_tuning, freeze_weights, natural_units
from infctx.train.metrics import open_metrics, read_step_log
from infctx.train.optimizer import set_learning_rate
from infctx.train.window import backward_through_window, cut_window

EVALUATION_BYTES = 4 << 30
"""What evaluating takes of a device besides the weights: activations of one document, slices of the logits."""

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A run in the middle of its work: what changes from step to step, and what it works with."""

    config: Config
    model: RWKV
    engine: Engine
    lanes: Lanes
    carry: State
    progress: Progress
    checkpoint: Path | None


def train(config: Config) -> None:
    """Trains as `config` says, from the newest checkpoint of its folder if there is one.

    Raises InputError for what the machine lacks or the user got wrong, TrainingFailed for a loss that is not finite.
    """
    if not started_by_launcher():  # which has looked
        refuse_what_lacks(config)
    devices = open_devices(config)
    with only_run_in(config.run.folder, devices.ranks):
        with watched(devices.ranks, checkpoint_folder(config)) as watchdog:
            run = open_run(config, devices)
            run.engine.watchdog = watchdog
            done = train_steps(run)
        if done and devices.ranks.is_first:
            finish(run)


def train_steps(run: Run) -> bool:
    """Steps to the last one, or until SIGINT or SIGTERM; says whether the run is done."""
    config, engine, ranks = run.config, run.engine, run.engine.ranks
    steps, first = config.optimizer.steps, run.progress.step + 1
    with open_metrics(config, first, ranks.is_first) as metrics, stop_requests() as received:
        for step in range(first, steps + 1):
            window, position = next(run.lanes)
            learning_rate = set_learning_rate(engine.optimizer, config.optimizer, step)
            came_in = run.carry
            engine.begin_step(step)
            loss_sum, run.carry = gradients_of_step(run, window)
            told = ranks.gather_numbers([loss_sum, bool(received), engine.busy_seconds], engine.device)
            loss, stop = told[:, 0].sum() / max(window.num_targets, 1), bool(told[:, 1].any())
            norm = engine.step() if loss.isfinite() else loss
            if not norm.isfinite():
                where = find_failure(engine, window, came_in, config)
                raise TrainingFailed(explain_failure(where, loss, step, run.checkpoint))
            run.progress = Progress(step, position, run.progress.num_tokens + config.step_tokens)
            metrics.report(step, loss.item(), learning_rate, norm.item(), run.carry, engine.learned_state(), told[:, 2])
            if stop or step == steps or step % config.run.save_every_steps == 0:
                run.checkpoint = save(run)
            if stop and step < steps:
                why = received[0] if received else "a signal to another rank"
                metrics.say(f"{why}: stopped behind step {step}, all saved in {run.checkpoint}; run again to go on")
                return False
    return True


def gradients_of_step(run: Run, window: Window) -> tuple[Tensor, State]:
    """Adds the gradient of one step, group of lanes by group; returns the sum of this rank's losses and the state to
    carry on."""
    settings, engine, lanes = run.config.window, run.engine, run.config.rank_lanes
    tokens, targets, starts = (part.to(engine.device) for part in (window.tokens, window.targets, window.starts))
    time = engine.ranks.time_rank, engine.ranks.time_ranks
    at_once = settings.lanes_per_pass or lanes
    loss_sums, carries = [], []
    for begin in range(0, lanes, at_once):
        group = slice(begin, begin + at_once)
        loss_sum, carry = backward_through_window(
            engine.segment_loss,
            cut_window(tokens[group], targets[group], starts[group], settings.segment_tokens, *time),
            run.carry.lanes(group),
            engine.scale / max(window.num_targets, 1),
            engine,
            settings.gradient_segments,
            settings.seam_store,
            ends_step=begin + at_once >= lanes,
        )
        loss_sums.append(loss_sum)
        carries.append(carry)
    return sum(loss_sums), State.join_lanes(carries)


def open_run(config: Config, devices: Devices | None = None) -> Run:
    """A new run, or the one in the folder as its newest whole checkpoint left it."""
    devices = devices or open_devices(config)
    fabric, ranks = devices.fabric, devices.ranks
    if config.run.threads or fabric.device.type == "cpu":
        torch.set_num_threads(config.run.threads or max(1, torch.get_num_threads() // config.distributed.devices))
    torch.manual_seed(config.run.seed)
    checkpoint = ranks.from_first(lambda: find_checkpoint(config))
    too_large = devices.strategy == "zero3" and not config.model.freezes_weights  # for one device, before it is sharded
    model = make_model(config, checkpoint, torch.device("cpu") if too_large else fabric.device)
    model.time_ranks = ranks.join_time()
    if config.model.freezes_weights:
        model.set_initial_units(state_units(config, model, checkpoint, ranks))
    engine = open_engine(devices, SegmentLoss(model, config.optimizer.l2wrap), config.optimizer)
    carry, progress = _new_carry(config, model), Progress(step=0, position=None, num_tokens=0)
    if checkpoint:
        carry, progress = load_progress(checkpoint, engine)
    lanes = open_lanes(config, model.sizes.vocab_size, progress.position, ranks)
    if config.data.held_out and config.run.evaluate_tokens:  # now, not when all the work is done
        held_out, tokens = TokenStore(config.data.held_out), config.run.evaluate_tokens
        ranks.from_first(lambda: refuse_tokens_beyond(held_out, model.sizes.vocab_size, tokens))
    log.info("%s, %s", checkpoint or config.model.weights or "new weights", describe(model.sizes))
    if ranks.world_size > 1:
        log.info("%s", devices.describe())
    if checkpoint:
        log.info("going on behind step %d of %d%s", progress.step, config.optimizer.steps, _changes(checkpoint, config))
    return Run(config, model, engine, lanes, carry.to(fabric.device), progress, checkpoint)


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint to go on from, None for a new run; cleans up what a killed run left half done."""
    folder = checkpoint_folder(config)
    remove_leftovers(folder)
    if config.run.resume == "never" and checkpoints(folder):
        raise InputError(f"{folder}: holds checkpoints, and run.resume is never; choose another run.folder, or auto")
    return newest_checkpoint(folder)


def state_units(config: Config, model: RWKV, checkpoint: Path | None, ranks: Ranks) -> State:
    """What the state that learns counts in: as the run began with, or of the first window of all lanes."""
    units = load_units(checkpoint) if checkpoint else None
    if units is None:
        window, _ = next(open_lanes(config, model.sizes.vocab_size))
        time_ranks, model.time_ranks = model.time_ranks, None  # every rank runs all of it, and finds the same
        units = natural_units(model, window, config.window, config.rank_lanes)
        model.time_ranks = time_ranks
    device = model.embedding.weight.device
    return ranks.from_first(lambda: units.to("cpu")).to(device)


def open_lanes(
    config: Config, vocab_size: int, position: dict[str, Any] | None = None, ranks: Ranks | None = None
) -> Lanes:
    """The windows of the configured documents, from the one behind `position` on, of all lanes or of a rank's."""
    store = TokenStore(config.data.store)
    return Lanes(
        Pieces(store, config.data.document_tokens) if config.data.document_tokens else store,
        num_lanes=config.window.lanes,
        window_tokens=config.window.window_tokens,
        seed=config.run.seed,
        vocab_size=vocab_size,
        shuffle=config.data.shuffle,
        lanes=ranks.lanes(config.window.lanes) if ranks else None,
        position=position,
    )


def make_model(config: Config, checkpoint: Path | None, device: torch.device) -> RWKV:
    """The model of the checkpoint, or of `model.weights`, or a new one, computing in run.precision.

    Weights that learn are fp32; weights that stay as they are, of `model.weights` always, are held in run.precision.
    """
    settings = config.model
    if checkpoint and (checkpoint / STATE_FILE).is_file() != settings.freezes_weights:
        raise InputError(f"{checkpoint}: is of a run with another model.learn; choose another run.folder")
    low = torch.bfloat16 if config.run.precision == "bf16" else None
    if checkpoint or settings.weights:
        source, state, dtype = settings.weights, settings.initial_state, torch.float32
        if settings.freezes_weights:
            state = checkpoint / STATE_FILE if checkpoint else state
            dtype = low or dtype
        elif checkpoint:
            source, state = checkpoint, None
        model = open_model(source, state, dtype, device, settings.backend, same_weights=bool(checkpoint))
        wanted = model_sizes(config)
        if wanted not in (None, model.sizes):
            raise InputError(
                f"{source}: holds {describe(model.sizes)}, and the configuration asks for {describe(wanted)}; "
                "choose another run.folder, or set the model's sizes back"
            )
    else:
        model = build_model(
            settings.size, device=device, seed=config.run.seed, backend=settings.backend, **settings.sizes
        )
    model.compute_dtype = low
    model.recompute_blocks = settings.recompute_blocks
    if model.initial_time_shift is not None and settings.learn != "initial_state_and_shifts":
        raise InputError(
            f"{checkpoint or settings.initial_state or settings.weights}: the state has shift vectors, and model.learn "
            f"{settings.learn} has no place for them; begin from a state without them, or learn them too"
        )
    if settings.freezes_weights:
        freeze_weights(model, shifts=settings.learn == "initial_state_and_shifts")
    return model


def _changes(checkpoint: Path, config: Config) -> str:
    changed = changed_settings(checkpoint, config)
    return f"; changed since: {', '.join(changed)}" if changed else ""


def finish(run: Run) -> None:
    """Writes what was learned, evaluates it on held-out documents, and says what happened and what to do next."""
    config, folder, model = run.config, run.config.run.folder, whole_model(run)
    losses = [entry["loss"] for entry in read_step_log(folder)]
    outcome = f"trained {run.progress.step} steps on {run.progress.num_tokens:,} tokens"
    if losses:
        outcome += f": loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token"
    if config.model.freezes_weights:
        print(f"{outcome}.")
        finish_tuning(config, model, run.checkpoint)
        return
    weights = folder / "model.pth"
    save_weights(model, weights)
    if config.data.held_out and config.run.evaluate_tokens:
        store = TokenStore(config.data.held_out)
        if model.embedding.weight.device.type != pick_device(config.run.device).type:
            log.warning("the whole model does not fit on one device: it is evaluated on the CPU, many times slower")
        buckets = evaluate_store(model, store, config.window.segment_tokens, config.run.evaluate_tokens)
        print(format_table(buckets, store))
        outcome += f"; {summarise(buckets)}"
    print(f"{outcome}.")
    print(f"Files: weights {weights}, checkpoint {run.checkpoint}, TensorBoard {folder / 'tensorboard'}.")
    programs = os.path.relpath(Path(sys.executable).parent)
    print(
        f"Next: {programs}/tensorboard --logdir {folder / 'tensorboard'} to see the curves, "
        f"{programs}/infctx generate {folder} --prompt 'def ' to read what it writes."
    )


def save(run: Run) -> Path:
    """A checkpoint of the run as it stands."""
    run.engine.mark("checkpoint")
    return save_checkpoint(checkpoint_folder(run.config), run.engine, run.carry, run.progress, run.config)


def whole_model(run: Run) -> RWKV:
    """The model in this process alone, for what comes behind the steps; on the CPU where the device is full."""
    model, engine = run.model, run.engine
    model.time_ranks = None
    if engine.holds_whole_weights:
        return model
    device = engine.device
    del run.model, run.engine, model, engine
    model = make_model(run.config, run.checkpoint, torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) + EVALUATION_BYTES
        device = device if needed < torch.cuda.mem_get_info(device)[0] else torch.device("cpu")
    return model.to(device)


def checkpoint_folder(config: Config) -> Path:
    return config.run.folder / "checkpoints"


def _new_carry(config: Config, model: RWKV) -> State:
    """Zeros: every lane's first document starts from the initial state."""
    weight = model.embedding.weight
    return State.zeros(model.sizes, config.rank_lanes, state_dtype(weight.dtype), "cpu")


@contextmanager
def only_run_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Holds the lock of a run's folder; an InputError on every rank if another run has it."""
    with ExitStack() as locks:
        ranks.from_first(lambda: bool(locks.enter_context(lock_folder(folder))))
        yield


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that SIGINT and SIGTERM put their name in, so that a step is finished and saved; a second one kills."""
    received: list[str] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The training loop: a configuration in; checkpoints, weights and reports in the run's folder out.  Start reading here.

    infctx train configs/finch-tiny.yaml           or        make train CONFIG=configs/finch-tiny.yaml

A run is planned (plan/plan), opened (train/start), trained here, and finished (train/finish).  A step reads the next
window of every lane (data/lanes), goes forward and then backward over its segments (train/window), clips the gradient
and steps AdamW (distributed/engine), reports (report/metrics), and now and then measures the held-out loss
(train/evaluation) and saves a checkpoint (train/checkpoint).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from infctx.data.lanes import Window
from infctx.distributed.devices import open_devices, watched
from infctx.environment import started_by_launcher
from infctx.errors import TrainingFailed
from infctx.model.state import State
from infctx.plan.plan import make_plan
from infctx.report.metrics import Step, loss_by_source, open_metrics
from infctx.settings.config import Config
from infctx.train.checkpoint import save_checkpoint
from infctx.train.evaluation import evaluate_step, evaluation_is_due
from infctx.train.failure import explain_failure, find_failure
from infctx.train.finish import finish
from infctx.train.learn import dropout_rows
from infctx.train.optimizer import set_learning_rate
from infctx.train.run import Progress, Run
from infctx.train.start import only_run_in, open_run
from infctx.train.window import backward_through_window, cut_window

STOPPING = "finishing this step, then saving; a second signal stops at once, without saving"


def train(config: Config) -> None:
    """Trains a run from its configuration, or resumes it from the newest checkpoint in its folder.

    Raises InputError for a user's mistake or a machine that is not up to it, TrainingFailed for a loss or gradient that
    is not finite.
    """
    devices = open_devices(make_plan(config, refuse=not started_by_launcher()))
    with only_run_in(config.run.folder, devices.ranks):
        with watched(devices.ranks, config.run.checkpoints) as watchdog:
            run = open_run(devices, watchdog)
            done = train_steps(run)
        if done and devices.ranks.is_first:
            finish(run)


def train_steps(run: Run) -> bool:
    """Trains until the last step, SIGINT or SIGTERM; returns whether the run is done."""
    config, engine, ranks = run.plan.config, run.engine, run.engine.ranks
    steps, first = config.optimizer.steps, run.progress.step + 1
    with open_metrics(config, first, ranks.is_first) as metrics, stop_requests(ranks.is_first) as received:
        for step in range(first, steps + 1):
            window, position = next(run.lanes)
            learning_rate = set_learning_rate(engine.optimizer, config.optimizer, step)
            came_in = run.carry
            engine.begin_step(step, window.num_targets, config.rank_backwards)
            mine, run.carry = gradients_of_step(run, window)
            reported = ranks.gather_numbers([*mine.tolist(), bool(received), engine.busy_seconds], engine.device)
            losses, stop = reported[:, :-2].sum(0), bool(reported[:, -2].any())
            loss = losses.sum() / max(window.num_targets, 1)
            norm = engine.step() if loss.isfinite() else loss
            if not norm.isfinite():
                where = find_failure(engine, window, came_in, config)
                raise TrainingFailed(*explain_failure(where, loss, step, run.checkpoint))
            run.progress = Progress(step, position, run.progress.num_tokens + config.step_tokens)
            learned = engine.learned_state()
            sources = loss_by_source(config, losses.tolist(), window.source_targets)
            done = Step(
                step, run.progress.num_tokens, loss.item(), learning_rate, norm.item(), run.carry, learned, sources
            )
            metrics.report(done, reported[:, -1])
            is_best = evaluation_is_due(config, step) and not stop and evaluate_step(run, metrics)
            if stop or is_best or step == steps or step % config.run.save_every_steps == 0:
                run.checkpoint = save_checkpoint(run)
            if stop and step < steps:
                why = received[0] if received else "a signal to another rank"
                saved = f"saved in {run.checkpoint}; run the same command to resume"
                metrics.stop(f"{why}: stopped after step {step}, {saved}")
                return False
    return True


def gradients_of_step(run: Run, window: Window) -> tuple[Tensor, State]:
    """Adds the gradient of one step, one group of lanes after another.

    Returns the sum of this rank's losses for each source, and the state to carry into the next step.
    """
    config, engine = run.plan.config, run.engine
    settings = config.window
    tokens, targets, starts = (part.to(engine.device) for part in (window.tokens, window.targets, window.starts))
    sources = None if window.sources is None else window.sources.to(engine.device)
    time = engine.ranks.time_rank, engine.ranks.time_ranks
    rows = dropout_rows(run, tokens.shape[1])
    losses, carries = torch.zeros((), device=engine.device), []
    for begin in range(0, config.rank_lanes, config.pass_lanes):
        group = slice(begin, begin + config.pass_lanes)
        of, drawn = (None if part is None else part[group] for part in (sources, rows))
        here, carry = backward_through_window(
            engine.segment_loss,
            cut_window(tokens[group], targets[group], starts[group], settings.segment_tokens, *time, of, drawn),
            run.carry.lanes(group),
            engine,
            settings.gradient_segments,
            settings.seam_store,
        )
        losses = losses + here
        carries.append(carry)
    return losses, State.join_lanes(carries)


@contextmanager
def stop_requests(reports: bool = True) -> Iterator[list[str]]:
    """A context that lists SIGINT and SIGTERM by name, so that the step can end and be saved; a second signal kills.

    reports: prints at once that the signal has arrived
    """
    received: list[str] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        if reports:  # a step can take minutes; written past Python's buffers, which may be in use
            os.write(2, f"\n{received[0]}: {STOPPING}\n".encode())
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The held-out loss while a run trains: measured on all ranks together between two steps, recorded and reported."""

from __future__ import annotations

import logging

from infctx.evaluate.held_out import UNMEASURABLE, evaluation_of, keep_evaluations, read_earlier, trained_evaluations
from infctx.evaluate.record import Evaluation, held_out_loss, of_same_documents
from infctx.evaluate.together import evaluate_together
from infctx.formats.checkpoint_folder import checkpoint_path
from infctx.report.metrics import Metrics, NoMetrics
from infctx.settings.config import Config
from infctx.train.run import Run

log = logging.getLogger(__name__)


def evaluation_is_due(config: Config, step: int) -> bool:
    """Returns whether the held-out loss is measured after a step: now and then, and after the last."""
    every = config.run.evaluate_every_steps
    return every is not None and (step % every == 0 or step == config.optimizer.steps)


def evaluate_step(run: Run, metrics: Metrics | NoMetrics) -> bool:
    """Measures the held-out loss after a step and reports it; every rank must call it.

    Returns whether the run's checkpoint of this step is the best so far, to be saved now.  If the loss cannot be
    measured, there is a warning, and training continues.
    """
    config, step, is_first = run.plan.config, run.progress.step, run.engine.ranks.is_first
    try:
        losses = evaluate_together(run.engine, run.held_out)
    except UNMEASURABLE as error:
        metrics.say(f"step {step}: the held-out loss could not be measured: {str(error).partition(chr(10))[0]}")
        return False
    evaluation = run.measured = evaluation_of(run.model, step, losses)
    if is_first:
        _record(config, evaluation, metrics)
    metrics.report_held_out(evaluation, [document for documents in losses.values() for document in documents])
    if not config.run.keep_best:
        return False
    if run.best and of_same_documents(run.best, evaluation) and held_out_loss(run.best) <= held_out_loss(evaluation):
        return False
    run.best = evaluation
    return True


def resume_evaluations(config: Config, step: int) -> Evaluation | None:
    """Drops what a killed run recorded after the checkpoint of `step`; returns the best that has a checkpoint.

    Only the first rank calls it.
    """
    earlier = read_earlier(config, step + 1)
    if earlier:
        keep_evaluations(config, earlier)
    kept = [
        evaluation
        for evaluation in trained_evaluations(config, step + 1)
        if checkpoint_path(config.run.checkpoints, evaluation.step or 0).is_dir()
    ]
    return min(kept, key=held_out_loss, default=None) if config.run.keep_best else None


def _record(config: Config, evaluation: Evaluation, metrics: Metrics | NoMetrics) -> None:
    assert evaluation.step is not None
    try:
        keep_evaluations(config, [*read_earlier(config, evaluation.step), evaluation])
    except OSError as error:  # such as a full disk
        metrics.say(f"{error.filename}: the held-out loss is not saved there: {error.strerror}")

"""Measures a run's held-out loss before its first step and after its last, saves it in its folder, and shows it.

`held_out.json` (evaluate/record) gets each table at its step.  Before the first step, only a model that has already
learned something is worth measuring.  A tuned state is compared with no state, at the end.  Between steps, all ranks
measure together (evaluate/together).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from infctx.data.token_store import TokenStore, store_prefix
from infctx.distributed.watchdog import Watchdog
from infctx.errors import InputError
from infctx.evaluate.loss_by_position import (
    DocumentLoss,
    Reading,
    choose_documents,
    evaluate_reading,
    format_comparison,
    format_table,
    merge,
    summarize,
)
from infctx.evaluate.record import HELD_OUT, Evaluation, of_same_documents, read_record, write_record
from infctx.machine import free_device_memory
from infctx.model.rwkv import RWKV
from infctx.plan.plan import Plan
from infctx.settings.config import Config

EVALUATION_BYTES = 4 << 30
"""Memory that evaluation needs besides the weights: activations of one document, slices of the logits."""

UNMEASURABLE = (InputError, OSError, torch.OutOfMemoryError)
"""Errors that keep a loss from being measured; none is a reason to lose a run."""

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What was measured after the last step: the table for people, and the evaluations that are new."""

    text: str
    evaluations: list[Evaluation]


def held_out_sources(config: Config) -> dict[str, Path]:
    """Returns the stores of held-out documents by the names of their sources; none if the run measures nothing."""
    return dict(config.data.held_out_stores) if config.run.evaluate_tokens else {}


def held_out_readings(config: Config, vocab_size: int) -> dict[str, Reading]:
    """Returns what to read of each source of held-out documents: the same share of run.evaluate_tokens."""
    sources = held_out_sources(config)
    share = max(1, config.run.evaluate_tokens // max(len(sources), 1))
    return {
        name: choose_documents(TokenStore(path), vocab_size, config.window.segment_tokens, share)
        for name, path in sources.items()
    }


def evaluation_of(model: RWKV, step: int, losses: Mapping[str, Sequence[DocumentLoss]]) -> Evaluation:
    """Returns the evaluation of a model at a step, from the losses of the documents of each source."""
    sources = {name: merge([document.buckets for document in documents]) for name, documents in losses.items()}
    buckets = merge(list(sources.values()))
    return Evaluation(step, model.initial_wkv is not None, buckets, sources if len(sources) > 1 else {})


def fine_tunes(config: Config) -> bool:
    """Returns whether the run trains the weights of a finished model further, or an adapter for them."""
    return config.model.weights is not None and not config.model.tunes_state


def measure_before(plan: Plan, model: RWKV, device: torch.device, watchdog: Watchdog | None) -> None:
    """Measures a model before fine-tuning, on the first rank; if that fails, there is a line in the log.

    device:   of the run; a model on the CPU moves there for the measurement, if it fits
    watchdog: of the ranks that wait meanwhile
    The model and the random generators are left unchanged.
    """
    config, home = plan.config, model.embedding.weight.device
    if home.type != device.type and not fits(model, device):
        log.warning("held-out loss before training: skipped, the whole model does not fit on one device")
        return
    tokens = config.run.evaluate_tokens
    log.info("held-out loss before training: reading up to %s tokens; run.evaluate_tokens=0 skips it", f"{tokens:,}")
    began = time.perf_counter()
    try:
        readings = held_out_readings(config, model.sizes.vocab_size)
        with model.alone(), _moved(model, device), torch.random.fork_rng([device] if device.type == "cuda" else []):
            before = _evaluate(model, readings, 0, watchdog)
    except UNMEASURABLE as error:
        log.warning("held-out loss before training: not measured, %s", error)
        return
    keep_evaluations(config, [before])
    log.info("held-out loss before training %s (%.0f s)", summarize(before.buckets), time.perf_counter() - began)


def measure_after(plan: Plan, model: RWKV, step: int, measured: Evaluation | None) -> Outcome:
    """Measures the model after its last step, saves the losses, and returns them as a table, next to those before
    fine-tuning or without the state.

    measured: with the model of this step, if it was measured between steps
    Raises one of UNMEASURABLE, for example if the held-out documents are gone.
    """
    config = plan.config
    readings = held_out_readings(config, model.sizes.vocab_size)
    stores = _stores(config)
    if model.embedding.weight.device.type != plan.device.type:
        log.warning("the whole model does not fit on one device: it is evaluated on the CPU, many times slower")
    earlier = read_earlier(config, before=step)
    before, names, new = None, ("without state", "with the state"), []
    if config.model.tunes_state:
        with without_state(model):
            new = [_evaluate(model, readings, step)]
        before = new[0]
    else:
        names = ("before training", "after training")
        if fine_tunes(config):
            before = next((evaluation for evaluation in earlier if evaluation.step == 0), None)
    after = measured
    if after is None:
        after = _evaluate(model, readings, step)
        new.append(after)
    kept = f"saved to {config.run.folder / HELD_OUT}"
    try:
        keep_evaluations(config, [*earlier, *new, *([measured] if measured else [])])
    except OSError as error:  # such as a full disk: show the table anyway
        kept = f"not saved to {config.run.folder / HELD_OUT}: {error.strerror}"
    if before and of_same_documents(before, after):
        table = format_comparison(before.buckets, after.buckets, stores, names)
    else:
        table = format_table(after.buckets, stores)
    lines = [table, *(f"{name}: held-out loss {summarize(its)}" for name, its in after.sources.items())]
    return Outcome("\n".join([*lines, f"held-out loss {summarize(after.buckets)}", kept]), new)


def fits(model: RWKV, device: torch.device) -> bool:
    """Returns whether a GPU has room for the whole model and its evaluation."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return needed + EVALUATION_BYTES < free_device_memory(device)


@contextmanager
def without_state(model: RWKV) -> Iterator[None]:
    """A context in which documents start from zeros."""
    parts = {f"initial_{name}": part for name, part in model.initial_parts()._asdict().items()}
    for name in parts:
        setattr(model, name, None)
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(model, name, part)


def read_earlier(config: Config, before: int) -> list[Evaluation]:
    """Returns the recorded evaluations of this run's documents at steps below `before`; warns of a damaged record."""
    path = config.run.folder / HELD_OUT
    try:
        recorded = read_record(path, _stores(config), config.run.evaluate_tokens)
    except ValueError as error:
        log.warning("%s: is damaged (%s); it will be replaced", path, error)
        return []
    return [evaluation for evaluation in recorded if (evaluation.step or 0) < before]


def trained_evaluations(config: Config, before: int) -> list[Evaluation]:
    """Returns those of `read_earlier` that measured what learns: of a tuned state, not those without it."""
    return [each for each in read_earlier(config, before) if each.with_state or not config.model.tunes_state]


def keep_evaluations(config: Config, evaluations: list[Evaluation]) -> None:
    """Writes the record of a run: these evaluations and no others."""
    write_record(config.run.folder / HELD_OUT, _stores(config), config.run.evaluate_tokens, evaluations)


def _stores(config: Config) -> str:
    """Returns the held-out stores as the record and the tables name them."""
    return ", ".join(str(store_prefix(path)) for path in held_out_sources(config).values())


def _evaluate(model: RWKV, readings: Mapping[str, Reading], step: int, watchdog: Watchdog | None = None) -> Evaluation:
    def at_work() -> None:
        if watchdog:
            watchdog.mark(0, None, "held-out loss")

    losses = {name: evaluate_reading(model, reading, at_work) for name, reading in readings.items()}
    return evaluation_of(model, step, losses)


@contextmanager
def _moved(model: RWKV, device: torch.device) -> Iterator[None]:
    """A context with the model on a device; afterward, its GPU memory is free and does not count in the peak."""
    home = model.embedding.weight.device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

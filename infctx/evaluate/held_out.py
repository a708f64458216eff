"""Measures a run's held-out loss before its first step and after its last, saves it in its folder, and shows it.

`held_out.json` (evaluate/record) and TensorBoard get each table at its step.  Before the first step, only a model that
has already learned something is worth measuring.  A tuned state is compared with no state, at the end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from infctx.data.token_store import TokenStore
from infctx.distributed.watchdog import Watchdog
from infctx.errors import InputError
from infctx.evaluate.loss_by_position import (
    Bucket,
    evaluate_store,
    format_comparison,
    format_table,
    summarize,
    total,
)
from infctx.evaluate.record import HELD_OUT, Evaluation, read_record, write_record
from infctx.machine import free_device_memory
from infctx.model.rwkv import RWKV
from infctx.plan.plan import Plan
from infctx.settings.config import Config

TENSORBOARD = "tensorboard"
"""The folder of TensorBoard's files in a run's folder."""
EVALUATION_BYTES = 4 << 30
"""Memory that evaluation needs besides the weights: activations of one document, slices of the logits."""

UNMEASURABLE = (InputError, OSError, torch.OutOfMemoryError)
"""Errors that keep a loss from being measured; none is a reason to lose a run."""

log = logging.getLogger(__name__)


def fine_tunes(config: Config) -> bool:
    """Returns whether the run trains the weights of a finished model further."""
    return config.model.weights is not None and not config.model.freezes_weights


def measure_before(plan: Plan, model: RWKV, device: torch.device, watchdog: Watchdog | None) -> None:
    """Measures a model before fine-tuning, on the first rank; if that fails, there is a line in the log.

    device:   of the run; a model on the CPU moves there for the measurement, if it fits
    watchdog: of the ranks that wait meanwhile
    The model and the random generators are left unchanged.
    """
    config, home = plan.config, model.embedding.weight.device
    assert config.data.held_out is not None  # or there is nothing to measure
    if home.type != device.type and not fits(model, device):
        log.warning("held-out loss before training: skipped, the whole model does not fit on one device")
        return
    tokens = config.run.evaluate_tokens
    log.info("held-out loss before training: reading up to %s tokens; run.evaluate_tokens=0 skips it", f"{tokens:,}")
    began = time.perf_counter()
    try:
        store = TokenStore(config.data.held_out)
        with model.alone(), _moved(model, device), torch.random.fork_rng([device] if device.type == "cuda" else []):
            buckets = _evaluate(config, model, store, watchdog)
    except UNMEASURABLE as error:
        log.warning("held-out loss before training: not measured, %s", error)
        return
    _keep(config, store, [Evaluation(0, model.initial_wkv is not None, buckets)], [])
    log.info("held-out loss before training %s (%.0f s)", summarize(buckets), time.perf_counter() - began)


def measure_after(plan: Plan, model: RWKV, step: int) -> str:
    """Measures the model after its last step, saves the losses, and returns them as a table, next to those before
    training if these are known.

    Raises one of UNMEASURABLE, for example if the held-out documents are gone.
    """
    config = plan.config
    assert config.data.held_out is not None  # or there is nothing to measure
    store = TokenStore(config.data.held_out)
    if model.embedding.weight.device.type != plan.device.type:
        log.warning("the whole model does not fit on one device: it is evaluated on the CPU, many times slower")
    earlier = [evaluation for evaluation in _read_earlier(config, store) if (evaluation.step or 0) < step]
    before, names = None, ("without state", "with the state")
    if config.model.freezes_weights:
        with without_state(model):
            before = _evaluate(config, model, store)
        found = [Evaluation(step, False, before)]
    else:
        found, names = [], ("before training", "after training")
        if fine_tunes(config):
            before = next((evaluation.buckets for evaluation in earlier if evaluation.step == 0), None)
    after = _evaluate(config, model, store)
    kept = f"saved to {config.run.folder / HELD_OUT}"
    try:
        _keep(config, store, [*found, Evaluation(step, model.initial_wkv is not None, after)], earlier)
    except OSError as error:  # such as a full disk: show the table anyway
        kept = f"not saved to {config.run.folder / HELD_OUT}: {error.strerror}"
    comparable = before is not None and [_place(bucket) for bucket in before] == [_place(bucket) for bucket in after]
    table = format_comparison(before, after, store, names) if before and comparable else format_table(after, store)
    return f"{table}\nheld-out loss {summarize(after)}\n{kept}"


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


def _evaluate(config: Config, model: RWKV, store: TokenStore, watchdog: Watchdog | None = None) -> list[Bucket]:
    def at_work() -> None:
        if watchdog:
            watchdog.mark(0, None, "held-out loss")

    return evaluate_store(model, store, config.window.segment_tokens, config.run.evaluate_tokens, at_work)


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


def _read_earlier(config: Config, store: TokenStore) -> list[Evaluation]:
    path = config.run.folder / HELD_OUT
    try:
        return read_record(path, store.path, config.run.evaluate_tokens)
    except ValueError as error:
        log.warning("%s: is damaged (%s); it will be replaced", path, error)
        return []


def _keep(config: Config, store: TokenStore, found: list[Evaluation], earlier: list[Evaluation]) -> None:
    """Writes the record and TensorBoard's scalars."""
    folder: Path = config.run.folder
    write_record(folder / HELD_OUT, store.path, config.run.evaluate_tokens, [*earlier, *found])
    with SummaryWriter(str(folder / TENSORBOARD), purge_step=None if found[-1].step else 0) as writer:
        for step, with_state, buckets in found:
            without = "_without_state" if config.model.freezes_weights and not with_state else ""
            for bucket in [*buckets, total(buckets)]:
                place = f"_{bucket.begin}-{bucket.end - 1}" if bucket.end else ""
                name = f"held_out{without}{'_by_position' if place else ''}"
                writer.add_scalar(f"{name}/nats_per_token{place}", bucket.nats_per_token, step)
                if bucket.bits_per_byte is not None:
                    writer.add_scalar(f"{name}/bits_per_byte{place}", bucket.bits_per_byte, step)


def _place(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.begin, bucket.end, bucket.num_tokens

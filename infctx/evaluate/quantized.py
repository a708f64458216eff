"""What quantizing costs: the loss of a model with quantized matrices next to that with its stored ones in bf16.

The stored ones are read from the file one by one, again for each segment, so a model is compared wherever it fits
quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.distributed.watchdog import Watchdog
from infctx.evaluate.held_out import UNMEASURABLE
from infctx.evaluate.loss_by_position import Reading, evaluate_reading, format_value, merge, total, unit_of
from infctx.formats.model_files import open_base
from infctx.formats.stored_names import stored_names
from infctx.formats.weights import StoredWeights
from infctx.model.quantized import QuantizedLinear
from infctx.model.rwkv import RWKV
from infctx.plan.plan import Plan

COMPARED_SEGMENTS = 8
"""Each reads the file once."""

log = logging.getLogger(__name__)


def compare_before(plan: Plan, model: RWKV, readings: Mapping[str, Reading], watchdog: Watchdog | None) -> None:
    """Logs the comparison of a model that is about to learn, on the first rank; if it fails, there is a warning."""
    assert plan.weights is not None  # what is quantized comes from a file

    def at_work() -> None:
        if watchdog:
            watchdog.mark(0, None, "held-out loss")

    try:
        with model.alone():
            line = compare_with_stored(model, open_base(plan.weights), list(readings.values()), at_work)
    except UNMEASURABLE as error:
        log.warning("the loss of quantized weights could not be compared: %s", str(error).partition("\n")[0])
        return
    log.info("%s", line)


def compare_with_stored(
    model: RWKV, stored: StoredWeights, readings: Sequence[Reading], at_work: Callable[[], None] = lambda: None
) -> str:
    """Returns one line with both losses on the first segments of the first documents.

    stored: the file that the model was read from
    """
    some = [_first(reading, max(1, COMPARED_SEGMENTS // len(readings))) for reading in readings]

    def measure() -> list:
        return merge([each.buckets for reading in some for each in evaluate_reading(model, reading, at_work)])

    form = next(layer.form for layer in model.modules() if isinstance(layer, QuantizedLinear))
    quantized = total(measure())
    with _stored_matrices(model, stored):
        plain = total(measure())
    if not plain.num_tokens:
        return f"{form} weights: not compared with bf16, as the first held-out documents begin without targets"
    change = round(quantized.nats / plain.nats - 1, 3) if plain.nats else 0.0
    change += 0.0  # no minus before a zero
    return (
        f"{form} weights: loss {format_value(quantized)} {unit_of(quantized)}, with bf16 {format_value(plain)} "
        f"({change:+.1%}), on {plain.num_tokens:,} held-out tokens"
    )


def _first(reading: Reading, segments: int) -> Reading:
    """Returns the first segments of a reading."""
    tokens: dict[int, int] = {}
    for document, count in reading.tokens.items():
        here = min(segments, reading.num_segments(document))
        tokens[document] = min(count, here * reading.segment_tokens + 1)
        segments -= here
        if not segments:
            break
    return reading._replace(tokens=tokens)


@contextmanager
def _stored_matrices(model: RWKV, stored: StoredWeights) -> Iterator[None]:
    """A context in which quantized matrices are read from the file each time, in bf16."""
    names = stored_names(stored.sizes)
    quantized = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, layer in quantized.items():
        read = partial(stored.tensors.__getitem__, names[f"{name}.weight"])
        model.set_submodule(name, _StoredLinear(layer, read))
    try:
        yield
    finally:
        for name, layer in quantized.items():
            model.set_submodule(name, layer)


class _StoredLinear(torch.nn.Module):
    """y = x W^T, without gradients, with a W that is read each time."""

    def __init__(self, like: QuantizedLinear, read: Callable[[], Tensor]) -> None:
        super().__init__()
        self.read, self.device = read, like.codes.device

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read().to(self.device, torch.bfloat16).to(x.dtype))

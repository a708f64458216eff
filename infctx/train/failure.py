"""A loss or gradient that is not finite: where it came from, said so that the user can look there."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from infctx.data.lanes import Window
from infctx.model.rwkv import RWKV
from infctx.model.state import State


class TrainingFailed(RuntimeError):
    """The run can not go on; the message is one line for the user."""


def explain_failure(model: RWKV, carry: State, loss: Tensor, window: Window, step: int, checkpoint: Path | None) -> str:
    """One line with the step, the layer, the documents and the checkpoint that stays.

    carry: the state behind the window, (L, B, ...): a layer whose state is not finite is where the forward broke.
    """
    if not loss.isfinite():
        what, where = f"the loss is {loss.item()}", _first_layer_of(carry)
    else:
        what, where = "the gradient is not finite", _last_layer_of_gradient(model)
    bad_lanes = [lane for lane in range(carry.batch_size) if not _is_finite(carry.lanes(slice(lane, lane + 1)))]
    lanes = "; ".join(
        f"lane {lane}: {_numbers(documents)}"
        for lane, documents in enumerate(window.documents)
        if not bad_lanes or lane in bad_lanes
    )
    kept = f"the last checkpoint, {checkpoint}, is untouched" if checkpoint else "there is no checkpoint yet"
    return (
        f"step {step}: {what}, first in {where}; documents of the step: {lanes}; {kept}. "
        "Lower optimizer.peak_lr or look at these documents"
    )


def _first_layer_of(carry: State) -> str:
    for layer, parts in enumerate(carry.layers()):
        if not all(part.isfinite().all() for part in parts):
            return f"layer {layer}"
    return "the head"


def _last_layer_of_gradient(model: RWKV) -> str:
    """Gradients flow from the last layer to the first, so the last that is not finite is where it began."""
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    layers = [int(name.split(".")[1]) for name in bad if name.startswith("blocks.")]
    if any(name.startswith(("head.", "output_norm.")) for name in bad):
        return "the head"
    return f"layer {max(layers)}" if layers else "the embedding"


def _is_finite(state: State) -> bool:
    return all(bool(part.isfinite().all()) for part in state)


def _numbers(documents: list[int], most: int = 8) -> str:
    shown = ", ".join(str(number) for number in documents[:most])
    return shown + (f" and {len(documents) - most} more" if len(documents) > most else "")

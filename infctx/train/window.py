"""The window: the exact gradient over many segments, in the memory of one.

In: a window of tokens and the state before it; out: gradients in `.grad`, the loss, and the state after it.

Memory holds the activations of one segment only, so a window is computed twice.  The first pass goes forward without
gradients and keeps just the state at every seam between segments.  The second pass goes from the last segment to the
first and computes each again from its seam, now with gradients.  The segment after it has supplied the gradient of its
state_out, and one call gives the rest:

    backward(loss + <state_out, gradient of state_out>)   adds to the weights' gradients and gives that of state_in.

The gradient of state_in is the gradient of state_out for the segment before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from infctx.conventions import MASKED, START_SPACING
from infctx.errors import InputError
from infctx.machine import keep_freed_memory
from infctx.model.direct import adding_directly
from infctx.model.loss import Segment, SegmentLoss
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.recurrence.time_parallel import Received
from infctx.train.seams import Seams


class Backward(Protocol):
    """Makes the backward calls, with the sum of the losses multiplied by `scale`; alone: nothing else needs the
    gradients before they are whole."""

    scale: float

    @property
    def alone(self) -> bool: ...

    def enter(self, segment: int, doing: Literal["forward", "backward"]) -> None:
        """Announces the next pass over a segment (counted from 0): without gradients, or with a backward call."""

    def backward(self, scalar: Tensor) -> None:
        """Adds the gradient of the scalar to `.grad`."""


class PlainBackward:
    """Calls torch's own backward, on one device."""

    alone = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def enter(self, segment: int, doing: Literal["forward", "backward"]) -> None:
        pass

    def backward(self, scalar: Tensor) -> None:
        scalar.backward()


# Seven parameters: this is the public interface of `infctx`, and everything optional has a default.
def window_backward(
    model: RWKV,
    tokens: Tensor,
    targets: Tensor,
    segment_tokens: int,
    gradient_segments: int | None = None,
    starts: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Adds the exact gradient of a window's mean loss to `.grad`, in the memory of one segment.

    tokens:            (B, T) int64, any T
    targets:           (B, T) int64, the token that follows each one; -100 for no loss
    segment_tokens:    tokens in a segment; the gradient is the same for any length
    gradient_segments: cuts the window into stretches of this many segments: the gradient is exact within a stretch,
                       and none flows between them.  None: the whole window is one stretch; 1: truncated BPTT.
    starts:            (B, ceil(T / 16)) bool: a document starts at this 16-token boundary, from the initial state
                       (or the lane's, if model.compute.carry says so)
    state:             the state before the window; None: documents start at its first token, from the initial state.
                       If it requires gradients, it receives them.
    Returns the mean loss over the unmasked targets (0 if there are none) and the detached state after the window.
    Raises InputError for shapes that do not fit.
    """
    _check(tokens, targets, segment_tokens, gradient_segments, starts, model.sizes.vocab_size)
    if state is None:
        begin = torch.arange(_starts_shape(tokens)[1], device=tokens.device).expand(_starts_shape(tokens)) == 0
        starts = begin if starts is None else starts | begin
        state = model.initial_state(tokens.shape[0]).detach()  # read only where a lane carries it on
    num_targets = max(int((targets != MASKED).sum()), 1)
    segments = cut_window(tokens, targets, starts, segment_tokens)
    backward = PlainBackward(1 / num_targets)
    losses, state = backward_through_window(SegmentLoss(model), segments, state, backward, gradient_segments)
    return losses.sum() / num_targets, state


def backward_through_window(
    segment_loss: Callable[..., tuple[Tensor, State, Tensor]],
    segments: list[Segment],
    state: State,
    backward: Backward,
    gradient_segments: int | None = None,
    seam_store: str = "auto",
) -> tuple[Tensor, State]:
    """Does the work of window_backward, with one call of `backward` per segment.

    Returns the sum of the losses (unscaled) of each source (S,), and the state after the window, both detached.
    """
    if state.wkv.device.type == "cpu":
        keep_freed_memory()
    length = gradient_segments or len(segments)
    losses = torch.zeros((), device=state.wkv.device)
    for begin in range(0, len(segments), length):
        stretch = range(begin, min(begin + length, len(segments)))
        with adding_directly(backward.alone):
            here, state = _backward_through_stretch(segment_loss, segments, stretch, state, backward, seam_store)
        losses = losses + here
    return losses, state


def _backward_through_stretch(
    segment_loss: Callable[..., tuple[Tensor, State, Tensor]],
    segments: list[Segment],
    stretch: range,
    state: State,
    backward: Backward,
    seam_store: str,
) -> tuple[Tensor, State]:
    """Goes forward over a stretch of segments to fill the seams, then backward from the last segment to the first."""
    seams = Seams(stretch, state, seam_store)
    came_in = state
    with torch.no_grad():
        for index in stretch:
            received = Received()
            seams.put(index, state)
            if index < stretch[-1]:
                backward.enter(index, "forward")
                _, state, _ = segment_loss(segments[index]._replace(targets=None), state, received)
            seams.put_received(index, received)

    losses = torch.zeros((), device=came_in.wkv.device)
    last_state, gradient = None, None
    for index in reversed(stretch):
        backward.enter(index, "backward")
        state = seams.get(index).leaf()
        loss, next_state, by_source = segment_loss(segments[index], state, seams.get_received(index))
        if gradient is None:  # the last segment: no gradient comes from beyond it
            last_state = next_state.detach()
            gradient = State(*(torch.zeros_like(part) for part in last_state))
        backward.backward(loss * backward.scale + next_state.dot(gradient))
        gradient = state.gradient()
        losses = losses + by_source
    assert last_state is not None and gradient is not None  # a stretch has at least one segment
    if any(part.requires_grad for part in came_in):
        backward.backward(came_in.dot(gradient))
    return losses, last_state


# Eight parameters: a window has five parts now, and is cut in two ways.
def cut_window(
    tokens: Tensor,
    targets: Tensor,
    starts: Tensor | None,
    segment_tokens: int,
    time_rank: int = 0,
    time_ranks: int = 1,
    sources: Tensor | None = None,
    rows: Tensor | None = None,
) -> list[Segment]:
    """Cuts (B, T) into segments of `segment_tokens` without copying; the last may be shorter.

    time_rank, time_ranks: which slice of each segment to return, out of how many; slices have equal lengths, a multiple
                           of 16
    sources: (B, T) the number of each token's source, None for one
    rows:    (B, T) what the dropout of adapters is drawn from, None for no dropout
    """
    slice_tokens = segment_tokens // time_ranks
    assert time_ranks == 1 or (segment_tokens % (START_SPACING * time_ranks) == tokens.shape[1] % segment_tokens == 0)
    segments = []
    for begin in range(time_rank * slice_tokens, tokens.shape[1], segment_tokens):
        end = min(begin + slice_tokens, tokens.shape[1])
        here = None if starts is None else starts[:, -(-begin // START_SPACING) : -(-end // START_SPACING)]
        of, drawn = (None if part is None else part[:, begin:end] for part in (sources, rows))
        segments.append(Segment(tokens[:, begin:end], targets[:, begin:end], here, begin % START_SPACING, of, drawn))
    return segments


def _starts_shape(tokens: Tensor) -> tuple[int, int]:
    return tokens.shape[0], -(-tokens.shape[1] // START_SPACING)


def _check(
    tokens: Tensor,
    targets: Tensor,
    segment_tokens: int,
    gradient_segments: int | None,
    starts: Tensor | None,
    vocab_size: int,
) -> None:
    if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.shape != targets.shape:
        raise InputError(
            f"window_backward: tokens and targets must both be (B, T), T >= 1, not {tuple(tokens.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64 or ((targets < 0) & (targets != MASKED)).any() or targets.max() >= vocab_size:
        raise InputError(f"window_backward: targets must be int64, from 0 to {vocab_size - 1} or {MASKED} for masked")
    if segment_tokens < 1 or (gradient_segments is not None and gradient_segments < 1):
        raise InputError(
            f"window_backward: segment_tokens ({segment_tokens}) and gradient_segments ({gradient_segments}) "
            "must be at least 1"
        )
    if starts is not None and (starts.shape != _starts_shape(tokens) or starts.dtype != torch.bool):
        raise InputError(
            f"window_backward: starts must be bool {_starts_shape(tokens)}, one for each 16 tokens, "
            f"not {starts.dtype} {tuple(starts.shape)}"
        )

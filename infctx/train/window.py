"""The window: the exact gradient over many segments, in the memory of one.

In: a window of tokens and the state that came with it; out: gradients in `.grad`, the loss, the state behind it.

The document is long, so only one segment's activations are held.  Going forward without gradients, the state at
every seam is kept.  Going back from the last segment to the first, each is run again from its seam with gradients;
what later segments ask of a state comes in as its gradient, and what this one asks is handed to the one before:

    backward(loss + <state_out, gradient of state_out>)   gives the weights' part and the gradient of state_in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from infctx.conventions import MASKED, START_SPACING
from infctx.errors import InputError
from infctx.machine import keep_freed_memory
from infctx.model.loss import SegmentLoss
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.recurrence.time_parallel import Exchange, hand_out_told, stack_told

SEAM_STORES = ("auto", "device", "host")


class Backward(Protocol):
    """Who makes the backward calls."""

    def enter(self, segment: int, doing: str, ends_step: bool) -> None:
        """Says what comes next, counted from 0: the run of a segment without gradients ("forward"), or with them and
        with a backward call ("backward"), after which the optimizer steps if ends_step."""

    def backward(self, scalar: Tensor) -> None:
        """Adds the gradient of the scalar."""


class Segment(NamedTuple):
    """What SegmentLoss takes of a window, for one segment; offset is its place on the 16-token grid."""

    tokens: Tensor
    targets: Tensor
    starts: Tensor | None
    offset: int


def window_backward(
    model: RWKV,
    tokens: Tensor,
    targets: Tensor,
    segment_tokens: int,
    gradient_segments: int | None = None,
    starts: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Adds the gradient of the mean loss of a whole window to `.grad`, holding the activations of one segment.

    tokens:            (B, T) int64, any T
    targets:           (B, T) int64, the token that follows each; -100 = no loss there
    segment_tokens:    tokens of a segment; any length gives the same gradient
    gradient_segments: over how many segments a gradient flows: the window is cut into runs of so many segments with
                       the exact gradient in each and none between; None: the whole window, 1: truncated BPTT
    starts:            (B, ceil(T / 16)) bool: a document starts at this 16-token boundary, from the initial state
    state:             what came before the window; None: documents start at its first token, from the initial state.
                       If it requires gradients it receives them.
    Returns the mean loss over the unmasked targets (0 without any) and the detached state after the window.
    Raises InputError for shapes that do not fit.
    """
    _check(tokens, targets, segment_tokens, gradient_segments, starts, model.sizes.vocab_size)
    if state is None:
        begin = torch.arange(_starts_shape(tokens)[1], device=tokens.device).expand(_starts_shape(tokens)) == 0
        starts = begin if starts is None else starts | begin
        state = State(*(torch.zeros_like(part) for part in model.initial_state(tokens.shape[0])))
    num_targets = max(int((targets != MASKED).sum()), 1)
    segments = cut_window(tokens, targets, starts, segment_tokens)
    loss_sum, state = backward_through_window(
        SegmentLoss(model), segments, state, 1 / num_targets, PlainBackward(), gradient_segments
    )
    return loss_sum / num_targets, state


def backward_through_window(
    segment_loss: Callable[..., tuple[Tensor, State]],
    segments: list[Segment],
    state: State,
    scale: float,
    backward: Backward,
    gradient_segments: int | None = None,
    seam_store: str = "auto",
    ends_step: bool = True,
) -> tuple[Tensor, State]:
    """The work of window_backward, for whoever makes the backward calls.

    scale: what the sum of the losses is multiplied with, 1 / number of targets of the whole step.
    ends_step: whether the optimizer steps after this window, rather than after another group of lanes.
    Returns the sum of the losses (unscaled) and the state after the window, both detached.
    """
    if state.wkv.device.type == "cpu":
        keep_freed_memory()
    run = gradient_segments or len(segments)
    loss_sum = torch.zeros((), device=state.wkv.device)
    for begin in range(0, len(segments), run):
        last_run = ends_step and begin + run >= len(segments)
        chosen = range(begin, min(begin + run, len(segments)))
        loss, state = _backward_through_run(
            segment_loss, segments, chosen, state, scale, backward, seam_store, last_run
        )
        loss_sum = loss_sum + loss
    return loss_sum, state


def _backward_through_run(
    segment_loss: Callable[..., tuple[Tensor, State]],
    segments: list[Segment],
    chosen: range,
    state: State,
    scale: float,
    backward: Backward,
    seam_store: str,
    ends_step: bool,
) -> tuple[Tensor, State]:
    """Forward over the seams of the chosen segments, then backward over the segments, last first."""
    seams = Seams(chosen, state, seam_store)
    came_in = state
    with torch.no_grad():
        for index in chosen:
            exchanges: list[Exchange] = []
            seams.put(index, state)
            if index < chosen[-1]:
                backward.enter(index, "forward", False)
                tokens, _, starts, offset = segments[index]
                _, state = segment_loss(tokens, None, starts, state, offset, exchanges)
            seams.put_told(index, exchanges)

    loss_sum, behind, gradient = 0.0, None, None
    for index in reversed(chosen):
        backward.enter(index, "backward", ends_step and index == chosen[0])
        state = seams.get(index).leaf()
        loss, next_state = segment_loss(*segments[index][:3], state, segments[index].offset, seams.get_told(index))
        if behind is None:  # the last segment: nothing asks anything of its state, said with zeros
            behind = next_state.detach()
            gradient = State(*(torch.zeros_like(part) for part in behind))
        backward.backward(loss * scale + next_state.dot(gradient))
        gradient = state.gradient()
        loss_sum = loss_sum + loss.detach()
    if any(part.requires_grad for part in came_in):
        backward.backward(came_in.dot(gradient))
    return loss_sum, behind


def cut_window(
    tokens: Tensor,
    targets: Tensor,
    starts: Tensor | None,
    segment_tokens: int,
    time_rank: int = 0,
    time_ranks: int = 1,
) -> list[Segment]:
    """Cuts (B, T) into segments of `segment_tokens`, the last one perhaps shorter; no copies.

    time_rank of time_ranks: gives this slice of each segment; slices are of one length, a multiple of 16.
    """
    slice_tokens = segment_tokens // time_ranks
    assert time_ranks == 1 or (segment_tokens % (START_SPACING * time_ranks) == tokens.shape[1] % segment_tokens == 0)
    segments = []
    for begin in range(time_rank * slice_tokens, tokens.shape[1], segment_tokens):
        end = min(begin + slice_tokens, tokens.shape[1])
        here = None if starts is None else starts[:, -(-begin // START_SPACING) : -(-end // START_SPACING)]
        segments.append(Segment(tokens[:, begin:end], targets[:, begin:end], here, begin % START_SPACING))
    return segments


class Seams:
    """The states before some segments, in one block of memory: the device's, or the host's (pinned for a GPU); and what
    other ranks told in these segments, where time is shared over ranks.

    Copies to and from pinned memory are queued on the current stream, which keeps them in order.
    """

    def __init__(self, segments: range, like: State, store: str = "auto") -> None:
        self.segments, self.device = segments, like.wkv.device
        if store not in SEAM_STORES:
            raise InputError(f"seam_store: {store!r} is not known; choose {', '.join(SEAM_STORES)}")
        on_host = self.device.type != "cpu" and store != "device"
        pinned = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        self.where = pinned if on_host else {"device": self.device}
        self.blocks = State(*(self._block(part) for part in like))
        self.told: dict[str, Tensor] = {}
        self.exchanges: dict[int, list[Exchange]] = {}

    def put(self, index: int, state: State) -> None:
        for block, part in zip(self.blocks, state, strict=True):
            block[index - self.segments[0]].copy_(part.detach(), non_blocking=True)

    def get(self, index: int) -> State:
        return State(*(self._fetch(block, index) for block in self.blocks))

    def put_told(self, index: int, exchanges: list[Exchange]) -> None:
        """Takes over what was told in a segment."""
        for name, part in stack_told(exchanges).items():
            if name not in self.told:
                self.told[name] = self._block(part)
            self.told[name][index - self.segments[0]].copy_(part, non_blocking=True)
        hand_out_told(exchanges, {})
        self.exchanges[index] = exchanges

    def get_told(self, index: int) -> list[Exchange]:
        """The segment's exchanges, with what was told; an empty list if nothing was."""
        exchanges = self.exchanges.pop(index)
        if exchanges:
            hand_out_told(exchanges, {name: self._fetch(block, index) for name, block in self.told.items()})
        return exchanges

    def _block(self, like: Tensor) -> Tensor:
        return torch.empty((len(self.segments), *like.shape), dtype=like.dtype, **self.where)

    def _fetch(self, block: Tensor, index: int) -> Tensor:
        return block[index - self.segments[0]].to(self.device, non_blocking=True)


class PlainBackward:
    """Backward on one device, by torch itself."""

    def enter(self, segment: int, doing: str, ends_step: bool) -> None:
        pass

    def backward(self, scalar: Tensor) -> None:
        scalar.backward()


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

"""The model: tokens and a state in, hidden vectors and a state out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infctx.conventions import START_SPACING
from infctx.errors import InputError
from infctx.model.block import Block
from infctx.model.direct import keep_copies
from infctx.model.layers import Draws, Embedding, LayerNorm, Linear, LowRank
from infctx.model.sizes import Sizes
from infctx.model.state import State, refuse_other_sizes, stack_layers
from infctx.ops.precision import state_dtype
from infctx.recurrence.lane_segment import LaneLayerSegment, borders_of
from infctx.recurrence.layer_segment import LayerSegment
from infctx.recurrence.time_parallel import Received, SharedLayerSegment, TimeRanks


@dataclass(frozen=True)
class Compute:
    """How a model computes, apart from its sizes and weights.

    dtype:            of activations, None for the weights' dtype; state and decays stay fp32 (fp64 in an fp64 model)
    recompute_blocks: keeps only the inputs of the blocks and recomputes the rest in the backward pass
    backend:          of the WKV op, see `infctx.wkv`
    time_ranks:       the ranks that share a segment, each with a slice of it; None: this rank has the whole segment
    carry:            what documents start from: the initial state, or the state that their lane is in, detached
    """

    dtype: torch.dtype | None = None
    recompute_blocks: bool = False
    backend: str = "auto"
    time_ranks: TimeRanks | None = None
    carry: Literal["document", "lane"] = "document"


class InitialParts(NamedTuple):
    """The learned parameters of the initial state, as `State` without B; None for each part that is zeros."""

    wkv: nn.Parameter | None  # (L, H, N, N) key by value
    time_shift: nn.Parameter | None  # (L, D)
    channel_shift: nn.Parameter | None  # (L, D)


class RWKV(nn.Module):
    """RWKV-5, 6 or 7 (Eagle, Finch, Goose) by `sizes.version`; made by `infctx.load_model`, `infctx.build_model`."""

    def __init__(self, sizes: Sizes, compute: Compute = Compute()) -> None:  # noqa: B008  (frozen)
        super().__init__()
        self.sizes, self.compute = sizes, compute
        self.embedding = Embedding(sizes.vocab_size, sizes.width)
        self.embedding_norm = LayerNorm(sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, layer, compute.backend) for layer in range(sizes.num_layers))
        self.output_norm = LayerNorm(sizes.width)
        self.head = Linear(sizes.width, sizes.vocab_size)
        # The learned initial state: see InitialParts.
        self.initial_wkv: nn.Parameter | None = None
        self.initial_time_shift: nn.Parameter | None = None
        self.initial_channel_shift: nn.Parameter | None = None
        self.initial_units: State | None = None  # the units of these parameters; None: one
        self.draws = Draws()

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        starts: Tensor | None = None,
        received: Received | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Runs one segment, or with time_ranks this rank's slice of it.

        tokens:   (B, T) int64; any T >= 1, with time_ranks a multiple of 16 on every rank but the last
        state:    after the previous segment; None for the initial state (with time_ranks it must be given)
        starts:   (B, ceil(T / 16)) bool: a document starts at this 16-token boundary, from what Compute.carry says
        received: with time_ranks, keeps the values received in this segment; passed again, the segment is recomputed
                  and nothing is sent; None if it runs only once
        rows:     (B, T) int64: what the dropout of adapters is drawn from; None for no dropout
        Returns hidden (B, T, D), normalized for the head; and the state after the last token of the segment.
        """
        self._check(tokens, state, starts)
        keep_copies(not self.compute.recompute_blocks)
        initial = self.initial_state(tokens.shape[0]) if state is None or self._learns_start(starts) else None
        segments = self._layer_segments(starts, initial if self._learns_start(starts) else None, received)
        state = initial if state is None else state
        assert state is not None
        x = self.embedding_norm(self._embed(tokens))  # (B, T, D)
        layers, first_value = [], None
        for block, layer, segment in zip(self.blocks, state.layers(), segments, strict=True):
            run = block if rows is None else partial(self._run_with, rows, block)
            if self.compute.recompute_blocks and torch.is_grad_enabled():
                x, layer, first_value = checkpoint(run, x, layer, segment, first_value, use_reentrant=False)
            else:
                x, layer, first_value = run(x, layer, segment, first_value)
            layers.append(layer)
        return self.output_norm(x), stack_layers(layers)

    def _run_with(self, rows: Tensor, block: nn.Module, *inputs: Any) -> Any:
        """Runs a block with dropout; a recomputation in the backward pass comes here too, and draws the same."""
        with self._drawing(rows):
            return block(*inputs)

    @contextmanager
    def _drawing(self, rows: Tensor | None) -> Iterator[None]:
        self.draws.rows = rows
        try:
            yield
        finally:
            self.draws.rows = None

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeds (B, T) -> (B, T, D), in the dtype of the activations."""
        try:
            embedded = self.embedding(tokens)
        except IndexError:  # only on a CPU: checking ids on a GPU would wait for it at each segment
            vocab_size = self.sizes.vocab_size
            outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
            raise InputError(
                f"model: token {int(outside[0])} is outside the vocabulary of {vocab_size:,} ids; use the tokenizer "
                "that goes with the model"
            ) from None
        embedded = embedded.to(self.compute.dtype or self.embedding.weight.dtype)
        adapter = self.embedding.adapter
        return embedded if adapter is None else adapter(tokens, embedded, self.embedding.matrix)

    def _learns_start(self, starts: Tensor | None) -> bool:
        from_initial = starts is not None and self.compute.carry == "document"
        return from_initial and any(part is not None for part in self.initial_parts())

    def _layer_segments(
        self, starts: Tensor | None, initial: State | None, received: Received | None
    ) -> list[LayerSegment]:
        """Returns the segment of each block, for its recurrence; initial: None for zeros."""
        firsts = [None] * len(self.blocks) if initial is None else initial.layers()
        ranks = self.compute.time_ranks
        if self.compute.carry == "lane" and starts is not None:
            borders = borders_of(starts)
            return [LaneLayerSegment(starts, borders) for _ in firsts]
        if ranks is None:
            return [LayerSegment(starts, first) for first in firsts]
        received = Received() if received is None else received
        return [SharedLayerSegment(starts, first, ranks, received.of_layer(n)) for n, first in enumerate(firsts)]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Makes this rank run whole segments by itself, without the other time ranks, while the context is open."""
        compute, self.compute = self.compute, replace(self.compute, time_ranks=None)
        try:
            yield
        finally:
            self.compute = compute

    def _check(self, tokens: Tensor, state: State | None, starts: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0 or tokens.dtype != torch.int64:
            raise InputError(f"model: tokens must be int64 (B, T), T >= 1, not {tokens.dtype} {tuple(tokens.shape)}")
        batch, num_tokens = tokens.shape
        borders = (batch, -(-num_tokens // START_SPACING))
        if starts is not None and (starts.shape != borders or starts.dtype != torch.bool):
            raise InputError(f"model: starts must be bool {borders}, not {starts.dtype} {tuple(starts.shape)}")
        if state is None and self.compute.time_ranks is not None:
            raise InputError(
                "model: with time_ranks the state before the segment must be given; pass zeros with a start"
            )
        wanted = (self.sizes.num_layers, batch, self.sizes.width)
        if state is not None and state.time_shift.shape != wanted:
            raise InputError(f"model: the state has (L, B, D) = {tuple(state.time_shift.shape)}, not {wanted}")

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns (B, T, D) -> (B, T, V), for inspection: training applies the head in slices, inside the loss.

        rows: see `forward`
        """
        with self._drawing(rows):
            return self.head(hidden)

    def head_adapter(self, hidden: Tensor, rows: Tensor | None = None) -> LowRank | None:
        """Returns what the head's adapter makes of the head's product with hidden (B, T, D); None without an adapter.

        rows: see `forward`
        """
        if self.head.adapter is None:
            return None
        with self._drawing(rows):
            return self.head.adapter.low_rank(hidden, self.head.matrix)

    def initial_state(self, batch_size: int) -> State:
        """Returns the state that documents start from: zeros, or the learned one expanded over B, with its gradient."""
        weight = self.embedding.weight
        zeros = State.zeros(self.sizes, batch_size, state_dtype(weight.dtype), weight.device)
        parts = zip(zeros, self.initial_parts(), self._units(), strict=True)
        return State(
            *(z if part is None else (part.to(z.dtype) * unit)[:, None].expand_as(z) for z, part, unit in parts)
        )

    def initial_parts(self) -> InitialParts:
        """Returns the learned parameters of the initial state, in `initial_units`; None for each part that is zeros."""
        return InitialParts(self.initial_wkv, self.initial_time_shift, self.initial_channel_shift)

    def _units(self) -> tuple[Tensor | int, ...]:
        return self.initial_units or (1, 1, 1)

    def learned_state(self) -> State | None:
        """Returns the learned initial state of one document (B = 1), detached; None if the model has none."""
        return None if self.initial_wkv is None else self.initial_state(1).detach()

    def add_initial_state(self, shifts: bool = False) -> InitialParts:
        """Adds an initial state to learn, zeros at first, if the model has none; returns its parameters.

        shifts: adds the two shift vectors too
        """
        zeros = State.zeros(self.sizes, 1, state_dtype(self.embedding.weight.dtype), self.embedding.weight.device)
        wanted = ("wkv", "time_shift", "channel_shift") if shifts else ("wkv",)
        for name in wanted:
            if getattr(self, f"initial_{name}") is None:
                setattr(self, f"initial_{name}", nn.Parameter(getattr(zeros, name)[:, 0].clone()))
        return self.initial_parts()

    @torch.no_grad()
    def set_initial_state(self, state: State) -> None:
        """Makes every document start from a state (B = 1), such as one from `infctx.load_state`.

        Shift vectors that are zeros add no parameters.  Raises InputError for other sizes.
        """
        refuse_other_sizes(state, self.sizes, "set_initial_state")
        parts = self.add_initial_state(shifts=bool(state.time_shift.any() or state.channel_shift.any()))
        for mine, given, unit in zip(parts, state, self._units(), strict=True):
            if mine is not None:
                mine.copy_(given[:, 0] / unit)

    def set_initial_units(self, units: State) -> None:
        """Scales the initial state's parameters to units, so that one learning rate suits all; the state is unchanged.

        units: wkv (L, H, N or 1, 1), time_shift and channel_shift (L, D or 1); powers of two change no bit
        """
        state = self.initial_state(1)
        self.initial_units = units
        self.set_initial_state(state.detach())

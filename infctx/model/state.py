"""State: everything that crosses a seam."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from infctx.errors import InputError
from infctx.model.sizes import Sizes
from infctx.recurrence.layer_segment import LayerState


class State(NamedTuple):
    """The model's memory of the tokens before a segment, layers stacked; fp32, or fp64 in an fp64 model.

    wkv:           (L, B, H, N, N) the matrices, key channel by value channel
    time_shift:    (L, B, D) last normalised input of each time mix
    channel_shift: (L, B, D) last normalised input of each channel mix
    """

    wkv: Tensor
    time_shift: Tensor
    channel_shift: Tensor

    @classmethod
    def zeros(cls, sizes: Sizes, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> State:
        shift = (sizes.num_layers, batch_size, sizes.width)
        matrices = (sizes.num_layers, batch_size, sizes.num_heads, sizes.head_size, sizes.head_size)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for shape in (matrices, shift, shift)))

    @property
    def batch_size(self) -> int:
        return self.wkv.shape[1]

    def detach(self) -> State:
        return State(*(part.detach() for part in self))

    def leaf(self) -> State:
        """Returns the same values as leaves of a new graph that collect gradients; shares memory."""
        return State(*(part.detach().requires_grad_() for part in self))

    def gradient(self) -> State:
        """Returns the gradients that the leaves have collected, zeros for those without any."""
        return State(*(torch.zeros_like(part) if part.grad is None else part.grad for part in self))

    def dot(self, other: State) -> Tensor:
        """Returns the sum of the products of all elements, a scalar."""
        return cast(Tensor, sum((mine * its).sum() for mine, its in zip(self, other, strict=True)))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> State:
        return State(*(part.to(device=device, dtype=dtype) for part in self))

    def lanes(self, chosen: slice) -> State:
        """Returns the state of some lanes; shares memory."""
        return State(*(part[:, chosen] for part in self))

    @classmethod
    def join_lanes(cls, states: list[State]) -> State:
        """Joins the states of groups of lanes into one."""
        return cls(*(torch.cat(parts, dim=1) for parts in zip(*states, strict=True)))

    def layers(self) -> list[LayerState]:
        """Returns the state of each layer; by unbind, whose backward is one stack."""
        return [LayerState(*parts) for parts in zip(*(part.unbind(0) for part in self), strict=True)]


def describe_state(state: State) -> str:
    """Describes the sizes of a state: 24 layers with 32 heads of 64."""
    layers, _, heads, size, _ = state.wkv.shape
    return f"{layers} layers with {heads} heads of {size}"


def refuse_other_sizes(state: State, sizes: Sizes, place: object) -> None:
    """Raises InputError, one line that begins with `place`, if a state (B = 1) does not have these sizes."""
    wanted = State.zeros(sizes, 1, state.wkv.dtype, "meta")
    if state.batch_size != 1:
        raise InputError(f"{place}: the state has {state.batch_size} documents; choose one: state.lanes(slice(0, 1))")
    if [part.shape for part in state] != [part.shape for part in wanted]:
        raise InputError(
            f"{place}: the state has {describe_state(state)}, the model {describe_state(wanted)}; "
            "use one tuned on this model"
        )


def stack_layers(layers: list[LayerState]) -> State:
    """Inverts `State.layers`."""
    return State(*(torch.stack(parts) for parts in zip(*layers, strict=True)))

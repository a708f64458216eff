"""One block: time mix and channel mix, each after a layer norm and a residual connection."""

from __future__ import annotations

from torch import Tensor, nn

from infctx.model.channel_mix import ChannelMix
from infctx.model.layers import LayerNorm
from infctx.model.sizes import Sizes
from infctx.model.time_mix import TimeMix
from infctx.recurrence.layer_segment import LayerSegment, LayerState


class Block(nn.Module):
    """Computes x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    def __init__(self, sizes: Sizes, backend: str) -> None:
        super().__init__()
        self.time_norm = LayerNorm(sizes.width)
        self.time_mix = TimeMix(sizes, backend)
        self.channel_norm = LayerNorm(sizes.width)
        self.channel_mix = ChannelMix(sizes)

    def forward(self, x: Tensor, state: LayerState, segment: LayerSegment) -> tuple[Tensor, LayerState]:
        """x (B, T, D), the layer's state -> both after the segment."""
        # ZeRO-3 notices the beginning and end of a block's backward pass by the tensors among its inputs and outputs.
        # x and the state are enough; the tensors in `segment` need not be visible.
        change, wkv, time_shift = self.time_mix(self.time_norm(x), state.wkv, state.time_shift, segment)
        x = x + change
        change, channel_shift = self.channel_mix(self.channel_norm(x), state.channel_shift, segment)
        return x + change, LayerState(wkv, time_shift, channel_shift)

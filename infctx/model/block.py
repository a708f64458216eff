"""One block: time mix and channel mix, each after a layer norm and a residual connection."""

from __future__ import annotations

from torch import Tensor, nn

from infctx.model.channel_mix import ChannelMix, UngatedChannelMix
from infctx.model.delta_time_mix import DeltaTimeMix
from infctx.model.layers import LayerNorm
from infctx.model.sizes import Sizes
from infctx.model.time_mix import TimeMix
from infctx.recurrence.layer_segment import LayerSegment, LayerState


class Block(nn.Module):
    """Computes x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    def __init__(self, sizes: Sizes, layer: int, backend: str) -> None:
        super().__init__()
        is_goose = sizes.version == 7
        self.time_norm = LayerNorm(sizes.width)
        self.time_mix = DeltaTimeMix(sizes, layer == 0, backend) if is_goose else TimeMix(sizes, backend)
        self.channel_norm = LayerNorm(sizes.width)
        self.channel_mix = UngatedChannelMix(sizes) if is_goose else ChannelMix(sizes)

    def forward(
        self, x: Tensor, state: LayerState, segment: LayerSegment, first_value: Tensor | None
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """x (B, T, D), the layer's state -> both after the segment.

        first_value: (B, T, D) the values of the first block, which RWKV-7 passes from block to block; None before it
        """
        # ZeRO-3 notices the beginning and end of a block's backward pass by the tensors among its inputs and outputs.
        # x, first_value and the state are enough; the tensors in `segment` need not be visible.
        normalized = self.time_norm(x)
        change, wkv, time_shift, first_value = self.time_mix(
            normalized, state.wkv, state.time_shift, segment, first_value
        )
        x = x + change
        change, channel_shift = self.channel_mix(self.channel_norm(x), state.channel_shift, segment)
        return x + change, LayerState(wkv, time_shift, channel_shift), first_value

"""One block: time mix and channel mix, each behind a layer norm and a residual connection."""

from __future__ import annotations

from torch import Tensor, nn

from infctx.model.channel_mix import ChannelMix
from infctx.model.layers import LayerNorm
from infctx.model.sizes import Sizes
from infctx.model.time_mix import TimeMix
from infctx.recurrence.time_parallel import Exchange

LayerState = tuple[Tensor, Tensor, Tensor]
"""(wkv (B, H, N, N), time_shift (B, D), channel_shift (B, D)) of one layer."""


class Block(nn.Module):
    """x + time_mix(norm(x)), then x + channel_mix(norm(x))."""

    def __init__(self, sizes: Sizes, backend: str) -> None:
        super().__init__()
        self.time_norm = LayerNorm(sizes.width)
        self.time_mix = TimeMix(sizes, backend)
        self.channel_norm = LayerNorm(sizes.width)
        self.channel_mix = ChannelMix(sizes)

    def forward(
        self,
        x: Tensor,
        state: LayerState,
        starts: Tensor | None,
        initial: LayerState | None,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, LayerState]:
        """x (B, T, D) and the layer's state -> the same after the segment; exchange: where x is a slice of it."""
        wkv, time_shift, channel_shift = state
        first_wkv, first_time_shift, first_channel_shift = initial or (None, None, None)
        change, wkv, time_shift = self.time_mix(
            self.time_norm(x), wkv, time_shift, starts, first_wkv, first_time_shift, exchange
        )
        x = x + change
        change, channel_shift = self.channel_mix(
            self.channel_norm(x), channel_shift, starts, first_channel_shift, exchange
        )
        return x + change, (wkv, time_shift, channel_shift)

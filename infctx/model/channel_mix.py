"""Channel mix: the feed-forward half of a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from infctx.cpu import fused
from infctx.model.layers import Linear
from infctx.model.sizes import Sizes
from infctx.recurrence.layer_segment import LayerSegment
from infctx.recurrence.token_shift import blend


def squared_relu(x: Tensor) -> Tensor:
    """Returns relu(x)^2; x: (B, T, F)."""
    return fused.squared_relu(x) if fused.fits(x) else _SquaredRelu.apply(x)


class _SquaredRelu(torch.autograd.Function):
    """relu(x)^2 in fewer passes over memory than two separate ops; gradient 2 relu(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


class ChannelMix(nn.Module):
    """RWKV-5, RWKV-6: sigmoid(W_r x_r) * (W_v relu(W_k x_k)^2), with x_k, x_r between a token's input and the last.

    RWKV-5 stores the weight mu of the current input, RWKV-6 the weight 1 - mu of the previous one.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.weighs_current = sizes.version == 5
        self.mix_key = nn.Parameter(torch.empty(1, 1, width))
        self.mix_receptance = nn.Parameter(torch.empty(1, 1, width))
        self.key = Linear(width, sizes.ffn_width)
        self.receptance = Linear(width, width)
        self.value = Linear(sizes.ffn_width, width)

    def forward(self, x: Tensor, shift: Tensor, segment: LayerSegment) -> tuple[Tensor, Tensor]:
        """x (B, T, D), the state's shift vector (B, D) -> output (B, T, D) and the vector to pass on."""
        before, shift = segment.token_shift("channel_shift", x, shift)
        origin, other = (before, x) if self.weighs_current else (x, before)
        x_k, x_r = blend(origin, other - origin, torch.stack([self.mix_key, self.mix_receptance]).to(x.dtype))
        k = squared_relu(self.key(x_k))  # (B, T, F)
        return torch.sigmoid(self.receptance(x_r)) * self.value(k), shift


class UngatedChannelMix(nn.Module):
    """RWKV-7: W_v relu(W_k x_k)^2, with x_k between a token's input and the one before."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.mix_key = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.key = Linear(sizes.width, sizes.ffn_width)
        self.value = Linear(sizes.ffn_width, sizes.width)

    def forward(self, x: Tensor, shift: Tensor, segment: LayerSegment) -> tuple[Tensor, Tensor]:
        """See `ChannelMix.forward`."""
        before, shift = segment.token_shift("channel_shift", x, shift)
        (x_k,) = blend(x, before - x, self.mix_key[None].to(x.dtype))
        return self.value(squared_relu(self.key(x_k))), shift

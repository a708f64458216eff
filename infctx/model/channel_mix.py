"""Channel mix: the feed-forward half of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infctx.model.layers import Linear
from infctx.model.sizes import Sizes
from infctx.model.token_shift import token_shift


class ChannelMix(nn.Module):
    """sigmoid(W_r x_r) * (W_v relu(W_k x_k)^2), with x_k and x_r between a token's input and the one before.

    RWKV-5 stores the weight mu of the current input, RWKV-6 the weight 1 - mu of the one before.
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

    def forward(
        self, x: Tensor, shift: Tensor, starts: Tensor | None, initial_shift: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) and the state's shift vector (B, D) -> (B, T, D) and the vector to hand on."""
        before, shift = token_shift(x, shift, starts, initial_shift)
        origin, other = (before, x) if self.weighs_current else (x, before)
        difference = other - origin
        x_k = torch.addcmul(origin, difference, self.mix_key.to(x.dtype))
        x_r = torch.addcmul(origin, difference, self.mix_receptance.to(x.dtype))
        k = torch.relu(self.key(x_k)).square()  # (B, T, F)
        return torch.sigmoid(self.receptance(x_r)) * self.value(k), shift

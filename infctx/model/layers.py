"""The layers all blocks are made of: weights are cast to the dtype of what comes in, and nowhere else."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T, computed in the dtype of x."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer norm with eps 1e-5, computed in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class HeadNorm(nn.GroupNorm):
    """Group norm over each head's channels with eps 64e-5, which is eps 1e-5 on y / 8, as RWKV-5 writes it."""

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__(num_heads, width, eps=64e-5)

    def forward(self, y: Tensor) -> Tensor:
        rows = y.reshape(-1, self.num_channels)  # (B * T, D)
        rows = F.group_norm(rows, self.num_groups, self.weight.to(y.dtype), self.bias.to(y.dtype), self.eps)
        return rows.view(*y.shape[:2], -1)

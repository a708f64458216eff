"""The layers that all blocks consist of.  Weights are cast to the dtype of the input here, and nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Computes y = x W^T in the dtype of x."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer norm with eps 1e-5, computed in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class HeadNorm(nn.Module):
    """Group norm over each head's channels with eps 64e-5, which is eps 1e-5 on y / 8, as RWKV-5 writes it.

    Computed as a layer norm of each head, which is faster than torch's group norm on a CPU.
    """

    eps = 64e-5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, y: Tensor) -> Tensor:
        """(B, T, H, N) -> (B, T, D)."""
        normalised = F.layer_norm(y, y.shape[-1:], eps=self.eps).flatten(2)
        return torch.addcmul(self.bias.to(y.dtype), normalised, self.weight.to(y.dtype))

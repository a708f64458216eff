"""The layers that all blocks consist of.  Weights are cast to the dtype of the input here, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infctx.model.direct import adds_directly, copy_of, gradient_dtype
from infctx.ops.precision import state_dtype

LARGE = 1 << 16
"""Numbers of a matrix: below this, a pass over its gradient takes less time than a Function in Python."""

Matrix = Callable[[torch.dtype], Tensor]
"""Returns W in a dtype."""


class LowRank(NamedTuple):
    """What an adapter makes of a product y (..., O): factors (y + scale rows columns^T).

    rows:    (..., r)
    columns: (O, r)
    factors: (O); None for ones
    """

    rows: Tensor
    columns: Tensor
    scale: float
    factors: Tensor | None = None

    def detach(self) -> LowRank:
        """Returns the same without gradients."""
        factors = None if self.factors is None else self.factors.detach()
        return LowRank(self.rows.detach(), self.columns.detach(), self.scale, factors)


class Beside(nn.Module):
    """An adapter beside a matrix; infctx/adapters has its forms."""

    def low_rank(self, x: Tensor, matrix: Matrix) -> LowRank:
        """x (..., I) -> what to add to x W^T; matrix: of W."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, matrix: Matrix) -> Tensor:
        """x (..., I), y = x W^T (..., O) -> y with the adapter (..., O)."""
        rows, columns, scale, factors = self.low_rank(x, matrix)
        rows, columns = rows.to(y.dtype).flatten(0, -2), columns.to(y.dtype)
        y = torch.addmm(y.flatten(0, -2), rows, columns.T, alpha=scale).view_as(y)
        return y if factors is None else y * factors.to(y.dtype)


class Linear(nn.Linear):
    """Computes y = x W^T in the dtype of x; an `adapter`, if there is one, adds its term."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.adapter: Beside | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.adapter is None else self.adapter(x, y, self.matrix)

    def product(self, x: Tensor) -> Tensor:
        """Returns x W^T (..., outputs) for x (..., inputs), without the adapter."""
        # .grad of a bf16 weight may be fp32: then its product is not what is added.
        whole = self.weight.dtype == gradient_dtype(self.weight)
        large = self.weight.numel() >= LARGE
        if large and torch.is_grad_enabled() and whole and adds_directly(self.weight):
            return _Product.apply(x, self.weight)
        if large and self.weight.requires_grad and not torch.is_grad_enabled():
            return F.linear(x, copy_of(self.weight, x.dtype))
        if self.weight.requires_grad or self.weight.dtype == x.dtype:
            return F.linear(x, self.matrix(x.dtype))
        return FrozenProduct.apply(x, self)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Returns W (outputs, inputs), without the adapter."""
        return self.weight.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T, whose backward pass adds the gradient of W to `.grad`, see `direct`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        matrix = copy_of(weight, x.dtype)
        ctx.weight = weight
        ctx.save_for_backward(x, matrix)
        return F.linear(x, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, matrix), total = ctx.saved_tensors, ctx.weight.grad
        dx = gradient @ matrix if ctx.needs_input_grad[0] else None
        left, right = gradient.flatten(0, -2).T, x.flatten(0, -2)
        if total is None:
            return dx, left @ right
        if total.dtype == x.dtype:
            total.addmm_(left, right)
        else:
            total += left @ right
        return dx, None


class FrozenProduct(torch.autograd.Function):
    """x W^T for a matrix that does not learn and is not kept in the dtype of x.

    W is made anew in the backward pass, so only one layer's copy exists at any time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear) -> Tensor:
        ctx.layer = layer  # not its tensors: ZeRO-3 replaces them between the passes
        return F.linear(x, layer.matrix(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.matrix(gradient.dtype), None


class Draws:
    """What the dropout of a model's adapters is drawn from while its blocks run.

    rows: a number for each token (B, T) int64; None outside of training: there is no dropout
    """

    rows: Tensor | None = None


class Embedding(nn.Embedding):
    """A table of vectors, whose gradient is summed in fp32 if it is bf16: a segment has many tokens of the same id.

    adapter: what the model adds to the vectors in the dtype that it computes in
    """

    def __init__(self, num_vectors: int, width: int) -> None:
        super().__init__(num_vectors, width)
        self.adapter: Beside | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        special = self.weight.dtype == torch.bfloat16 or adds_directly(self.weight)
        return _Lookup.apply(self.weight, tokens) if special else super().forward(tokens)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Returns the table, a vector a column: the matrix W (D, V) of which a lookup is the product with x, where one
        of V inputs is 1."""
        return self.weight.to(dtype).T


class _Lookup(torch.autograd.Function):
    """weight[tokens], with the gradient of the weight in at least fp32; see `direct`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_vectors, ctx.direct = len(weight), weight if adds_directly(weight) else None
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:  # frozen
            return None, None
        if ctx.direct is not None and ctx.direct.grad is not None:  # only its tokens' rows
            total = ctx.direct.grad
            total.index_add_(0, tokens.flatten(), gradient.flatten(0, 1).to(total.dtype))
            return None, None
        precise = gradient.to(state_dtype(gradient.dtype))
        return torch.ops.aten.embedding_dense_backward(precise, tokens, ctx.num_vectors, -1, False), None


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

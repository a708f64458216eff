"""Time mix of RWKV-7: the recurrent half of a block, whose state follows a delta rule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infctx.cpu import fused
from infctx.model.layers import HeadNorm, Linear
from infctx.model.sizes import Sizes
from infctx.ops.precision import state_dtype
from infctx.recurrence.layer_segment import LayerSegment
from infctx.recurrence.token_shift import blend

FASTEST_DECAY = -math.exp(-0.5)
"""The lowest log decay: a token leaves at least 0.545 of every channel."""
MIXED = ("receptance", "decay", "key", "value", "rate", "gate")
"""The six blends of a token's vector and the one before."""
SHORTEST = 1e-12
"""Below this length a key is divided by it instead, so that zeros stay zeros."""


class DeltaTimeMix(nn.Module):
    """W_o ((head_norm(WKV7(r, w, k, v, -kappa, alpha kappa)) + (r . bonus k) v) g)   (arXiv 2503.14456, section 4).

    kappa is the direction in which a token first removes what the state holds, and alpha the rate: how much of it.
    Every block but the first blends its values with those of the first block, which come in as `first_value`.
    `first_value`, `first_value_down` and `first_value_up` make the weights of that blend; in the first block they
    exist if the file had them (`sizes.keeps_first_blend`), learn nothing, and are written back.
    """

    def __init__(self, sizes: Sizes, is_first: bool, backend: str) -> None:
        super().__init__()
        width, self.head_size, self.backend, self.is_first = sizes.width, sizes.head_size, backend, is_first
        for name in MIXED:
            setattr(self, f"mix_{name}", _vector(width))
        self.decay, self.decay_down, self.decay_up = _vector(width), *_low_rank(width, sizes.decay_rank)
        self.rate, self.rate_down, self.rate_up = _vector(width), *_low_rank(width, sizes.rate_rank)
        if not is_first or sizes.keeps_first_blend:
            self.first_value, self.first_value_down, self.first_value_up = (
                part.requires_grad_(not is_first) for part in (_vector(width), *_low_rank(width, sizes.value_rank))
            )
        self.gate_down, self.gate_up = _low_rank(width, sizes.gate_rank)
        self.removal_scale, self.key_rate = _vector(width), _vector(width)
        self.bonus = nn.Parameter(torch.empty(sizes.num_heads, sizes.head_size))
        self.receptance = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.output = Linear(width, width)
        self.head_norm = HeadNorm(width)

    def forward(
        self, x: Tensor, state: Tensor, shift: Tensor, segment: LayerSegment, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, D), state (B, H, N, N), shift (B, D), first_value (B, T, D) or None in the first block
        -> output (B, T, D), state and shift to pass on, first_value."""
        before, shift = segment.token_shift("time_shift", x, shift)
        mixes = torch.cat([getattr(self, f"mix_{name}") for name in MIXED])
        x_r, x_w, x_k, x_v, x_a, x_g = blend(x, before - x, mixes[:, None].to(x.dtype))
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        decay = _product(torch.tanh(_product(x_w, self.decay_down)), self.decay_up)
        rate = _product(_product(x_a, self.rate_down), self.rate_up)
        gate = _product(torch.sigmoid(_product(x_g, self.gate_down)), self.gate_up)
        share = None
        if first_value is not None:
            share = _product(_product(x_v, self.first_value_down), self.first_value_up)
        if self.backend in ("auto", "compiled") and fused.fits(x):
            make_inputs, gated = self._fused_inputs, self._fused_output
        else:
            make_inputs, gated = self._inputs, self._output
        r, (w, k, mixed, a, b) = self._heads(r), make_inputs(k, v, decay, rate, first_value, share)
        y, state = segment.wkv7(r, w, k, mixed, a, b, state, self.backend)
        return self.output(gated(y, r, k, mixed, gate)), state, shift, v if first_value is None else first_value

    def _fused_inputs(
        self, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, first_value: Tensor | None, share: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Does what `_inputs` does in one pass over memory."""
        k, v, decay, rate = map(self._heads, (k, v, decay, rate))
        vectors = (self.decay, self.rate, self.removal_scale, self.key_rate)
        scaled = tuple(part.view(self.bonus.shape).to(k.dtype) for part in vectors)
        if first_value is None or share is None:
            w, k, a, b = fused.delta_inputs((k, decay, rate), scaled, FASTEST_DECAY, None)
            return w, k, v, a, b
        base = self.first_value.view(self.bonus.shape).to(k.dtype)
        values = v, self._heads(first_value), self._heads(share), base
        w, k, a, b, v = fused.delta_inputs((k, decay, rate), scaled, FASTEST_DECAY, values)
        return w, k, v, a, b

    def _fused_output(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Does what `_output` does in one pass over memory."""
        norm, bonus = self.head_norm, self.bonus.to(y.dtype)
        weight, bias = (part.view(bonus.shape).to(y.dtype) for part in (norm.weight, norm.bias))
        return fused.delta_output((y, r, k, v, self._heads(gate)), (weight, bias, bonus), norm.eps).flatten(2)

    def _inputs(
        self, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, first_value: Tensor | None, share: Tensor | None
    ) -> tuple[Tensor, ...]:
        """(B, T, D), decay, rate and share without their bases -> w, k, v, a, b for the op (B, T, H, N)."""
        precise = state_dtype(k.dtype)  # a log decay in bf16 would forget documents at the wrong speed
        w = FASTEST_DECAY * torch.sigmoid(self.decay.to(precise) + decay.to(precise))
        rate = torch.sigmoid(self.rate.to(k.dtype) + rate)
        if first_value is not None and share is not None:
            v = torch.lerp(v, first_value, torch.sigmoid(self.first_value.to(k.dtype) + share))
        scale, key_rate = (part.view(self.bonus.shape).to(k.dtype) for part in (self.removal_scale, self.key_rate))
        w, k, v, rate = map(self._heads, (w, k, v, rate))
        k, a, b = _Removal.apply(k, rate, scale, key_rate)
        return w, k, v, a, b

    def _output(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """What the op returns and its inputs (B, T, H, N), the gate (B, T, D) -> the gated output (B, T, D)."""
        own = (r * (k * self.bonus.to(k.dtype))).sum(-1, keepdim=True)  # what r finds of the token at hand
        return torch.addcmul(self._heads(self.head_norm(y)), own, v).flatten(2) * gate

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_size))  # (B, T, H, N)


class _Removal(torch.autograd.Function):
    """k (1 + (rate - 1) key_rate), -kappa and rate kappa, with kappa = k scale / |k scale|; its backward makes half as
    many passes over memory as autograd's and keeps half as much."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, rate: Tensor, scale: Tensor, key_rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, rate (B, T, H, N); scale, key_rate (H, N)."""
        a = k * -scale
        length = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        a /= length.clamp_min(SHORTEST)
        ctx.save_for_backward(k, rate, scale, key_rate, a, length)
        return k * torch.addcmul(1 - key_rate, rate, key_rate), a, (a * rate).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_key: Tensor, d_a: Tensor, d_b: Tensor) -> tuple[Tensor | None, ...]:
        k, rate, scale, key_rate, a, length = ctx.saved_tensors
        d_a = torch.addcmul(d_a, d_b, rate, value=-1)
        along = (d_a * a).sum(-1, keepdim=True).masked_fill_(length < SHORTEST, 0)
        d_scaled = d_a.addcmul_(along, a, value=-1).div_(length.clamp_min(SHORTEST))  # of -k scale
        d_factor = d_key * k
        d_rate = torch.addcmul(d_factor * key_rate, d_b, a, value=-1)
        d_k = d_key * torch.addcmul(1 - key_rate, rate, key_rate)
        d_k.addcmul_(d_scaled, scale, value=-1)
        if not ctx.needs_input_grad[2]:  # frozen
            return d_k, d_rate, None, None
        return d_k, d_rate, -(d_scaled.mul_(k)).sum((0, 1)), d_factor.mul_(rate - 1).sum((0, 1))


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, width))


def _low_rank(width: int, rank: int | None) -> tuple[nn.Parameter, nn.Parameter]:
    assert rank is not None
    return nn.Parameter(torch.empty(width, rank)), nn.Parameter(torch.empty(rank, width))


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix.to(x.dtype)

"""Time mix of RWKV-5 and RWKV-6: the recurrent half of a block.  They differ only in the two mixing modules here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infctx.model.layers import HeadNorm, Linear
from infctx.model.sizes import Sizes
from infctx.recurrence.layer_segment import LayerSegment
from infctx.recurrence.token_shift import blend


class TimeMix(nn.Module):
    """W_o (head_norm(WKV(r, k, v, w, u)) * silu(g))   (arXiv 2404.05892, section 4)."""

    mixing: StaticMixing | DataDependentMixing

    def __init__(self, sizes: Sizes, backend: str) -> None:
        super().__init__()
        width, self.head_size, self.backend = sizes.width, sizes.head_size, backend
        self.mixing = StaticMixing(sizes) if sizes.version == 5 else DataDependentMixing(sizes)
        self.bonus = nn.Parameter(torch.empty(sizes.num_heads, sizes.head_size))
        self.receptance = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.gate = Linear(width, width)
        self.head_norm = HeadNorm(width)
        self.output = Linear(width, width)

    def forward(
        self, x: Tensor, state: Tensor, shift: Tensor, segment: LayerSegment, first_value: None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """x (B, T, D), state (B, H, N, N), shift (B, D) -> output (B, T, D), state and shift to pass on.

        first_value: for RWKV-7 alone
        """
        before, shift = segment.token_shift("time_shift", x, shift)
        x_r, x_k, x_v, x_g, w = self.mixing(x, before)
        r, k, v, w = (
            z.unflatten(2, (-1, self.head_size))  # (B, T, H, N)
            for z in (self.receptance(x_r), self.key(x_k), self.value(x_v), w)
        )
        y, state = segment.wkv(r, k, v, w.to(state.dtype), self.bonus, state, self.backend)
        y = self.head_norm(y)  # (B, T, D)
        gate = self.gate(x_g)
        return self.output(y * torch.nn.functional.silu(gate)), state, shift, first_value


class StaticMixing(nn.Module):
    """RWKV-5: each input is a fixed blend of a token's vector and the previous one; the decay is constant."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.mix_receptance, self.mix_key, self.mix_value, self.mix_gate = (
            nn.Parameter(torch.empty(1, 1, sizes.width)) for _ in range(4)
        )
        self.decay = nn.Parameter(torch.empty(sizes.num_heads, sizes.head_size))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, T, D), (B, T, D) -> x_r, x_k, x_v, x_g and the log decay, expanded over T, each (B, T, D)."""
        mixes = torch.stack([self.mix_receptance, self.mix_key, self.mix_value, self.mix_gate]).to(x.dtype)
        log_decay = -torch.exp(_precise(self.decay))
        x_r, x_k, x_v, x_g = blend(before, x - before, mixes)
        return x_r, x_k, x_v, x_g, log_decay.flatten().expand(x.shape)


class DataDependentMixing(nn.Module):
    """RWKV-6: blends and decays depend on the token, by two low-rank products."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        assert sizes.mix_rank is not None and sizes.decay_rank is not None
        self.mix_inner, self.mix_decay, self.mix_key, self.mix_value, self.mix_receptance, self.mix_gate = (
            nn.Parameter(torch.empty(1, 1, width)) for _ in range(6)
        )
        self.mix_down = nn.Parameter(torch.empty(width, 5 * sizes.mix_rank))
        self.mix_up = nn.Parameter(torch.empty(5, sizes.mix_rank, width))
        self.decay = nn.Parameter(torch.empty(1, 1, width))
        self.decay_down = nn.Parameter(torch.empty(width, sizes.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(sizes.decay_rank, width))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, T, D), (B, T, D) -> x_r, x_k, x_v, x_g and the log decay, each (B, T, D)."""
        difference = before - x
        inner = torch.addcmul(x, difference, self.mix_inner.to(x.dtype))
        low = torch.tanh(inner @ self.mix_down.to(x.dtype))  # (B, T, 5 M)
        low = low.flatten(0, 1).unflatten(1, (5, -1)).transpose(0, 1)  # (5, B * T, M)
        vectors = (self.mix_decay, self.mix_key, self.mix_value, self.mix_receptance, self.mix_gate)
        bases = torch.cat([vector.view(1, 1, -1) for vector in vectors]).to(x.dtype)  # (5, 1, D)
        mixes = torch.baddbmm(bases, low, self.mix_up.to(x.dtype)).unflatten(1, x.shape[:2])  # (5, B, T, D)
        x_w, x_k, x_v, x_r, x_g = blend(x, difference, mixes)
        change = torch.tanh(x_w @ self.decay_down.to(x.dtype)) @ self.decay_up.to(x.dtype)
        return x_r, x_k, x_v, x_g, -torch.exp(_precise(self.decay) + _precise(change))


def _precise(x: Tensor) -> Tensor:
    """Returns x in at least fp32: a log decay in bf16 would forget documents at the wrong speed."""
    return x if x.dtype == torch.float64 else x.float()

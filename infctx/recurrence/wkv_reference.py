"""The WKV recurrence as defined: a plain loop over time.  Every other form is checked against this one."""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.conventions import START_SPACING


def wkv_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, starts: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `infctx.wkv`; computes in the dtype of `state`."""
    dtype = state.dtype
    y = []
    for t in range(r.shape[1]):
        if starts is not None and t % START_SPACING == 0:
            begins = starts[:, t // START_SPACING, None, None, None]
            state = torch.where(begins, torch.zeros_like(state) if initial is None else initial, state)
        r_t, k_t, v_t, w_t = (x[:, t].to(dtype) for x in (r, k, v, w))  # (B, H, N)
        kv = k_t[..., :, None] * v_t[..., None, :]  # (B, H, N, N)
        y.append(torch.einsum("bhi,bhij->bhj", r_t, state + u.to(dtype)[..., None] * kv))
        state = torch.exp(w_t)[..., None] * state + kv
    return torch.stack(y, dim=1).to(r.dtype), state

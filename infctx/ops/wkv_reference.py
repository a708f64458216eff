"""The WKV recurrences as defined: plain loops over time.  Every other form is checked against these."""

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
        state = _begin(state, t, starts, initial)
        r_t, k_t, v_t, w_t = (x[:, t].to(dtype) for x in (r, k, v, w))  # (B, H, N)
        kv = k_t[..., :, None] * v_t[..., None, :]  # (B, H, N, N)
        y.append(torch.einsum("bhi,bhij->bhj", r_t, state + u.to(dtype)[..., None] * kv))
        state = torch.exp(w_t)[..., None] * state + kv
    return torch.stack(y, dim=1).to(r.dtype), state


def wkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `infctx.wkv7`; computes in the dtype of `state`."""
    y = []
    for t in range(r.shape[1]):
        state = _begin(state, t, starts, initial)
        r_t, w_t, k_t, v_t, a_t, b_t = (x[:, t].to(state.dtype) for x in (r, w, k, v, a, b))  # (B, H, N)
        u = torch.einsum("bhi,bhij->bhj", a_t, state)
        written = k_t[..., :, None] * v_t[..., None, :] + b_t[..., :, None] * u[..., None, :]  # (B, H, N, N)
        state = torch.exp(w_t)[..., None] * state + written
        y.append(torch.einsum("bhi,bhij->bhj", r_t, state))
    return torch.stack(y, dim=1).to(r.dtype), state


def _begin(state: Tensor, t: int, starts: Tensor | None, initial: Tensor | None) -> Tensor:
    """Returns the state before token t: another one if a document starts there."""
    if starts is None or t % START_SPACING:
        return state
    begins = starts[:, t // START_SPACING, None, None, None]
    return torch.where(begins, torch.zeros_like(state) if initial is None else initial, state)

"""Compares the CUDA kernels with plain torch on this device, once, before they are trusted.

Nobody may have run the kernels on this GPU, driver or compiler before.  A small problem that covers everything takes
milliseconds; a wrong gradient would take weeks to notice.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.conventions import START_SPACING
from infctx.cuda.wkv7_cuda import wkv7_cuda
from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.ops.wkv_chunked import wkv7_chunked, wkv_chunked

NUM_TOKENS = 182
"""Three spans, and a last chunk that is not whole."""

NAMES = {
    "wkv": ("y", "state", "r", "k", "v", "w", "u", "first state", "initial"),
    "wkv7": ("y", "state", "r", "w", "k", "v", "a", "b", "first state", "initial"),
}


def find_disagreement(device: torch.device | str, dtype: torch.dtype, channels: int, op: str = "wkv") -> str | None:
    """Returns where the kernels differ from plain torch in fp64, with the relative error; None if they agree.

    Rounding is 2e-3 for bf16 results, less than 1e-5 for fp32.  The caller's modes have no effect: autocast, inference
    mode and checkpoint hooks belong to a thread, so the check runs in a separate one, and TF32 does not affect fp64.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_compare, device, dtype, channels, op).result()


def _compare(device: torch.device | str, dtype: torch.dtype, channels: int, op: str) -> str | None:
    kernels, plain = (wkv_cuda, wkv_chunked) if op == "wkv" else (wkv7_cuda, wkv7_chunked)
    inputs, starts, cotangents = _problem(device, dtype, channels, op)
    found = _run(kernels, inputs, starts, cotangents)
    expected = _run(plain, [x.double() for x in inputs], starts, [x.double() for x in cotangents])
    for name, x, truth in zip(NAMES[op], found, expected, strict=True):
        allowed = 1e-2 if x.dtype == torch.bfloat16 else 1e-4
        error = float((x.double() - truth).norm() / truth.norm())
        if not error <= allowed:
            what = name if name in ("y", "state") else f"the gradient of {name}"
            return f"{what} differs by {error:.1e} of its size, and {allowed:.0e} is allowed"
    return None


def _problem(
    device: torch.device | str, dtype: torch.dtype, channels: int, op: str
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, to: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, to)

    tokens, matrix = (1, NUM_TOKENS, 1, channels), (1, 1, channels, channels)
    r, k, v = (draw(*tokens, to=dtype) for _ in range(3))
    w = -torch.exp(draw(*tokens) - 2)
    if op == "wkv":
        inputs = [r, k, v, w, draw(1, channels)]
    else:
        direction = F.normalize(draw(*tokens), dim=-1)
        inputs = [r, w, k, v, -direction.to(dtype), (direction * torch.sigmoid(draw(*tokens))).to(dtype)]
    inputs += [draw(*matrix), draw(*matrix)]
    starts = torch.zeros(1, -(-NUM_TOKENS // START_SPACING), dtype=torch.bool, device=device)
    starts[0, 5] = True
    return inputs, starts, [draw(*tokens, to=dtype), draw(*matrix)]


def _run(op, inputs: list[Tensor], starts: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    *others, initial = leaves
    outputs = op(*others, starts, initial)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]

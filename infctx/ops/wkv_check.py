"""Compares the CUDA kernels with plain torch on this device, once, before they are trusted.

Nobody may have run the kernels on this GPU, driver or compiler before.  A small problem that covers everything takes
milliseconds; a wrong gradient would take weeks to notice.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from infctx.conventions import START_SPACING
from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.ops.wkv_chunked import wkv_chunked

NUM_TOKENS = 150
"""Three spans, and a last chunk that is not whole."""

NAMES = ("y", "state", "r", "k", "v", "w", "u", "first state", "initial")


def find_disagreement(device: torch.device | str, dtype: torch.dtype, channels: int) -> str | None:
    """Returns where the kernels differ from plain torch in fp64, with the relative error; None if they agree.

    Rounding is 2e-3 for bf16 results, less than 1e-5 for fp32.  The caller's modes have no effect: autocast, inference
    mode and checkpoint hooks belong to a thread, so the check runs in a separate one, and TF32 does not affect fp64.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_compare, device, dtype, channels).result()


def _compare(device: torch.device | str, dtype: torch.dtype, channels: int) -> str | None:
    inputs, starts, cotangents = _problem(device, dtype, channels)
    found = _run(wkv_cuda, inputs, starts, cotangents)
    expected = _run(wkv_chunked, [x.double() for x in inputs], starts, [x.double() for x in cotangents])
    for name, x, truth in zip(NAMES, found, expected, strict=True):
        allowed = 1e-2 if x.dtype == torch.bfloat16 else 1e-4
        error = float((x.double() - truth).norm() / truth.norm())
        if not error <= allowed:
            what = name if name in NAMES[:2] else f"the gradient of {name}"
            return f"{what} differs by {error:.1e} of its size, and {allowed:.0e} is allowed"
    return None


def _problem(
    device: torch.device | str, dtype: torch.dtype, channels: int
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, to: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, to)

    tokens, matrix = (1, NUM_TOKENS, 1, channels), (1, 1, channels, channels)
    r, k, v = (draw(*tokens, to=dtype) for _ in range(3))
    inputs = [r, k, v, -torch.exp(draw(*tokens) - 2), draw(1, channels), draw(*matrix), draw(*matrix)]
    starts = torch.zeros(1, -(-NUM_TOKENS // START_SPACING), dtype=torch.bool, device=device)
    starts[0, 5] = True
    return inputs, starts, [draw(*tokens, to=dtype), draw(*matrix)]


def _run(op, inputs: list[Tensor], starts: Tensor, cotangents: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    *others, initial = leaves
    outputs = op(*others, starts, initial)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]

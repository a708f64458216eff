"""Quantized weights as numbers in one pass over memory, compiled for the CPU by numba.

`infctx.model.quantized` has the same in plain torch, for other devices; results are equal bit for bit, with any number
of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.cpu.threads import share_out

BLOCKS_AT_ONCE = 256
"""Blocks that a thread takes at least: about 10 us."""


def fits(codes: Tensor) -> bool:
    """Returns whether `dequantize` takes these codes."""
    return codes.device.type == "cpu"


def dequantize(codes: Tensor, steps: Tensor, values: Tensor, weights: Tensor) -> None:
    """Writes weight i = value of code i * step of its block into `weights`.

    codes:   int8 (n), whose values are the codes; or uint8 (n / 2, rounded up), two codes of 4 bits a byte, the upper
             first
    steps:   fp32, one for each block of 64 weights
    values:  fp32 (16), of each code of 4 bits
    weights: fp32, fp64 or bf16 (n), contiguous; bf16 is rounded to nearest, ties to even
    """
    from infctx.cpu import dequantize_kernels  # numba is imported at the first use, not with infctx

    out = weights.view(torch.uint16) if weights.dtype == torch.bfloat16 else weights
    if codes.dtype == torch.int8:
        values = values[:0]
    arrays = [array.detach().numpy() for array in (codes.view(torch.uint8), steps, values, out)]
    function = dequantize_kernels.compiled(arrays[-1].dtype)
    pieces = -(-len(steps) // BLOCKS_AT_ONCE)
    share_out(function, [*arrays, BLOCKS_AT_ONCE], pieces, torch.get_num_threads())

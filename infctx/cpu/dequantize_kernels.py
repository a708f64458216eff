"""The kernels of `dequantize`: each call takes groups of `group` blocks, from `first` to `last`."""

import functools
from collections.abc import Callable

import numpy as np
from numba import njit, types

from infctx.cpu.wkv_kernels import build

BLOCK = 64
"""Weights that share a step."""


@functools.cache
def compiled(weights: np.dtype) -> Callable[..., None]:
    """Returns the kernel for fp32, fp64 or uint16 (bf16) weights."""
    weight = getattr(types, weights.name)[::1]
    signature = (types.uint8[::1], types.float32[::1], types.float32[::1], weight, types.intp)
    return build(_to_bf16 if weights == np.uint16 else _to_float, signature, ())


def _to_float(version: str) -> Callable[..., None]:
    def to_float(codes, steps, values, weights, group, first, last):
        _ = version
        exact = np.empty(BLOCK, np.float32)
        for block in range(first * group, min(last * group, len(steps))):
            expand(codes, steps[block], values, block, exact)
            begin = block * BLOCK
            if begin + BLOCK <= len(weights):
                for place in range(BLOCK):
                    weights[begin + place] = exact[place]
            else:
                for place in range(len(weights) - begin):
                    weights[begin + place] = exact[place]

    return to_float


def _to_bf16(version: str) -> Callable[..., None]:
    def to_bf16(codes, steps, values, weights, group, first, last):
        _ = version
        exact = np.empty(BLOCK, np.float32)
        bits, low = exact.view(np.uint32), np.empty(BLOCK, np.uint16)
        for block in range(first * group, min(last * group, len(steps))):
            expand(codes, steps[block], values, block, exact)
            for place in range(BLOCK):  # to nearest, ties to even
                odd = (bits[place] >> np.uint32(16)) & np.uint32(1)
                low[place] = (bits[place] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            begin = block * BLOCK
            if begin + BLOCK <= len(weights):
                weights[begin : begin + BLOCK] = low
            else:
                weights[begin:] = low[: len(weights) - begin]

    return to_bf16


@njit
def expand(codes, step, values, block, exact):
    """Writes the weights of a block; beyond the last code, anything.  No values: each code is its own, int8."""
    if len(values) == 0:
        begin = block * BLOCK
        if begin + BLOCK <= len(codes):
            for place in range(BLOCK):
                exact[place] = np.float32(np.int8(codes[begin + place])) * step
        else:
            for place in range(len(codes) - begin):
                exact[place] = np.float32(np.int8(codes[begin + place])) * step
        return
    half = block * (BLOCK // 2)
    for pair in range(min(BLOCK // 2, len(codes) - half)):
        code = codes[half + pair]
        exact[2 * pair] = values[code >> 4] * step
        exact[2 * pair + 1] = values[code & 15] * step

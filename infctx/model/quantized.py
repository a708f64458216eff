"""Quantized matrices of frozen weights: a matrix in; codes of 8 or 4 bits and a scale for each block of 64 out.

int8  code * scale / 127, codes -127 to 127                    8.25 bits a weight
nf4   value of the code * scale, 16 values, two codes a byte   4.25 bits a weight (arXiv 2305.14314)

A block is 64 weights of the matrix, row after row; its scale is the largest magnitude among them, in bf16, so exact for
weights published in bf16.  Blocks, not rows, for int8 too: in a row, one large weight makes all others coarse (the
error in a small trained model: 0.59 %, against 0.70 %).
The layers are ours because bitsandbytes computes with other kernels, and other bits, on each kind of device, and
torchao's nf4 is a prototype that asks for rows of certain sizes.
"""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from infctx.cpu import dequantize as compiled
from infctx.errors import InputError
from infctx.model.layers import FrozenProduct, Linear
from infctx.model.rwkv import RWKV

Form: TypeAlias = Literal["int8", "nf4"]
FrozenDtype: TypeAlias = Literal["bf16"] | Form
"""How to keep the matrices of weights that do not learn (`ModelSettings.frozen_dtype`)."""

BLOCK = 64
"""Weights that share a scale."""

QUANTIZED_BITS = {"int8": 8 + 16 / BLOCK, "nf4": 4 + 16 / BLOCK}
"""Bits of a weight in each form."""

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values of nf4 (arXiv 2305.14314, appendix E)."""

AT_ONCE = 1 << 22
"""Weights to convert at once in plain torch: 30 MB on the way."""


class QuantizedLinear(Linear):
    """y = x W^T with a quantized W that does not learn; W is made anew for each product, forward and backward."""

    def __init__(self, inputs: int, outputs: int, form: Form) -> None:
        with torch.device("meta"):
            super().__init__(inputs, outputs)
        del self.weight
        self.form, count = form, inputs * outputs
        is_int8 = form == "int8"
        codes = torch.empty(count if is_int8 else -(-count // 2), dtype=torch.int8 if is_int8 else torch.uint8)
        scales = torch.empty(-(-count // BLOCK), dtype=torch.bfloat16)
        # Parameters, not buffers: DDP would send buffers to all ranks in every segment.
        self.codes, self.scales = (nn.Parameter(part, requires_grad=False) for part in (codes, scales))

    def product(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Returns W (outputs, inputs): computed in fp32, then cast."""
        weights = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        expand = compiled.dequantize if compiled.fits(self.codes) else dequantize
        expand(self.codes, self.steps(), nf4_values(self.codes.device), weights.view(-1))
        return weights

    def steps(self) -> Tensor:
        """Returns the factor of each block's codes or values, in fp32."""
        return self.scales.float() / 127 if self.form == "int8" else self.scales.float()


def quantize_layers(model: RWKV, form: Form) -> None:
    """Replaces the matrices of all blocks by quantized ones, which do not learn."""
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, Linear):
            with layer.weight.device:
                quantized = QuantizedLinear(layer.in_features, layer.out_features, form)
            if not layer.weight.is_meta:
                quantized.load_state_dict(quantize(layer.weight.detach(), form))
            model.blocks.set_submodule(name, quantized)


def quantize(matrix: Tensor, form: Form) -> dict[str, Tensor]:
    """Returns codes and scales, on the same device; the same bits on every device.

    Raises InputError for values that are not finite.
    """
    values = nf4_values(matrix.device)
    middles = (values[1:] + values[:-1]) / 2
    codes, scales = [], []
    for some in matrix.flatten().split(AT_ONCE):
        blocks = nn.functional.pad(some.float(), (0, -len(some) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1).to(torch.bfloat16)
        shares = blocks / scale.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]  # -1 to 1
        if form == "int8":
            code = (shares * 127).round_().clamp_(-127, 127).to(torch.int8).flatten()
        else:
            code = torch.bucketize(shares, middles, out_int32=True).to(torch.uint8).view(-1, 2)
            code = (code[:, 0] << 4) | code[:, 1]
        codes.append(code)
        scales.append(scale)
    whole = torch.cat(scales)
    if not whole.isfinite().all():
        raise InputError("has values that are not finite")
    count = matrix.numel() if form == "int8" else -(-matrix.numel() // 2)
    return {"codes": torch.cat(codes)[:count].clone(), "scales": whole}


def dequantize(codes: Tensor, steps: Tensor, values: Tensor, weights: Tensor) -> None:
    """Does what `infctx.cpu.dequantize` does, on any device; the definition that it is compared with."""
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)  # (256, 2), of each byte
    for begin in range(0, len(weights), AT_ONCE):
        some = weights[begin : begin + AT_ONCE]
        if codes.dtype == torch.int8:
            exact = codes[begin : begin + AT_ONCE].float()
        else:
            exact = pairs.index_select(0, codes[begin // 2 : (begin + AT_ONCE) // 2].int()).flatten()
        if len(some) % BLOCK:
            exact = nn.functional.pad(exact[: len(some)], (0, -len(some) % BLOCK))
        blocks = exact.view(-1, BLOCK)
        blocks *= steps[begin // BLOCK : (begin + AT_ONCE) // BLOCK, None]
        some.copy_(blocks.view(-1)[: len(some)])


@functools.cache
def nf4_values(device: torch.device) -> Tensor:
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)

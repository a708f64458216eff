"""AdamW's moments of a parameter in either form, fp32 or 8 bits, and from one to the other.

exp_avg                the mean of gradients
exp_avg_sq             the mean of squared gradients; in 8 bits its root, which is what AdamW divides by
exp_avg_scales, ...    in 8 bits: the scales of each block
step                   how many steps there were
"""

from __future__ import annotations

import torch
from torch import Size, Tensor

from infctx.optimizers.eight_bits import BLOCK, dequantize, quantize, zero_code

SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments, and whether they have a sign."""

MOMENTS = tuple(SIGNED)
"""Adam's state of a parameter, each of its shape; Adam also counts steps."""


def scales_of(moment: str) -> str:
    """Returns the name of a moment's scales."""
    return f"{moment}_scales"


PARTS = (*MOMENTS, *map(scales_of, MOMENTS), "step")
"""Everything that either form can have."""


def no_moments(like: Tensor, eight_bits: bool) -> dict[str, Tensor]:
    """Returns the moments of a parameter before its first step: zeros, made in their form."""
    steps = {"step": torch.zeros(())}
    if not eight_bits:
        return {name: torch.zeros_like(like, dtype=torch.float32) for name in MOMENTS} | steps
    codes = {
        name: torch.full_like(like, zero_code(signed), dtype=torch.uint8, requires_grad=False)
        for name, signed in SIGNED.items()
    }
    scales = [torch.zeros(-(-like.numel() // BLOCK), device=like.device) for _ in MOMENTS]
    return codes | dict(zip(map(scales_of, MOMENTS), scales, strict=True)) | steps


def in_eight_bits(moments: dict[str, Tensor]) -> bool:
    return moments[MOMENTS[0]].dtype == torch.uint8


def to_eight_bits(moments: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Returns the same moments in 8 bits."""
    if in_eight_bits(moments):
        return moments
    found = dict(moments)
    for name, signed in SIGNED.items():
        root = moments[name] if signed else moments[name].sqrt()
        codes, found[scales_of(name)] = quantize(root.flatten(), signed, generator)
        found[name] = codes.view(root.shape)
    return found


def to_fp32(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the same moments in fp32; in fp64 if they are."""
    if not in_eight_bits(moments):
        return moments
    found = {"step": moments["step"]}
    for name, signed in SIGNED.items():
        codes = moments[name]
        root = dequantize(codes.flatten(), moments[scales_of(name)], signed).view(codes.shape)
        found[name] = root if signed else root.square()
    return found


def are_moments(found: dict[str, Tensor], shape: Size, dtype: torch.dtype) -> bool:
    """Returns whether these are the moments of a parameter, in either form.

    shape: of the parameter
    dtype: of moments that are not in 8 bits
    """
    scales = torch.Size([-(-shape.numel() // BLOCK)])
    full = {name: (shape, dtype) for name in MOMENTS}
    small = {name: (shape, torch.uint8) for name in MOMENTS}
    small |= {scales_of(name): (scales, torch.float32) for name in MOMENTS}
    steps = {"step": (torch.Size(), torch.float32)}
    has = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
    return has in (full | steps, small | steps) and 0 < found["step"].item() < float("inf")

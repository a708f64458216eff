"""Prints the table of errors in infctx/cuda/README.md: the CUDA kernels of WKV on the emulator, against float64.

    python tools/wkv_errors.py                           a few minutes; the emulator needs g++
    python tools/wkv_errors.py --tokens 256 --seeds 1
    python tools/wkv_errors.py --op wkv7                 the table of RWKV-7

Relative RMS; in parentheses that of `wkv_chunked`, plain torch in fp32, same inputs.  One lane, two heads of 64,
all tensors standard normal.  Decays: official is the initialisation of RWKV-6, ordinary -exp(z - 2), extreme -exp(3 z),
slow -exp(z - 7), with z normal; in RWKV-7 official is a decay within its bound.  There a is minus a unit vector, and b
that vector times rates in 0..1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# The emulator belongs to the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import torch
from torch import Tensor

from infctx.cuda.wkv7_cuda import wkv7_cuda
from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.ops.wkv_chunked import wkv7_chunked, wkv_chunked
from infctx.ops.wkv_reference import wkv7_reference, wkv_reference

from wkv_emulated import emulated

HEADS, CHANNELS = 2, 64
OFFICIAL = -6 + 5 * torch.linspace(0, 1, CHANNELS) ** 1.35  # of the middle layer
DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "official": lambda z: -torch.exp(OFFICIAL + 0.1 * z),
    "ordinary": lambda z: -torch.exp(z - 2),
    "extreme": lambda z: -torch.exp(3 * z),
    "slow": lambda z: -torch.exp(z - 7),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--seeds", type=int, default=2, help="of which the mean is taken")
    parser.add_argument("--op", choices=OPS, default="wkv")
    options = parser.parse_args(arguments)
    op = OPS[options.op]
    print(f"| relative RMS | {' | '.join(op.columns)} |")
    print(f"|---{'|---' * len(op.columns)}|")
    for dtype in (torch.bfloat16, torch.float32):
        for num_tokens in options.tokens:
            for decay in DECAYS:
                found = torch.tensor([errors(op, decay, dtype, num_tokens, seed) for seed in range(options.seeds)])
                ours, torchs = (op.pick(row) for row in found.mean(0).tolist())
                cells = [f"{mine:.1e} ({its:.1e})" for mine, its in zip(ours, torchs, strict=True)]
                name = "RWKV-7, " if options.op == "wkv7" else ""
                name += f"{str(dtype).removeprefix('torch.')}, {decay}, T {num_tokens}"
                print(f"| {' | '.join([name, *cells])} |".replace("e-0", "e-"), flush=True)


def errors(op: Op, decay: str, dtype: torch.dtype, num_tokens: int, seed: int) -> list[list[float]]:
    """Returns the errors of the kernels and of plain torch: y, S_T, then the gradients in the order of the op."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    tokens, matrix = (1, num_tokens, HEADS, CHANNELS), (1, HEADS, CHANNELS, CHANNELS)
    r, k, v = (draw(*tokens).to(dtype) for _ in range(3))
    w = DECAYS[decay](draw(*tokens))
    if op is OPS["wkv"]:
        inputs = [r, k, v, w, draw(HEADS, CHANNELS), draw(*matrix)]
    else:
        if decay == "official":
            w = -0.6065 * torch.sigmoid(draw(*tokens))
        direction, rates = torch.nn.functional.normalize(draw(*tokens), dim=-1), torch.sigmoid(draw(*tokens))
        inputs = [r, w, k, v, -direction.to(dtype), (direction * rates).to(dtype), draw(*matrix)]
    cotangents = [draw(*tokens).to(dtype), draw(*matrix)]

    def run(op: Callable[..., tuple[Tensor, Tensor]], cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [cast(x).clone().requires_grad_() for x in inputs]
        outputs = op(*leaves, None, None)
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, [cast(x) for x in cotangents])]

    truth = run(op.definition, lambda x: x.double())
    with emulated():
        ours = run(op.kernels, lambda x: x)
    torchs = run(op.plain, lambda x: x)
    return [[float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)] for found in (ours, torchs)]


class Op(NamedTuple):
    """The forms of an op, the table's columns, and how they follow from the errors of y, S_T and the gradients."""

    kernels: Callable[..., tuple[Tensor, Tensor]]
    plain: Callable[..., tuple[Tensor, Tensor]]
    definition: Callable[..., tuple[Tensor, Tensor]]
    columns: tuple[str, ...]
    pick: Callable[[Sequence[float]], list[float]]


OPS = {
    "wkv": Op(
        wkv_cuda,
        wkv_chunked,
        wkv_reference,
        ("y", "S_T", "worst of dr dk dv", "dw", "du", "dS_0"),
        lambda row: [row[0], row[1], max(row[2:5]), *row[5:]],
    ),
    "wkv7": Op(
        wkv7_cuda,
        wkv7_chunked,
        wkv7_reference,
        ("y", "S_T", "worst of dr dk dv", "worst of da db", "dw", "dS_0"),
        lambda row: [row[0], row[1], max(row[2], row[4], row[5]), max(row[6:8]), row[3], row[8]],
    ),
}


if __name__ == "__main__":
    main()

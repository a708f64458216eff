"""Prints the table of errors in infctx/cuda/README.md: the CUDA kernels of WKV on the emulator, against float64.

    python tools/wkv_errors.py                           a few minutes; the emulator needs g++
    python tools/wkv_errors.py --tokens 256 --seeds 1

Relative RMS; in parentheses that of `wkv_chunked`, plain torch in fp32, same inputs.  One lane, two heads of 64,
all tensors standard normal.  Decays: official is the initialisation of RWKV-6, ordinary -exp(z - 2), extreme -exp(3 z),
slow -exp(z - 7), with z normal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# The emulator belongs to the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import torch
from torch import Tensor

from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.ops.wkv_chunked import wkv_chunked
from infctx.ops.wkv_reference import wkv_reference

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
    options = parser.parse_args(arguments)
    print("| relative RMS | y | S_T | worst of dr dk dv | dw | du | dS_0 |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for num_tokens in options.tokens:
            for decay in DECAYS:
                found = torch.tensor([errors(decay, dtype, num_tokens, seed) for seed in range(options.seeds)])
                ours, torchs = (columns(row) for row in found.mean(0).tolist())
                cells = [f"{mine:.1e} ({its:.1e})" for mine, its in zip(ours, torchs, strict=True)]
                name = f"{str(dtype).removeprefix('torch.')}, {decay}, T {num_tokens}"
                print(f"| {' | '.join([name, *cells])} |".replace("e-0", "e-"), flush=True)


def errors(decay: str, dtype: torch.dtype, num_tokens: int, seed: int) -> list[list[float]]:
    """Returns the errors of the kernels and of plain torch: y, S_T, dr, dk, dv, dw, du, dS_0."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    tokens, matrix = (1, num_tokens, HEADS, CHANNELS), (1, HEADS, CHANNELS, CHANNELS)
    r, k, v = (draw(*tokens).to(dtype) for _ in range(3))
    inputs = [r, k, v, DECAYS[decay](draw(*tokens)), draw(HEADS, CHANNELS), draw(*matrix)]
    cotangents = [draw(*tokens).to(dtype), draw(*matrix)]

    def run(op: Callable[..., tuple[Tensor, Tensor]], cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [cast(x).clone().requires_grad_() for x in inputs]
        outputs = op(*leaves, None, None)
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, [cast(x) for x in cotangents])]

    truth = run(wkv_reference, lambda x: x.double())
    with emulated():
        ours = run(wkv_cuda, lambda x: x)
    torchs = run(wkv_chunked, lambda x: x)
    return [[float((x - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)] for found in (ours, torchs)]


def columns(row: Sequence[float]) -> list[float]:
    """Returns the table's columns: y, S_T, the worst of dr, dk and dv, then dw, du, dS_0."""
    return [row[0], row[1], max(row[2:5]), *row[5:]]


if __name__ == "__main__":
    main()

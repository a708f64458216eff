"""Checks of the RWKV-7 kernels on any device that has the op, judged in float64 on that device, and their speed.

`checks()` lists them, in the terms of gpu_correctness.py: `tools/gpu/gpu_check.py` runs them on a GPU, the tests on the
CPU with the emulator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.cuda.wkv7_cuda import wkv7_cuda
from infctx.cuda.wkv7_layout import backward_bytes, find_layout7, forward_bytes
from infctx.ops.wkv_chunked import wkv7_chunked
from infctx.ops.wkv_reference import wkv7_reference

from bench_wkv import CudaTimer, median_us
from gpu_correctness import (
    BF16,
    CUT_BAR,
    FP32,
    FP32_BAR,
    FP64,
    Case,
    Check,
    Op,
    Subject,
    Tensors,
    Verdict,
    errors,
    in_float64,
    judged,
    log_decay,
    nan_in_new_memory,
    same,
)

TOKENS = ("r", "w", "k", "v", "a", "b")
ROUNDED = ("y", "dr", "dk", "dv", "da", "db")
"""Results that are bf16 where the inputs are."""
MOST_TIMES_CHUNKED = {"y": 2.0}
EXACT_BAR = 1e-4
"""Of states, dw and their gradients with bf16 inputs."""
SPEED_SHAPES = ((1, 4096, 40, 64), (8, 4096, 32, 64))


def checks() -> list[Check]:
    """Returns all checks of version 7, the most fundamental first."""
    found = [Check("version 7, the judge: chunked in float64 is the definition", judge)]
    found += [Check(f"version 7, accuracy {case.name}", partial(accuracy, case)) for case in accuracy_cases()]
    for dtype in (FP32, BF16):
        case = Case((2, 333, 3, 64), dtype, documents=True)
        found.append(Check(f"version 7, same bits again {case.name}", partial(same_bits, case)))
        found.append(Check(f"version 7, memory full of NaN {case.name}", partial(memory_of_nan, case)))
    case = Case((2, 200, 3, 64), FP32)
    found.append(Check(f"version 7, cut anywhere {case.name}", partial(cut_anywhere, case)))
    return found + [
        Check(f"version 7, speed {Case(shape, BF16).name}", partial(speed, shape)) for shape in SPEED_SHAPES
    ]


def accuracy_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for decay in ("ordinary", "extreme", "slow", "constant"):
            yield Case((3, 77, 2, 64), dtype, decay, documents=True)
            yield Case((1, 4096, 2, 64), dtype, decay)
        yield Case((8, 256, 40, 64), dtype, documents=True)  # more heads than processors
        for shape in ((2, 300, 3, 16), (1, 200, 2, 32), (2, 130, 2, 60), (1, 1, 2, 64)):
            yield Case(shape, dtype, documents=True)


def draw(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, tuple[Tensor, Tensor]]:
    """Returns inputs by the names of the op's arguments, and cotangents of both outputs: a is minus a unit vector and b
    that vector times rates between 0 and 1."""
    g = torch.Generator(device).manual_seed(seed)
    batch, tokens, heads, size = case.shape

    def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=FP32).to(dtype)

    r, k, v, dy = (normal(*case.shape, dtype=case.dtype) for _ in range(4))
    direction = F.normalize(normal(*case.shape), dim=-1)
    rates = torch.sigmoid(3 * normal(*case.shape))
    inputs: Tensors = {"r": r, "w": log_decay(case.decay, normal(*case.shape)), "k": k, "v": v}
    inputs |= {"a": -direction.to(case.dtype), "b": (direction * rates).to(case.dtype)}
    inputs |= {"state": normal(batch, heads, size, size), "starts": None, "initial": None}
    if case.documents:
        inputs["starts"] = torch.rand(batch, -(-tokens // 16), generator=g, device=device) < 0.2
        inputs["initial"] = normal(batch, heads, size, size)
    return inputs, (dy, normal(batch, heads, size, size))


def outputs(op: Op, inputs: Mapping[str, Tensor | None], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns y, the final state, and the gradients of all inputs under both outputs' cotangents."""
    leaves = {
        name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None and x.is_floating_point()
    }
    given = {**inputs, **leaves}
    y, final = op(*(given[name] for name in (*TOKENS, "state")), given["starts"], given["initial"])
    gradients = torch.autograd.grad((y, final), list(leaves.values()), cotangents)
    found = {"y": y.detach(), "S_T": final.detach()}
    return found | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def judge(subject: Subject) -> Verdict:
    """Checks `wkv7_chunked` in float64, the judge of everything else, against the loop over time."""
    inputs, cotangents = draw(Case((2, 100, 2, 16), FP32, "extreme", documents=True), subject.device)
    inputs, precise = in_float64(inputs), [x.to(FP64) for x in cotangents]
    found, truth = (outputs(op, inputs, precise) for op in (wkv7_chunked, wkv7_reference))
    return judged(errors(found, truth), dict.fromkeys(truth, 1e-11))


def accuracy(case: Case, subject: Subject) -> Verdict:
    inputs, cotangents = draw(case, subject.device)
    truth = outputs(wkv7_chunked, in_float64(inputs), [x.to(FP64) for x in cotangents])
    found = errors(outputs(wkv7_cuda, inputs, cotangents), truth)
    bars = dict.fromkeys(truth, FP32_BAR)
    if case.dtype == BF16:
        plain = errors(outputs(wkv7_chunked, inputs, cotangents), truth)
        bars = {
            name: MOST_TIMES_CHUNKED.get(name, 3.0) * plain[name] if name in ROUNDED else EXACT_BAR for name in truth
        }
    return judged(found, bars)


def same_bits(case: Case, subject: Subject) -> Verdict:
    """Checks that two calls give the same bits."""
    inputs, cotangents = draw(case, subject.device)
    first, second = (outputs(wkv7_cuda, inputs, cotangents) for _ in range(2))
    return same(second, first)


def memory_of_nan(case: Case, subject: Subject) -> Verdict:
    """Checks that nothing is read before it is written, and that everything is written."""
    inputs, cotangents = draw(case, subject.device)
    expected = outputs(wkv7_cuda, inputs, cotangents)
    with nan_in_new_memory(subject.device):
        found = outputs(wkv7_cuda, inputs, cotangents)
    return same(found, expected)


def cut_anywhere(case: Case, subject: Subject) -> Verdict:
    """Checks that two parts, the second from the first one's state, give the values and gradients of the whole."""
    inputs, cotangents = draw(case, subject.device)
    whole = outputs(wkv7_cuda, inputs, cotangents)

    def in_pieces(cut: int, *given: Tensor) -> tuple[Tensor, Tensor]:
        def run(part: slice, state: Tensor) -> tuple[Tensor, Tensor]:
            r, w, k, v, a, b = (x[:, part] for x in given[:6])
            return wkv7_cuda(r, w, k, v, a, b, state)

        first, between = run(slice(cut), given[6])
        second, final = run(slice(cut, None), between)
        return torch.cat([first, second], 1), final

    worst = [errors(outputs(partial(in_pieces, cut), inputs, cotangents), whole) for cut in (1, 77, 128, 199)]
    return judged({name: max(each[name] for each in worst) for name in whole}, dict.fromkeys(whole, CUT_BAR))


def speed(shape: tuple[int, int, int, int], subject: Subject) -> Verdict:
    """Times forward and backward; there is no bar yet."""
    if subject.device.type != "cuda":
        return Verdict(None, "times are for a GPU")
    inputs, cotangents = draw(Case(shape, BF16), subject.device)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    call = [leaves[name] for name in (*TOKENS, "state")]
    timer = CudaTimer(subject.device)

    def backward(number: int):
        results = wkv7_cuda(*call)
        return lambda: torch.autograd.grad(results, call, cotangents)

    times = median_us(lambda number: lambda: wkv7_cuda(*call), timer), median_us(backward, timer)
    layouts = [find_layout7(shape, BF16, subject.processors, way) for way in ("forward", "backward")]
    traffic = forward_bytes(layouts[0]), backward_bytes(layouts[1])
    text = "; ".join(
        f"{way} {time:.0f} us, {layout.spans} spans, {count * layout.rows * layout.tokens / time / 1e6:.2f} TB/s"
        for way, time, layout, count in zip(("forward", "backward"), times, layouts, traffic, strict=True)
    )
    return Verdict(True, text)

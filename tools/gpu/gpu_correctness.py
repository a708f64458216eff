"""Checks of the WKV kernels' results, on any device that has the op, judged in float64 on that device.

`checks()` lists them; each takes a `Subject` and returns a `Verdict`.  `tools/gpu/gpu_check.py` runs them on a GPU, the
tests on the CPU with the emulator.  Errors are relative RMS: that of the difference over that of the truth.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.cuda.wkv_layout import HEAD_SIZES
from infctx.cuda.wkv_time import Processors, find_layout
from infctx.ops.wkv_chunked import wkv_chunked
from infctx.ops.wkv_reference import wkv_reference

Op = Callable[..., tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor | None]

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BF16_BARS = {"y": 2.4e-3, "S_T": 1.4e-3, "dr": 1.75e-3, "dk": 1.75e-3, "dv": 1.75e-3, "dw": 1.8e-3, "du": 1.9e-3}
BF16_BARS |= {"dS_0": 2e-3, "d initial": 2e-3}
"""Errors of fla's kernels with bf16 inputs and ordinary decays."""
FP32_BAR = 1e-5
EXTREME_DW_BAR = 1e-3
CUT_BAR = 1e-6
MOST_TIMES_CHUNKED = {"y": 2.0, "dr": 3.0, "dk": 3.0, "dv": 3.0}
"""Most times the error of `wkv_chunked` with the same inputs, for results in bf16."""
GRADIENTS = {"r": "dr", "k": "dk", "v": "dv", "w": "dw", "u": "du", "state": "dS_0", "initial": "d initial"}


@dataclass(frozen=True)
class Subject:
    """The op to judge, and the processors of its device."""

    device: torch.device
    processors: Processors
    op: Op = wkv_cuda


@dataclass(frozen=True)
class Verdict:
    """passed: None if the check cannot be made here; text: the worst figure, or why not."""

    passed: bool | None
    text: str


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[Subject], Verdict]


@dataclass(frozen=True)
class Case:
    """shape: (B, T, H, N); documents: some start inside, from a learned initial state."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    decay: str = "ordinary"
    documents: bool = False

    @property
    def name(self) -> str:
        sizes = " ".join(f"{letter}{size}" for letter, size in zip("BTHN", self.shape, strict=True))
        dtype = {BF16: "bf16", FP32: "fp32"}[self.dtype]
        return f"{dtype} {sizes} {self.decay}{' documents' * self.documents}"


def checks() -> list[Check]:
    """Returns all checks, the most fundamental first."""
    found = [Check("the judge: chunked in float64 is the definition", judge)]
    found += [Check(f"accuracy {case.name}", partial(accuracy, case)) for case in accuracy_cases()]
    for dtype in (FP32, BF16):
        for shape in ((1, 2048, 2, 64), (8, 256, 40, 64), (2, 200, 2, 128)):
            case = Case(shape, dtype, documents=True)
            found.append(Check(f"same bits again {case.name}", partial(same_bits, case)))
            found.append(Check(f"memory full of NaN {case.name}", partial(memory_of_nan, case)))
        case = Case((2, 300, 3, 64), dtype, documents=True)
        found.append(Check(f"any strides {case.name}", partial(any_strides, case)))
        found.append(Check(f"decay expanded {case.name}", partial(expanded_decay, case)))
    cut_cases = [Case((2, 200, 3, size), FP32) for size in (32, 64)] + [Case((1, 1500, 40, 64), FP32)]
    found += [Check(f"cut anywhere {case.name}", partial(cut_anywhere, case)) for case in cut_cases]
    tokens = 2**31 // (64 * 64) + 4096 + 77
    huge = Case((1, tokens, 64, 64), BF16)
    found.append(Check(f"beyond 2^31 elements, values, {huge.name}", partial(two_halves, huge, False)))
    found.append(Check(f"beyond 2^31 elements, gradients, {huge.name}", partial(two_halves, huge, True)))
    return found


def accuracy_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for decay in ("ordinary", "extreme", "slow", "constant"):
            yield Case((3, 77, 2, 64), dtype, decay, documents=True)
            yield Case((1, 1, 2, 64), dtype, decay)
            yield Case((1, 16384, 2, 64), dtype, decay)
        yield Case((8, 256, 40, 64), dtype, documents=True)  # more heads than processors
        yield Case((1, 4096, 40, 64), dtype)
        yield Case((1, 16384, 2, 64), dtype, documents=True)
        for shape in ((2, 300, 3, 16), (1, 200, 2, 32), (2, 130, 2, 80), (1, 150, 2, 128), (2, 333, 2, 256)):
            yield Case(shape, dtype, documents=True)
            yield Case(shape, dtype, "extreme")
        # Decays of fla's tests; the number is their gate: w = logsigmoid(z) / gate.
        yield Case((1, 15, 2, 60), dtype, "gate 1")
        yield Case((3, 60, 3, 64), dtype, "gate 0.1")
        yield Case((3, 64, 2, 64), dtype, "gate 1")
        yield Case((4, 500, 3, 256), dtype, "gate 1")
        yield Case((4, 1000, 4, 64), dtype, "gate 10")
        yield Case((4, 2048, 4, 64), dtype, "gate 1")
        yield Case((4, 2048, 4, 256), dtype, "gate 1")


# ---- inputs, outputs, errors ----


def draw(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, tuple[Tensor, Tensor]]:
    """Returns inputs by the names of the op's arguments, and cotangents of both outputs."""
    g = torch.Generator(device).manual_seed(seed)
    batch, tokens, heads, size = case.shape

    def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=FP32).to(dtype)

    r, k, v, dy = (normal(*case.shape, dtype=case.dtype) for _ in range(4))
    inputs: Tensors = {"r": r, "k": k, "v": v, "w": log_decay(case.decay, normal(*case.shape))}
    inputs |= {"u": normal(heads, size), "state": normal(batch, heads, size, size), "starts": None, "initial": None}
    if case.documents:
        inputs["starts"] = torch.rand(batch, -(-tokens // 16), generator=g, device=device) < 0.2
        inputs["initial"] = normal(batch, heads, size, size)
    return inputs, (dy, normal(batch, heads, size, size))


def log_decay(name: str, z: Tensor) -> Tensor:
    """Returns log decays from normal numbers, changing those in place: large ones leave no memory for copies."""
    if name.startswith("gate "):
        return F.logsigmoid(z) / float(name.removeprefix("gate "))
    if name == "constant":
        return torch.full_like(z, -20.0)
    factor, shift = {"ordinary": (1, -2), "extreme": (3, 0), "slow": (1, -7)}[name]
    return z.mul_(factor).add_(shift).exp_().neg_()


def outputs(op: Op, inputs: Mapping[str, Tensor | None], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns y, the final state, and the gradients of all inputs under both outputs' cotangents."""
    leaves = {name: x.detach().requires_grad_() for name in GRADIENTS if (x := inputs[name]) is not None}
    y, final = op(**{**inputs, **leaves})
    gradients = torch.autograd.grad((y, final), list(leaves.values()), cotangents)
    found = {"y": y.detach(), "S_T": final.detach()}
    return found | {GRADIENTS[name]: x for name, x in zip(leaves, gradients, strict=True)}


def given(inputs: Mapping[str, Tensor | None], name: str) -> Tensor:
    """Returns an input that is never None."""
    found = inputs[name]
    assert found is not None, name
    return found


def in_float64(tensors: Mapping[str, Tensor | None]) -> Tensors:
    return {name: x.to(FP64) if x is not None and x.is_floating_point() else x for name, x in tensors.items()}


def relative_rms(found: Tensor, truth: Tensor) -> float:
    """Returns the relative RMS error: 0 if both are all zeros; NaN if any number found is NaN."""
    difference = (found.to(FP64) - truth.to(FP64)).square().mean().sqrt().item()
    scale = truth.to(FP64).square().mean().sqrt().item()
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf


def errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: relative_rms(found[name], truth[name]) for name in truth}


def bf16_bars(truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the bars; 1.05 times the error of the rounded truth if so few bf16 results would make it miss them."""
    rounded = {name: 1.05 * relative_rms(truth[name].to(BF16), truth[name]) for name in MOST_TIMES_CHUNKED}
    return {name: max(BF16_BARS[name], rounded.get(name, 0.0)) for name in truth}


def judged(errors: Mapping[str, float], bars: Mapping[str, float]) -> Verdict:
    """Judges by the error that is largest relative to its bar; a NaN is the largest."""

    def share(name: str) -> float:
        return math.inf if math.isnan(errors[name]) else errors[name] / bars[name]

    worst = max(errors, key=share)
    return Verdict(share(worst) <= 1, f"worst {worst} {errors[worst]:.1e}, bar {bars[worst]:.1e}")


def bits_differ(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that differ in any bit."""
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Verdict:
    different = bits_differ(found, expected)
    return Verdict(not different, f"other bits in {', '.join(different)}" if different else "the same bits")


# ---- the checks ----


def judge(subject: Subject) -> Verdict:
    """Checks `wkv_chunked` in float64, the judge of everything else, against the loop over time."""
    inputs, cotangents = draw(Case((2, 100, 2, 16), FP32, "extreme", documents=True), subject.device)
    inputs, precise = in_float64(inputs), [x.to(FP64) for x in cotangents]
    found, truth = (outputs(op, inputs, precise) for op in (wkv_chunked, wkv_reference))
    return judged(errors(found, truth), dict.fromkeys(truth, 1e-12))


def accuracy(case: Case, subject: Subject) -> Verdict:
    inputs, cotangents = draw(case, subject.device)
    truth = outputs(wkv_chunked, in_float64(inputs), [x.to(FP64) for x in cotangents])
    found = errors(outputs(subject.op, inputs, cotangents), truth)
    plain = errors(outputs(wkv_chunked, inputs, cotangents), truth)
    # Ignore errors of a hundred-millionth: either may find a zero exactly.
    ratios = {name: found[name] / max(plain[name], 1e-8) for name in found}
    bars = bf16_bars(truth) if case.dtype == BF16 else dict.fromkeys(truth, FP32_BAR)
    if case.decay == "extreme":
        bars["dw"] = EXTREME_DW_BAR
    verdict = judged(found, bars)
    too_many = []
    if case.dtype == BF16:
        too_many = [name for name, most in MOST_TIMES_CHUNKED.items() if not ratios[name] <= most]
    r, largest = given(inputs, "r"), HEAD_SIZES[-1]
    # Heads above 64 channels are split before the kernels see them.
    spans = _spans(r, subject.processors) if r.shape[3] <= largest else "of pieces"
    beside = " ".join(f"{name} {ratio:.2g}" for name, ratio in ratios.items())
    text = f"{verdict.text}; spans {spans}; times chunked: {beside}"
    return Verdict(verdict.passed and not too_many, text + "".join(f"; {name}: too many" for name in too_many))


def _spans(r: Tensor, processors: Processors) -> str:
    spans = [find_layout(tuple(r.shape), r.dtype, processors, way).spans for way in ("forward", "backward")]
    return "{} and {}".format(*spans)


def same_bits(case: Case, subject: Subject) -> Verdict:
    """Checks that three calls give the same bits."""
    inputs, cotangents = draw(case, subject.device)
    first, second, third = (outputs(subject.op, inputs, cotangents) for _ in range(3))
    verdict = same(second, first)
    return same(third, first) if verdict.passed else verdict


def memory_of_nan(case: Case, subject: Subject) -> Verdict:
    """Checks that nothing is read before it is written, and that everything is written."""
    inputs, cotangents = draw(case, subject.device)
    expected = outputs(subject.op, inputs, cotangents)
    with nan_in_new_memory(subject.device):
        found = outputs(subject.op, inputs, cotangents)
    return same(found, expected)


@contextlib.contextmanager
def nan_in_new_memory(device: torch.device) -> Iterator[None]:
    """A context in which freed blocks of torch's allocator hold NaN, and torch fills new tensors with NaN."""
    if device.type == "cuda":
        sizes = [2**10] * 256 + [2**18] * 64 + [2**23] * 8 + [2**26]  # floats: small blocks have a separate pool
        blocks = [torch.full((size,), math.nan, device=device) for size in sizes]
        torch.cuda.synchronize(device)
        del blocks
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def any_strides(case: Case, subject: Subject) -> Verdict:
    """Checks inputs stored head by head, and an expanded cotangent."""
    inputs, (_, dfinal) = draw(case, subject.device)
    dy = torch.ones((), dtype=case.dtype, device=subject.device).expand(case.shape)
    by_head = dict(inputs)
    for name in ("r", "k", "v", "w"):
        by_head[name] = given(inputs, name).transpose(1, 2).contiguous().transpose(1, 2)  # (B, T, H, N) as before
    found = outputs(subject.op, by_head, (dy, dfinal.mT.contiguous().mT))
    return same(found, outputs(subject.op, inputs, (dy.contiguous(), dfinal)))


def expanded_decay(case: Case, subject: Subject) -> Verdict:
    """Checks a decay that is the same for all tokens, as in RWKV-5: stride 0, and the gradient is their sum."""
    inputs, cotangents = draw(case, subject.device)
    inputs["w"] = given(inputs, "w")[:1, :1]

    def expanded(op: Op, **inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        return op(**{**inputs, "w": given(inputs, "w").expand(case.shape)})

    def written_out(op: Op, **inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        return op(**{**inputs, "w": given(inputs, "w").expand(case.shape).contiguous()})

    found = outputs(partial(expanded, subject.op), inputs, cotangents)
    different = bits_differ(found, outputs(partial(written_out, subject.op), inputs, cotangents))
    truth = outputs(partial(expanded, wkv_chunked), in_float64(inputs), [x.to(FP64) for x in cotangents])
    bars = bf16_bars(truth) if case.dtype == BF16 else dict.fromkeys(truth, FP32_BAR)
    verdict = judged(errors(found, truth), bars)
    text = f"{verdict.text}; other bits than written out: {', '.join(different) or 'none'}"
    return Verdict(verdict.passed and not different, text)


def cut_anywhere(case: Case, subject: Subject) -> Verdict:
    """Checks that two parts, the second from the first one's state, give the values and gradients of the whole."""
    inputs, cotangents = draw(case, subject.device)
    whole = outputs(subject.op, inputs, cotangents)
    tokens = case.shape[1]

    def in_pieces(cut: int, state: Tensor, **inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        ys = []
        for piece in (slice(0, cut), slice(cut, None)):
            part = {name: given(inputs, name)[:, piece] for name in ("r", "k", "v", "w")}
            y, state = subject.op(**{**inputs, **part}, state=state)
            ys.append(y)
        return torch.cat(ys, 1), state

    cuts = sorted({cut for cut in (1, 16, 37, 64, 128, tokens - 1) if 0 < cut < tokens})
    found = {cut: errors(outputs(partial(in_pieces, cut), inputs, cotangents), whole) for cut in cuts}
    worst = {f"{name} cut at {cut}": error for cut in cuts for name, error in found[cut].items()}
    return judged(worst, dict.fromkeys(worst, CUT_BAR))


def two_halves(case: Case, gradients: bool, subject: Subject) -> Verdict:
    """Checks more elements than 32 bits can count, against two halves that they can.

    Compares 4,096 tokens at both ends and around the middle, where the two calls do very different work.
    """
    elements = math.prod(case.shape)
    # Bytes per element: inputs 10, y 2; with gradients also states 4 (of 64 tokens, heads of 64) and the gradients 10;
    # then the same for half of the elements.
    needed = elements * (30 if gradients else 13) + 2**30
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(subject.device)[0]
        if free < needed:
            return Verdict(None, f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB is free")
    g = torch.Generator(subject.device).manual_seed(0)
    r, k, v = (torch.randn(case.shape, generator=g, device=subject.device, dtype=case.dtype) for _ in range(3))
    w = log_decay(case.decay, torch.randn(case.shape, generator=g, device=subject.device))
    batch, tokens, heads, size = case.shape
    u = torch.randn(heads, size, generator=g, device=subject.device)
    state, dfinal = torch.randn(2, batch, heads, size, size, generator=g, device=subject.device)
    middle = tokens // 2 // 16 * 16
    halves = [[x[:, part] for x in (r, k, v, w)] for part in (slice(0, middle), slice(middle, None))]
    window = min(4096, middle)
    if not gradients:
        with torch.no_grad():
            y, final = subject.op(r, k, v, w, u, state)
            y_1, between = subject.op(*halves[0], u, state)
            found = {"y at the beginning": relative_rms(y[:, :window], y_1[:, :window])}
            found["y in the middle"] = relative_rms(y[:, middle - window : middle], y_1[:, -window:])
            del y_1
            y_2, end = subject.op(*halves[1], u, between)
            found["y at the end"] = relative_rms(y[:, -window:], y_2[:, -window:])
            found["S_T"] = relative_rms(final, end)
    else:
        found = _gradients_of_halves(subject, (r, k, v, w, u), halves, state, dfinal, window)
    exact = {name: 1e-5 for name in found if name.startswith(("S_T", "dw", "dS"))}
    # Two roundings to bf16 of nearly the same number rarely differ.
    return judged(found, dict.fromkeys(found, 1e-3) | exact)


def _gradients_of_halves(
    subject: Subject, inputs: Sequence[Tensor], halves: list[list[Tensor]], state: Tensor, dfinal: Tensor, window: int
) -> dict[str, float]:
    """Returns the errors of the whole's gradients against those of the halves, the second half first."""
    *tokens, u = inputs

    def backward(tokens: Sequence[Tensor], state: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (*tokens, state)]
        # v is as good a cotangent of y as any, and needs no memory.
        y, final = subject.op(*leaves[:4], u, leaves[4])
        return torch.autograd.grad((y, final), leaves, (tokens[2], dfinal))

    with torch.no_grad():
        between = subject.op(*halves[0], u, state)[1]
    *whole, dstate = backward(tokens, state, dfinal)
    *second, dbetween = backward(halves[1], between, dfinal)
    middle = halves[0][0].shape[1]
    found = {}
    for name, all_of_it, half in zip(("dr", "dk", "dv", "dw"), whole, second, strict=True):
        found[f"{name} at the end"] = relative_rms(all_of_it[:, -window:], half[:, -window:])
        found[f"{name} in the middle"] = relative_rms(all_of_it[:, middle : middle + window], half[:, :window])
    del second, half
    *first, dfirst = backward(halves[0], state, dbetween)
    for name, all_of_it, half in zip(("dr", "dk", "dv", "dw"), whole, first, strict=True):
        found[f"{name} at the beginning"] = relative_rms(all_of_it[:, :window], half[:, :window])
    found["dS_0"] = relative_rms(dstate, dfirst)
    return found

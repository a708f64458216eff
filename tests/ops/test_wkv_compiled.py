"""The compiled CPU backend against a plain loop over time in float64, on every output and every gradient."""

import os
import subprocess
import sys

import pytest
import torch

from infctx.ops.wkv_compiled import wkv_compiled

NAMES = ("y", "final", "dr", "dk", "dv", "dw", "du", "dstate", "dinitial")


def loop_over_time(r, k, v, w, u, state, starts=None, initial=None):
    outputs = []
    for t in range(r.shape[1]):
        if starts is not None and t % 16 == 0:
            fresh = torch.zeros_like(state) if initial is None else initial
            state = torch.where(starts[:, t // 16, None, None, None], fresh, state)
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((r[:, t, :, :, None] * (state + u[..., None] * kv)).sum(-2))
        state = w[:, t, :, :, None].exp() * state + kv
    return torch.stack(outputs, 1), state


def ordinary(*shape):
    return -torch.empty(shape, dtype=torch.float64).uniform_(-8, 1).exp()


def extreme(*shape):
    return -(3 * torch.randn(shape, dtype=torch.float64)).exp().clamp(1e-5, 1e4)


def make_inputs(B, T, H, N, dtype=torch.float64, decays=ordinary, w_over=("B", "T"), start_rate=0.3):
    """Returns leaf inputs, `starts`, and a function that makes the op's inputs from the leaves."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = [torch.randn(B, T, H * N).to(dtype) for _ in range(3)]
    w = decays(B if "B" in w_over else 1, T if "T" in w_over else 1, H, N)
    rest = [w, torch.randn(H, N), torch.randn(B, H, N, N), torch.randn(1, H, N, N)]
    leaves = [x.requires_grad_() for x in (*tokens, *(x.to(precise) for x in rest))]
    starts = torch.rand(B, -(-T // 16)) < start_rate
    return leaves, starts, (B, T, H, N)


def run(function, leaves, starts, shape, cotangents):
    """Returns outputs and gradients; r, k, v are views of (B, T, H N), w and initial are expanded."""
    B, T, H, N = shape
    r, k, v, w, u, state, initial = leaves
    r, k, v = (x.view(shape) for x in (r, k, v))
    y, final = function(r, k, v, w.expand(shape), u, state, starts, initial.expand(B, H, N, N))
    outputs = (y, final)
    cotangents = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
    return *(x.detach() for x in outputs), *gradients


def judged(inputs):
    """Returns pairs (compiled, loop in float64) of every output and gradient, by name."""
    leaves, starts, shape = inputs
    B, T, H, N = shape
    y_cotangent = torch.randn(shape).to(leaves[0].dtype)
    cotangents = (y_cotangent, torch.randn(B, H, N, N, dtype=torch.float32))
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    ours = run(wkv_compiled, *inputs, cotangents)
    exact = run(loop_over_time, exact_leaves, starts, shape, cotangents)
    return dict(zip(NAMES, zip(ours, exact, strict=True), strict=True))


def relative_rms(ours, exact):
    error, size = (ours.double() - exact).pow(2).sum().sqrt(), exact.pow(2).sum().sqrt()
    # Results below the smallest normal number may be zero.
    return (error / size.clamp(min=1e-30)).item()


def check(inputs, bar):
    for name, (ours, exact) in judged(inputs).items():
        assert relative_rms(ours, exact) <= bar, name


@pytest.mark.parametrize("decays", [ordinary, extreme])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 5), (2, 7, 3, 16), (1, 8, 1, 32), (3, 17, 2, 5), (2, 64, 1, 16), (1, 65, 2, 64), (1, 200, 5, 32)]
    + [(2, 131, 3, 64), (1, 48, 2, 128), (1, 9, 1, 1), (1, 20, 1, 15)],
)
def test_float64_equals_the_loop(shape, decays):
    torch.manual_seed(sum(shape))
    check(make_inputs(*shape, decays=decays), 1e-12)


def test_random_shapes_in_float64():
    torch.manual_seed(0)
    for _ in range(12):
        B, T, H = (int(torch.randint(low, high, ())) for low, high in ((1, 4), (1, 130), (1, 6)))
        N = (5, 16, 32, 64)[int(torch.randint(4, ()))]
        check(make_inputs(B, T, H, N, start_rate=float(torch.rand(()))), 1e-12)


@pytest.mark.parametrize("w_over", [("B",), ("T",), ()])
def test_expanded_decays(w_over):
    torch.manual_seed(1)
    check(make_inputs(2, 50, 3, 16, w_over=w_over), 1e-12)


@pytest.mark.parametrize("log_decay", [-1e-5, -1.0, -20.0, -87.0, -88.0, -200.0, -1e4, -float("inf")])
def test_every_decay_is_exact(log_decay):
    torch.manual_seed(2)
    leaves, starts, shape = make_inputs(1, 40, 2, 16, decays=lambda *s: torch.full(s, log_decay).double())
    check((leaves, starts, shape), 1e-12)
    leaves = [x.detach().float().requires_grad_() for x in leaves]
    check((leaves, starts, shape), 2e-6)


@pytest.mark.parametrize(("decays", "shape"), [(ordinary, (1, 512, 2, 64)), (extreme, (1, 256, 2, 64))])
def test_float32_is_close(decays, shape):
    torch.manual_seed(3)
    check(make_inputs(*shape, dtype=torch.float32, decays=decays, start_rate=0.05), 2e-6)


def test_bfloat16_in_and_out():
    torch.manual_seed(4)
    inputs = make_inputs(2, 70, 2, 64, dtype=torch.bfloat16)
    for name, (ours, exact) in judged(inputs).items():
        rounded = name in ("y", "dr", "dk", "dv")
        assert ours.dtype == (torch.bfloat16 if rounded else torch.float32)
        assert relative_rms(ours, exact) <= (3e-3 if rounded else 2e-6), name


def test_starts_and_initial_may_be_left_out():
    torch.manual_seed(5)
    leaves, starts, (B, T, H, N) = make_inputs(2, 40, 2, 16)
    r, k, v, w, u, state, initial = (x.detach() for x in leaves)
    r, k, v = (x.view(B, T, H, N) for x in (r, k, v))
    for rest in ((), (starts,), (None, initial.expand(B, H, N, N))):
        for ours, exact in zip(
            wkv_compiled(r, k, v, w, u, state, *rest), loop_over_time(r, k, v, w, u, state, *rest), strict=True
        ):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_any_strides():
    torch.manual_seed(6)
    x = torch.randn(4, 16, 2, 30, 3, dtype=torch.float64)
    r, k, v, w = x.permute(0, 4, 3, 2, 1)  # the last dimension is not contiguous
    state = torch.randn(16, 16, 2, 3, dtype=torch.float64).permute(3, 2, 1, 0)
    u, before = torch.randn(16, 2, dtype=torch.float64).T, x.clone()
    for ours, exact in zip(
        wkv_compiled(r, k, v, -w.abs(), u, state), loop_over_time(r, k, v, -w.abs(), u, state), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("cut", [1, 15, 16, 33, 48, 64, 71])
def test_a_cut_changes_nothing(cut):
    torch.manual_seed(7)
    leaves, _, (B, T, H, N) = make_inputs(1, 80, 2, 16, dtype=torch.float32)
    cotangents = torch.randn(B, T, H, N), torch.randn(B, H, N, N)

    def in_two(r, k, v, w, u, state, starts, initial):
        first, state = wkv_compiled(*(x[:, :cut] for x in (r, k, v, w)), u, state)
        second, state = wkv_compiled(*(x[:, cut:] for x in (r, k, v, w)), u, state)
        return torch.cat((first, second), 1), state

    def in_one(r, k, v, w, u, state, starts, initial):
        return wkv_compiled(r, k, v, w, u, state)

    whole, halves = (run(f, leaves, None, (B, T, H, N), cotangents) for f in (in_one, in_two))
    for name, a, b in zip(NAMES, whole, halves, strict=True):
        assert relative_rms(a, b.double()) <= 1e-6, name


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(8)
    leaves, starts, shape = make_inputs(2, 200, 5, 16, dtype=torch.float32)
    cotangents = torch.randn(shape), torch.randn(2, 5, 16, 16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            results.append(run(wkv_compiled, leaves, starts, shape, cotangents))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_nothing_is_saved_without_gradients():
    leaves, starts, (B, T, H, N) = make_inputs(1, 40, 2, 16)
    r, k, v, w, u, state, initial = leaves
    inputs = (r.view(B, T, H, N), k.view(B, T, H, N), v.view(B, T, H, N), w, u, state, starts, initial)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape), lambda x: x):
        with torch.no_grad():
            y, final = wkv_compiled(*inputs)
        assert not y.requires_grad and not final.requires_grad
        y, final = wkv_compiled(*(x.detach() for x in inputs))
        assert y.grad_fn is None and final.grad_fn is None
        assert saved == []
        wkv_compiled(*inputs)
        assert len(saved) == 8


def test_only_the_gradients_asked_for():
    leaves, starts, (B, T, H, N) = make_inputs(1, 20, 2, 16)
    r, k, v, w, u, state, initial = (x.detach() for x in leaves)
    r, k, v = (x.view(B, T, H, N) for x in (r, k, v))
    state.requires_grad_()
    starts[:] = False
    _, final = wkv_compiled(r, k, v, w, u, state, starts, initial)
    final.sum().backward()
    torch.testing.assert_close(state.grad, w.sum(1).exp()[..., None].expand_as(state))


@pytest.mark.parametrize("poisoned", range(6))
def test_nan_does_not_vanish(poisoned):
    torch.manual_seed(9)
    leaves, _, (B, T, H, N) = make_inputs(1, 40, 2, 16, dtype=torch.float32)
    inputs = [x.detach().clone() for x in leaves[:6]]
    inputs[poisoned].view(-1)[5] = float("nan")
    r, k, v = (x.view(B, T, H, N) for x in inputs[:3])
    y, final = wkv_compiled(r, k, v, *inputs[3:])
    exact_y, exact_final = loop_over_time(r, k, v, *inputs[3:])
    assert torch.equal(y.isnan(), exact_y.isnan())
    assert torch.equal(final.isnan(), exact_final.isnan())


def test_a_start_stops_nan():
    inputs, starts, (B, T, H, N) = make_inputs(1, 32, 1, 16, dtype=torch.float32)
    r, k, v, w, u, state, _ = (x.detach() for x in inputs)
    starts = torch.tensor([[False, True]])
    y, final = wkv_compiled(*(x.view(B, T, H, N) for x in (r, k, v)), w, u, state * float("nan"), starts)
    assert y[:, :16].isnan().all() and y[:, 16:].isfinite().all() and final.isfinite().all()


def test_gradcheck():
    torch.manual_seed(10)
    tokens = [torch.randn(1, 18, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    w = -torch.rand(1, 18, 1, 3, dtype=torch.float64)
    rest = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 3), (1, 1, 3, 3), (1, 1, 3, 3))]
    starts = torch.tensor([[False, True]])
    u, state, initial = rest

    def with_starts(r, k, v, w, u, state, initial):
        return wkv_compiled(r, k, v, w, u, state, starts, initial)

    assert torch.autograd.gradcheck(with_starts, (*tokens, w.requires_grad_(), u, state, initial), fast_mode=True)


def test_importing_imports_no_compiler():
    code = "import sys, infctx.ops.wkv_compiled; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_after_fork():
    code = """
import os, torch
from infctx.ops.wkv_compiled import wkv_compiled
torch.set_num_threads(2)
r, k, v, w = torch.randn(4, 1, 600, 2, 16)
inputs = r, k, v, -w.abs(), torch.zeros(2, 16), torch.zeros(1, 2, 16, 16)
y, _ = wkv_compiled(*inputs)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(wkv_compiled(*inputs)[0], y) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

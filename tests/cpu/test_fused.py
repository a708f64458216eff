"""The fused passes of the CPU against the same formulas in plain torch and float64: results and all gradients."""

import pytest
import torch
import torch.nn.functional as F

from infctx.cpu import fused

FASTEST, EPS = -0.6, 64e-5
SHAPES = [(2, 70, 3, 20), (1, 130, 2, 64), (3, 1, 2, 7)]


def blend(x, change, mixes):
    return tuple(x + change * mix for mix in mixes)


def squared_relu(x):
    return (torch.relu(x) ** 2,)


def delta_inputs(k, decay, rate, decay_base, rate_base, scale, key_rate, *values):
    alpha, kappa = torch.sigmoid(rate_base + rate), F.normalize(k * scale, dim=-1)
    w = FASTEST * torch.sigmoid(decay_base + decay)
    made = (w, k * (1 + (alpha - 1) * key_rate), -kappa, kappa * alpha)
    if not values:
        return made
    v, first, share, share_base = values
    return *made, v + (first - v) * torch.sigmoid(share_base + share)


def delta_output(y, r, k, v, gate, weight, bias, bonus):
    normal = F.layer_norm(y, y.shape[-1:], eps=EPS)
    return ((normal * weight + bias + (r * bonus * k).sum(-1, keepdim=True) * v) * gate,)


FUSED = {
    blend: fused.blend,
    squared_relu: lambda x: (fused.squared_relu(x),),
    delta_inputs: lambda *x: fused.delta_inputs(x[:3], x[3:7], FASTEST, x[7:] or None),
    delta_output: lambda *x: (fused.delta_output(x[:5], x[5:], EPS),),
}


def inputs_of(case, B, T, H, N):
    def draw(*shape, number=1):
        return [torch.randn(shape, dtype=torch.float64).float() for _ in range(number)]

    tokens, vectors = (B, T, H, N), (H, N)
    drawn = {
        "blend, one": lambda: [*draw(B, T, H * N, number=2), *draw(1, 1, 1, H * N)],
        "blend, six": lambda: [*draw(B, T, H * N, number=2), *draw(6, 1, 1, H * N)],
        "blend, each token": lambda: [*draw(B, T, H * N, number=2), *draw(5, B, T, H * N)],
        "squared relu": lambda: draw(B, T, H * N),
        "first inputs": lambda: [*draw(*tokens, number=3), *draw(*vectors, number=4)],
        "inputs": lambda: [*draw(*tokens, number=3), *draw(*vectors, number=4), *draw(*tokens, number=3), *draw(H, N)],
        "output": lambda: [*draw(*tokens, number=5), *draw(*vectors, number=3)],
    }
    return drawn[case]()


CASES = {
    "blend, one": blend,
    "blend, six": blend,
    "blend, each token": blend,
    "squared relu": squared_relu,
    "first inputs": delta_inputs,
    "inputs": delta_inputs,
    "output": delta_output,
}


def run(function, inputs, dtype, seed=0):
    """Returns results and gradients; results and their gradients are of any strides."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    results = function(*leaves)
    cotangents = [torch.randn(x.shape[::-1], generator=generator).to(dtype) for x in results]
    backwards = [x.permute(*range(x.ndim)[::-1]) for x in cotangents]
    return [x.detach() for x in results] + list(torch.autograd.grad(results, leaves, backwards))


def check(found, expected, bar):
    for place, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        assert (ours.double() - exact).norm() <= bar * exact.norm(), place


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_torch(case, shape):
    torch.manual_seed(sum(shape))
    plain, inputs = CASES[case], inputs_of(case, *shape)
    expected = run(plain, inputs, torch.float64)
    check(run(FUSED[plain], inputs, torch.float64), expected, 1e-13)
    check(run(FUSED[plain], inputs, torch.float32), expected, 5e-7)


def test_sigmoids_far_out_and_keys_of_no_length():
    torch.manual_seed(0)
    k, decay, rate, *rest = inputs_of("inputs", 1, 4, 2, 20)
    k[0, 0] = 0
    k[0, 1] *= 1e-20
    decay[0, :2], rate[0, 2:] = 200, -200
    inputs = [k, decay, rate, *rest]
    expected = run(delta_inputs, inputs, torch.float64)
    found = run(FUSED[delta_inputs], inputs, torch.float64)
    check(found[:5], expected[:5], 1e-13)
    assert all(x.isfinite().all() for x in found)
    # Where a key is too short, its own gradient is that of k scale / 1e-12: the definition's to the last token.
    check([x[:, 2:] for x in found[5:8]], [x[:, 2:] for x in expected[5:8]], 1e-13)


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_no_bit(case, monkeypatch):
    monkeypatch.setattr(fused, "MIN_THREAD_NUMBERS", 1)
    torch.manual_seed(1)
    plain, inputs = CASES[case], inputs_of(case, 2, 70, 5, 20)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(FUSED[plain], inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_nan_does_not_vanish(case):
    torch.manual_seed(2)
    plain, inputs = CASES[case], inputs_of(case, 1, 3, 2, 20)
    for x in inputs:
        poisoned = [y.clone() if y is x else y for y in inputs]
        next(y for y in poisoned if y.shape == x.shape and all(y is not z for z in inputs)).view(-1)[5] = torch.nan
        for ours, exact in zip(FUSED[plain](*poisoned), plain(*poisoned), strict=True):
            assert torch.equal(ours.isnan(), exact.isnan())


def test_only_the_gradients_asked_for():
    x, change, mixes = inputs_of("blend, six", 1, 20, 1, 30)
    x.requires_grad_()
    torch.autograd.backward(fused.blend(x, change, mixes), [torch.ones_like(x)] * 6)
    assert torch.equal(x.grad, torch.full_like(x, 6)) and mixes.grad is None

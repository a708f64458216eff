"""AdamW in little memory: its parts against plain torch, and what happens to numbers that few bits cannot hold."""

import pytest
import torch

from infctx.optimizers import adamw
from infctx.optimizers.adamw import LittleAdamW
from infctx.optimizers.eight_bits import BLOCK, dequantize, quantize
from infctx.optimizers.gradients import add_up_in_bf16
from infctx.optimizers.host import HostAdamW
from infctx.optimizers.moments import are_moments, no_moments, to_eight_bits, to_fp32
from infctx.optimizers.rounding import Dice, round_to_bf16

from allocated import Allocated

FORM = {"lr": 2e-2, "betas": (0.9, 0.99), "eps": 1e-8}


def trained(make, dtype=torch.float32, steps=30, seed=0):
    """Trains two parameters of odd sizes on a least-squares problem; returns them and the loss at the end."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 37, generator=random)
    wanted = inputs @ torch.randn(37, 141, generator=random) + 1
    weight = torch.nn.Parameter((0.1 * torch.randn(37, 141, generator=random)).to(dtype))
    bias = torch.nn.Parameter(torch.zeros(141))
    weight.grad_dtype = torch.float32
    optimizer = make([{"params": [weight], "weight_decay": 0.1}, {"params": [bias]}])

    def loss():
        return (inputs @ weight.float() + bias - wanted).square().mean()

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return weight.detach(), bias.detach(), loss().item()


@pytest.fixture(autouse=True)
def several_slices(monkeypatch):
    monkeypatch.setattr(adamw, "SLICE", 7 * BLOCK)


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: LittleAdamW(groups, **FORM, eight_bits=False, seed=1),
        lambda groups: HostAdamW(groups, **FORM),
    ],
    ids=["little", "host"],
)
def test_in_fp32_it_is_torchs_adamw(make):
    ours = trained(make)
    theirs = trained(lambda groups: torch.optim.AdamW(groups, **{"weight_decay": 0.0} | FORM))
    for mine, its in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eight_bits", [False, True])
def test_few_bits_learn_as_much(eight_bits, dtype):
    start = trained(lambda groups: torch.optim.AdamW(groups, **FORM), steps=0)[2]
    full = trained(lambda groups: torch.optim.AdamW(groups, **{"weight_decay": 0.0} | FORM), steps=120)[2]

    def little(seed):
        return trained(lambda groups: LittleAdamW(groups, **FORM, eight_bits=eight_bits, seed=seed), dtype, 120)[2]

    ours = [little(1), little(1), little(2)]
    assert ours[0] == ours[1]
    assert ours[0] != ours[2] or not (eight_bits or dtype == torch.bfloat16)
    assert full < 0.1 * start
    assert ours[0] == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_right_to_a_few_percent_and_right_on_average(signed):
    random = torch.Generator().manual_seed(3)
    values = torch.randn(3 * BLOCK + 5, generator=random) * 10 ** torch.empty(3 * BLOCK + 5).uniform_(
        -5, 0, generator=random
    )
    values[7], values[BLOCK : 2 * BLOCK] = 0, 0
    values = values if signed else values.abs()
    draws = []
    for _ in range(100):
        codes, scales = quantize(values, signed, random)
        assert codes.shape == values.shape and scales.shape == (4,)
        draws.append(dequantize(codes, scales, signed))
    draws = torch.stack(draws)
    zeros = values == 0
    assert (draws[:, zeros] == 0).all()
    if not signed:  # AdamW divides by it
        assert (draws[:, ~zeros] > 0).all()
    largest = torch.nn.functional.pad(values.abs(), (0, -len(values) % BLOCK)).view(-1, BLOCK).amax(1)
    inside = values.abs() > 1e-2 * largest.repeat_interleave(BLOCK)[: len(values)]
    error = (draws - values)[:, inside] / values[inside]
    assert error.abs().max() < (0.29 if signed else 0.15)  # one step: 0.9 / 32 or 64 of a tenth
    assert error.square().mean().sqrt() < (0.08 if signed else 0.04)
    assert error.mean(0).abs().max() < 5 * error.std(0).max() / 100**0.5  # no bias


def test_an_update_below_the_last_bit_still_counts_on_average():
    """bf16 has 8 bits: 1 + 2^-12 rounds to 1, and 512 such steps to the nearest leave 1."""
    weights, dice = torch.ones(20_000, dtype=torch.bfloat16), Dice(5)
    for step in range(512):
        weights = round_to_bf16(weights.float() + 2**-12, dice.generator(weights.device, step))
    mean = weights.double().mean().item()
    assert mean == pytest.approx(1 + 512 * 2**-12, abs=5 * weights.double().std().item() / 20_000**0.5)
    exact = torch.randn(999).bfloat16()
    assert torch.equal(round_to_bf16(exact.float(), dice.generator(exact.device)), exact)


def test_sums_of_gradients_in_bf16_have_no_bias():
    weight = torch.nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
    add_up_in_bf16([weight], seed=2, steps_taken=lambda _: 4)
    part = torch.full((20_000,), 1.0).bfloat16()
    for _ in range(1000):  # to the nearest, the sum would stop at 256
        (weight * part).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.double().mean().item() == pytest.approx(1000, rel=0.001)
    before = weight.grad.clone()
    weight.grad = None
    for _ in range(1000):
        (weight * part).sum().backward()
    assert torch.equal(weight.grad, before)  # so a resumed run adds up the same


def test_moments_change_their_form():
    random = torch.Generator().manual_seed(9)
    full = {"exp_avg": torch.randn(33, 17), "exp_avg_sq": torch.rand(33, 17), "step": torch.tensor(3.0)}
    small = to_eight_bits(full, random)
    none = to_eight_bits({name: part * 0 for name, part in full.items()}, random)
    first = no_moments(full["exp_avg"], eight_bits=True)
    assert first.keys() == none.keys() and all(torch.equal(first[name], none[name]) for name in none)
    back = to_fp32(small)
    for name in ("exp_avg", "exp_avg_sq"):
        assert small[name].dtype == torch.uint8 and small[name].shape == full[name].shape
        assert (back[name] - full[name]).norm() < 0.05 * full[name].norm()
    for moments in (full, small, back):
        assert are_moments(moments, torch.Size([33, 17]), torch.float32)
        assert not are_moments(moments, torch.Size([17, 33]), torch.float32)
        assert not are_moments(moments | {"step": torch.tensor(0.0)}, torch.Size([33, 17]), torch.float32)
        for name in moments:
            assert not are_moments({k: v for k, v in moments.items() if k != name}, torch.Size([33, 17]), torch.float32)


def test_a_step_needs_what_the_plan_counts():
    to_eight_bits({"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}, torch.Generator())  # makes its tables, once
    count = 7 * BLOCK
    weight = torch.nn.Parameter(torch.randn(10 * count).bfloat16())
    weight.grad = torch.randn(10 * count).bfloat16()
    optimizer = LittleAdamW([{"params": [weight]}], **FORM, eight_bits=True, seed=1)
    with Allocated([weight, weight.grad]) as measured:
        optimizer.step()  # makes the moments
    moments = list(optimizer.state[weight].values())
    assert measured.most <= adamw.SLICE_BYTES * count + sum(moment.nbytes for moment in moments)
    with Allocated([weight, weight.grad, *moments]) as measured:
        optimizer.step()
    assert 0.9 * adamw.SLICE_BYTES * count <= measured.most <= adamw.SLICE_BYTES * count

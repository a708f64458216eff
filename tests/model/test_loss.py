"""The loss: torch's own cross entropy is the judge, however the logits are sliced."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from infctx.conventions import MASKED
from infctx.cpu import head_loss
from infctx.model import loss as loss_module
from infctx.model.layers import LowRank
from infctx.model.loss import Segment, SegmentLoss, cross_entropy_sum, token_losses

from tiny_models import random_model, random_tokens

B, T, D, V = 2, 13, 7, 11


@pytest.fixture(params=["fused", "plain"])
def form(request, monkeypatch):
    """The compiled form for the CPU, in blocks of few columns; and that of plain torch."""
    monkeypatch.setattr(head_loss, "LEAST_COLUMNS", 4)
    monkeypatch.setattr(head_loss, "BLOCK_BYTES", 4 * 8 * B * T)
    if request.param == "plain":
        monkeypatch.setattr(head_loss, "fits", lambda hidden: False)
    return request.param


@pytest.fixture(params=[1, 3 * V, 5 * V + 4, 1 << 25], ids=["rows of 1", "rows of 3", "rows of 5", "one slice"])
def slices(form, request, monkeypatch):
    monkeypatch.setattr(loss_module, "SLICE_LOGITS", request.param)


def random_case(seed=0, dtype=torch.float64, masked=0.3):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T), generator=random)
    targets[torch.rand(B, T, generator=random) < masked] = MASKED
    return hidden, head, targets


def judge(hidden, head, targets, l2wrap=0.0):
    """Returns torch's cross entropy over whole logits, plus l2wrap / 2 times the squares of the largest ones."""
    logits = (hidden @ head.T).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=MASKED, reduction="sum")
    largest = logits.max(dim=1).values[targets.flatten() != MASKED]
    return loss, loss + 0.5 * l2wrap * largest.square().sum()


@pytest.mark.parametrize("masked", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("l2wrap", [False, True])
def test_value_and_gradients(slices, masked, l2wrap):
    hidden, head, targets = random_case(masked=masked)
    assert (targets == MASKED).any() == bool(masked)
    value, regularised = judge(hidden, head, targets, 1e-4 * l2wrap)
    truth = torch.autograd.grad(3 * regularised, (hidden, head))
    found = cross_entropy_sum(hidden, head, targets, l2wrap)[0]
    assert found.dtype == torch.float64
    assert torch.allclose(found, value, rtol=1e-13)  # L2Wrap does not change the value
    for gradient, wanted in zip(torch.autograd.grad(3 * found, (hidden, head)), truth, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-14)


def test_the_sums_of_sources(slices):
    """They add up to the loss, and change no gradient."""
    hidden, head, targets = random_case(masked=0.3)
    sources = torch.randint(4, targets.shape, generator=torch.Generator().manual_seed(5))
    sources[sources == 2] = 3  # one has nothing here
    found, sums = cross_entropy_sum(hidden, head, targets, sources=(sources, 4))
    assert not sums.requires_grad
    for source in range(4):
        wanted = judge(hidden, head, targets.masked_fill(sources != source, MASKED))[0]
        assert torch.allclose(sums[source], wanted, rtol=1e-13) and bool(sums[source]) == (source != 2)
    plain, alone = cross_entropy_sum(hidden, head, targets)
    assert torch.equal(alone, plain.detach()[None]) and torch.allclose(found, plain, rtol=1e-14)
    for gradient, wanted in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (found, plain)), strict=True):
        assert torch.equal(gradient, wanted)


def test_l2wrap_is_seen_by_the_test_above():
    hidden, head, targets = random_case()
    plain, wrapped = (torch.autograd.grad(judge(hidden, head, targets, f)[1], head)[0] for f in (0, 1e-4))
    assert (plain - wrapped).abs().max() > 1e-5


def test_all_masked(slices):
    hidden, head, targets = random_case()
    loss = cross_entropy_sum(hidden, head, torch.full_like(targets, MASKED), l2wrap=True)[0]
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_huge_logits_stay_finite(slices):
    hidden, head, targets = random_case(dtype=torch.float32)
    loss = cross_entropy_sum(hidden * 1e4, head, targets)[0]
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, hidden.grad, head.grad))


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(slices, head_dtype):
    hidden, head, targets = random_case(dtype=torch.bfloat16)
    head = head.detach().to(head_dtype).requires_grad_()
    precise = [x.detach().double().requires_grad_() for x in (hidden, head)]
    value, _ = judge(*precise, targets)
    truth = torch.autograd.grad(value / 16, precise)
    loss = cross_entropy_sum(hidden, head, targets)[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value.item(), rel=5e-3)
    (loss / 16).backward()
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, head_dtype)
    for found, wanted in zip((hidden.grad, head.grad), truth, strict=True):
        assert (found.double() - wanted).abs().max() / wanted.abs().max() < 0.03


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that torch's operators make, except views of their inputs."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, torch.Tensor) and output.untyped_storage().data_ptr() not in given:
                self.seen.add(tuple(output.shape))
        return result


@pytest.mark.parametrize("l2wrap", [False, True])
def test_no_tensor_holds_all_logits(form, monkeypatch, l2wrap):
    monkeypatch.setattr(loss_module, "SLICE_LOGITS", 4 * V)
    hidden, head, targets = random_case()
    with Shapes() as shapes:
        cross_entropy_sum(hidden, head, targets, l2wrap)[0].backward()
    sizes = {math.prod(shape) for shape in shapes.seen}
    assert 4 * V in sizes and max(sizes) == max(4 * V, B * T * D)  # a slice of logits, or the hidden vectors
    with Shapes() as shapes:
        token_losses(hidden, head, targets)
    assert max(math.prod(shape) for shape in shapes.seen) <= (4 * V if form == "plain" else B * T * D)


def test_nothing_is_computed_for_what_is_frozen(form):
    hidden, head, targets = random_case()
    head.requires_grad_(False)
    with Shapes() as shapes:
        cross_entropy_sum(hidden, head, targets)[0].backward()
    assert (V, D) not in shapes.seen
    assert hidden.grad.any()
    assert head.grad is None
    wanted = hidden.grad.clone()
    head.requires_grad_()
    hidden.grad = None
    cross_entropy_sum(hidden, head, targets)[0].backward()
    assert torch.equal(hidden.grad, wanted)
    with Shapes() as shapes, torch.no_grad():
        cross_entropy_sum(hidden, head, targets)
    assert not shapes.seen & {(B * T, D), (V, D)}
    head.grad = None
    with Shapes() as shapes:
        cross_entropy_sum(hidden.detach(), head, targets)[0].backward()
    assert (V, D) in shapes.seen
    assert (B * T, D) not in shapes.seen
    assert torch.allclose(head.grad, torch.autograd.grad(judge(hidden, head, targets)[0], head)[0], rtol=1e-12)


def large_case(dtype, tokens=150, vocab=700, width=24):
    random = torch.Generator().manual_seed(3)
    hidden, head = (torch.randn(n, width, generator=random).to(dtype) for n in (tokens, vocab))
    targets = torch.randint(vocab, (1, tokens), generator=random)
    return hidden[None].requires_grad_(), head.requires_grad_(), targets.masked_fill(targets % 5 == 0, MASKED)


def results(hidden, head, targets, l2wrap=True):
    loss = cross_entropy_sum(hidden, head, targets, l2wrap)[0]
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, head)), token_losses(hidden, head, targets)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_as_exact_as_plain(dtype, monkeypatch):
    """Each is compared with float64; in bf16 what counts is rounding, which is the same."""
    case = large_case(dtype)
    truth = results(*(x.detach().double().requires_grad_() for x in case[:2]), case[2])
    monkeypatch.setattr(head_loss, "BLOCK_BYTES", 1 << 16)  # of 700 columns, some
    fused = results(*case)
    monkeypatch.setattr(head_loss, "fits", lambda hidden: False)
    plain = results(*case)
    for place, (ours, torchs, exact) in enumerate(zip(fused, plain, truth, strict=True)):
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (ours, torchs)]
        assert errors[0] <= max(1.05 * errors[1], 5e-7), place
        assert dtype == torch.bfloat16 or (ours - torchs).norm() <= 1e-6 * torchs.norm(), place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit_of_the_passes(dtype, monkeypatch):
    """Torch's own products are left out: theirs may change."""
    monkeypatch.setattr(head_loss, "MIN_THREAD_NUMBERS", 1)
    hidden, head, targets = large_case(dtype)
    product = torch.mm
    found, before = [], torch.get_num_threads()

    def one_thread(*inputs, out):
        torch.set_num_threads(1)
        product(*inputs, out=out)
        torch.set_num_threads(threads)

    monkeypatch.setattr(torch, "mm", one_thread)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(hidden, head, targets))
    finally:
        torch.set_num_threads(before)
    for result in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(result[:2], found[0][:2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nan_reaches_the_loss_and_the_gradients(form, dtype):
    hidden, head, targets = random_case(dtype=dtype, masked=0)
    with torch.no_grad():
        head[5, 2] = torch.nan
    loss, d_hidden, d_head, _ = results(hidden, head, targets)
    assert all(x.isnan().all() for x in (loss, d_hidden)) and d_head.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scales", [False, True])
def test_an_adapter_beside_a_frozen_head(slices, dtype, scales):
    """The judge is torch's loss with the whole matrix that head and adapter are together; nothing of that size is made.

    In bf16, columns and factors are fp32, as an adapter's parameters are.
    """
    hidden, head, targets = random_case(dtype=dtype)
    random = torch.Generator().manual_seed(3)
    rows, columns, factors = (torch.randn(*shape, generator=random).double() for shape in ((B, T, 2), (V, 2), (V,)))
    learned = [rows.to(dtype)] + [part.to(loss_module.state_dtype(dtype)) for part in (columns, factors)[: 1 + scales]]
    learned = [part.requires_grad_() for part in learned]
    adapter = LowRank(learned[0], learned[1], 0.7, learned[2] if scales else None)
    with Shapes() as shapes:
        found = cross_entropy_sum(hidden, head.detach(), targets, True, adapter=adapter)[0]
        gradients = torch.autograd.grad(found, (hidden, *learned))
    assert (V, D) not in shapes.seen
    exact = [part.detach().double().requires_grad_() for part in (hidden, *learned)]
    widened = torch.cat([exact[0], exact[1]], 2), torch.cat([head.detach().double(), 0.7 * exact[2]], 1)
    whole = widened[1] * exact[3][:, None] if scales else widened[1]
    value, regularised = judge(widened[0], whole, targets, 1e-4)
    bar = 1e-12 if dtype == torch.float64 else 0.03
    assert torch.allclose(found.double(), value, rtol=bar)
    assert torch.allclose(token_losses(hidden, head, targets, adapter).double().sum(), value, rtol=bar)
    for part, gradient, truth in zip(
        (hidden, *learned), gradients, torch.autograd.grad(regularised, exact), strict=True
    ):
        assert gradient.dtype == part.dtype
        assert (gradient - truth).abs().max() <= bar * truth.abs().max()
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(hidden, head, targets, adapter=adapter)[0], found)


def test_token_losses(slices):
    hidden, head, targets = random_case()
    losses = token_losses(hidden, head, targets)
    assert losses.shape == (B, T)
    assert not losses.requires_grad
    assert not losses[targets == MASKED].any()
    logits = (hidden @ head.T).flatten(0, 1)
    truth = -logits.log_softmax(1).gather(1, targets.clamp_min(0).flatten()[:, None]).view(B, T)
    assert torch.allclose(losses, truth.masked_fill(targets == MASKED, 0), rtol=1e-12)


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("offset", [0, 1, 7, 15])
def test_a_segment_begins_anywhere_on_the_grid(version, offset):
    """Document starts are at the window's multiples of 16, wherever the segment begins."""
    model = random_model(version, dtype=torch.float64, with_state=True)
    segment_loss = SegmentLoss(model)
    for num_tokens in (1, 10, 16 - offset, 17 - offset, 50):
        tokens, targets = random_tokens(2, num_tokens), random_tokens(2, num_tokens, seed=1)
        state = model.initial_state(2).detach()
        boundaries = [place for place in range(num_tokens) if (offset + place) % 16 == 0]
        starts = torch.arange(2 * len(boundaries)).view(2, -1) % 2 == 1  # at every other boundary
        loss, last, _ = segment_loss(Segment(tokens, targets, starts, offset), state)
        truth, states = 0.0, []
        for row in range(2):
            borders = [0, *(b for b, start in zip(boundaries, starts[row], strict=True) if start and b), num_tokens]
            row_state = state.lanes(slice(row, row + 1))
            for begin, end in zip(borders[:-1], borders[1:], strict=True):
                begins_here = begin in boundaries and bool(starts[row, boundaries.index(begin)])
                row_state = None if begins_here else row_state
                hidden, row_state = model(tokens[row : row + 1, begin:end], row_state)
                truth += F.cross_entropy(model.logits(hidden)[0], targets[row, begin:end], reduction="sum")
            states.append(row_state)
        assert torch.allclose(loss, truth, rtol=1e-12), num_tokens
        for row, row_state in enumerate(states):
            for found, wanted in zip(last.lanes(slice(row, row + 1)), row_state, strict=True):
                assert torch.allclose(found, wanted, rtol=0, atol=1e-12), num_tokens


def test_without_targets_there_is_only_the_state():
    model = random_model(6)
    tokens = random_tokens(1, 20)
    loss, state, _ = SegmentLoss(model)(Segment(tokens, None), model.initial_state(1))
    assert loss.item() == 0
    assert all(torch.equal(*pair) for pair in zip(state, model(tokens)[1], strict=True))

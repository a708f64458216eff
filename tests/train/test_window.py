"""The window: its gradient is that of the whole document, wherever it is cut."""

import pytest
import torch
import torch.nn.functional as F

import infctx
from infctx.errors import InputError
from infctx.model.rwkv import Compute
from infctx.model.state import State
from infctx.train.seams import Seams

from tiny_models import random_model, random_window


def tiny_model(version):
    """Returns a float64 model in which every parameter matters, with a nonzero initial state."""
    return random_model(version, dtype=torch.float64, with_state=True)


def whole_document_gradients(model, tokens, targets, starts, state=None):
    """The judge: one graph over all tokens, torch's cross entropy, one backward call."""
    model.zero_grad()
    hidden, last = model(tokens, state, starts)
    logits = model.logits(hidden)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    return loss.detach(), last.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(model, truth, bar=1e-11):
    for name, parameter in model.named_parameters():
        scale = truth[name].abs().max().clamp_min(1e-30)
        assert ((parameter.grad - truth[name]).abs().max() / scale).item() <= bar, name


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("segment_tokens", [1, 7, 16, 17, 32, 40, 93, 128])
@pytest.mark.parametrize("with_starts", [False, True])
def test_equals_the_whole_document(version, segment_tokens, with_starts):
    model = tiny_model(version)
    tokens, targets, starts = random_window(93, seed=segment_tokens)
    starts = starts if with_starts else None
    loss, last, truth = whole_document_gradients(model, tokens, targets, starts)
    model.zero_grad()
    found_loss, found_last = infctx.window_backward(model, tokens, targets, segment_tokens, starts=starts)
    assert abs(found_loss.item() - loss.item()) <= 1e-12
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found_last, last, strict=True))
    assert not any(part.requires_grad for part in found_last)
    assert truth["initial_wkv"].any()
    assert_same_gradients(model, truth)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_the_incoming_state_receives_its_gradient(version):
    model = tiny_model(version)
    tokens, targets, starts = random_window(70)
    starts[:, 0] = False
    random = torch.Generator().manual_seed(1)
    shapes = [part.shape for part in model.initial_state(2)]
    values = State(*(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes))
    state = values.leaf()
    _, _, truth = whole_document_gradients(model, tokens, targets, starts, state)
    wanted = state.gradient()
    state = values.leaf()
    model.zero_grad()
    infctx.window_backward(model, tokens, targets, 16, starts=starts, state=state)
    assert_same_gradients(model, truth)
    for found, truth_part in zip(state.gradient(), wanted, strict=True):
        assert truth_part.any()
        assert torch.allclose(found, truth_part, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("gradient_segments", [1, 2, 3])
def test_gradient_segments_equal_detached_truncation(gradient_segments):
    model = tiny_model(6)
    tokens, targets, starts = random_window(100)
    stretch = 16 * gradient_segments
    model.zero_grad()
    state, num_targets = None, (targets != -100).sum()
    starts[:, 0] = True
    for begin in range(0, 100, stretch):
        part = slice(begin, begin + stretch)
        hidden, state = model(tokens[:, part], state, starts[:, begin // 16 : (begin + stretch) // 16])
        logits = model.logits(hidden).flatten(0, 1)
        loss = F.cross_entropy(logits, targets[:, part].flatten(), ignore_index=-100, reduction="sum")
        (loss / num_targets).backward()
        state = state.detach()
    truth = {name: p.grad.clone() for name, p in model.named_parameters()}
    _, _, exact = whole_document_gradients(model, tokens, targets, starts)
    model.zero_grad()
    infctx.window_backward(model, tokens, targets, 16, gradient_segments, starts)
    assert_same_gradients(model, truth, bar=1e-13)
    with pytest.raises(AssertionError):
        assert_same_gradients(model, exact, bar=1e-3)  # the truncated gradient differs


def test_the_carry_continues_where_the_window_ended():
    model = tiny_model(6)
    tokens, targets, starts = random_window(96)
    whole_loss, last = infctx.window_backward(model, tokens, targets, 16, starts=starts)
    first_loss, state = infctx.window_backward(model, tokens[:, :48], targets[:, :48], 16, starts=starts[:, :3])
    second_loss, state = infctx.window_backward(
        model, tokens[:, 48:], targets[:, 48:], 16, starts=starts[:, 3:], state=state
    )
    counts = [(part != -100).sum() for part in (targets[:, :48], targets[:, 48:])]
    mean = (first_loss * counts[0] + second_loss * counts[1]) / sum(counts)
    assert torch.allclose(mean, whole_loss, rtol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(state, last, strict=True))


def test_gradients_add_up():
    model = tiny_model(5)
    tokens, targets, _ = random_window(40)
    infctx.window_backward(model, tokens, targets, 16)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    infctx.window_backward(model, tokens, targets, 16)
    assert_same_gradients(model, {name: 2 * gradient for name, gradient in once.items()}, bar=1e-13)


def test_all_masked_targets_give_zero_loss_and_zero_gradients():
    model = tiny_model(6)
    tokens, targets, _ = random_window(40)
    loss, _ = infctx.window_backward(model, tokens, torch.full_like(targets, -100), 16)
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_float32_is_exact_to_rounding():
    model = tiny_model(6)
    tokens, targets, starts = random_window(93)
    _, _, truth = whole_document_gradients(model, tokens, targets, starts)
    model.zero_grad()
    model.float()
    infctx.window_backward(model, tokens, targets, 16, starts=starts)
    assert_same_gradients(model, truth, bar=2e-5)


@pytest.mark.parametrize("version", [6, 7])  # 7 hands the values of its first block to the others
def test_recomputed_blocks_change_nothing(version):
    model = tiny_model(version)
    tokens, targets, starts = random_window(93)
    infctx.window_backward(model, tokens, targets, 32, starts=starts)
    truth = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.compute = Compute(recompute_blocks=True)
    infctx.window_backward(model, tokens, targets, 32, starts=starts)
    assert all(torch.equal(p.grad, truth[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("store", ["auto", "device", "host"])
def test_seams_return_the_states_put_in(store):
    model = tiny_model(6)
    state = State(*(torch.randn_like(part) for part in model.initial_state(3)))
    seams = Seams(range(3, 7), state, store)
    seams.put(5, state)
    assert all(torch.equal(a, b) for a, b in zip(seams.get(5), state, strict=True))
    with pytest.raises(InputError, match="seam_store: 'disk'"):
        Seams(range(1), state, "disk")


def test_input_that_does_not_fit_is_named():
    model = tiny_model(6)
    tokens, targets, starts = random_window(40)
    for arguments, match in [
        ((tokens, targets[:, 1:], 16), "tokens and targets"),
        ((tokens, targets, 0), "segment_tokens"),
        ((tokens, targets, 16, 0), "gradient_segments"),
        ((tokens, targets, 16, None, starts[:, :1]), "starts must be"),
        ((tokens, targets, 16, None, starts.long()), "starts must be"),
    ]:
        with pytest.raises(InputError, match=match):
            infctx.window_backward(model, *arguments)

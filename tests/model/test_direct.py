"""Gradients that products add to `.grad` themselves: the same as autograd's, and only where nothing looks at them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import infctx
from infctx.conventions import MASKED
from infctx.model import layers
from infctx.model import loss as loss_module
from infctx.model.direct import adding_directly, adds_directly
from infctx.model.rwkv import Compute
from infctx.train import window

from tiny_models import random_model, random_tokens


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 1)


def gradients(model, directly, monkeypatch):
    """Returns the loss and gradients of a window of two lanes and five segments, some of it without targets."""
    monkeypatch.setattr(window.PlainBackward, "alone", directly)
    tokens, targets = random_tokens(2, 75), random_tokens(2, 75, seed=1)
    model.zero_grad()
    loss, _ = infctx.window_backward(model, tokens, targets.masked_fill(tokens % 7 == 0, MASKED), 16)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_they_are_autograds(version, slices, monkeypatch):
    model = random_model(version, dtype=torch.float64, with_state=True)
    monkeypatch.setattr(loss_module, "SLICE_LOGITS", 32 * model.sizes.vocab_size // slices)
    direct, plain = (gradients(model, directly, monkeypatch) for directly in (True, False))
    assert torch.equal(direct[0], plain[0]) and direct[1].keys() == plain[1].keys()
    for name, found in direct[1].items():
        assert (found - plain[1][name]).norm() <= 1e-13 * plain[1][name].norm(), name


class Casts(TorchDispatchMode):
    """Counts the casts of each weight to bf16."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.seen.append(self.names[args[0].data_ptr()])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_are_cast_to_bf16_once(monkeypatch, recompute):
    """With recomputation, in every pass: the copies of all blocks would take memory.  The gradients are the same."""
    model = random_model(7)
    model.compute = Compute(torch.bfloat16, recompute)
    direct, plain = (gradients(model, directly, monkeypatch)[1] for directly in (True, False))
    for name, found in direct.items():
        assert (found - plain[name]).norm() <= 1e-6 * plain[name].norm(), name
    with Casts(model) as casts:
        gradients(model, True, monkeypatch)
    key = casts.seen.count("blocks.1.channel_mix.key.weight")
    assert casts.seen.count("head.weight") == (5 if recompute else 1) and (key == 1) == (not recompute)
    before, _ = gradients(model, True, monkeypatch)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert gradients(model, True, monkeypatch)[0] != before  # the next step sees new weights


def test_autograd_is_spared_the_large_matrices(monkeypatch):
    """A hook that autograd calls with each finished gradient sees them once a step, or in every segment."""
    model, seen = random_model(6), []
    weights = {
        "head": model.head.weight,
        "embedding": model.embedding.weight,
        "key": model.blocks[0].channel_mix.key.weight,
    }
    nodes = {name: weight.view_as(weight).grad_fn.next_functions[0][0] for name, weight in weights.items()}
    for name, node in nodes.items():
        node.register_hook(lambda _, given, name=name: seen.extend([name] * (given[0] is not None)))
    for directly, times in ((True, 1), (False, 5)):
        seen.clear()
        gradients(model, directly, monkeypatch)
        assert [seen.count(name) for name in ("embedding", "key")] == [times] * 2
        assert seen.count("head") == (0 if directly else 5)


def test_only_where_nothing_looks_at_a_gradient():
    weight = torch.nn.Parameter(torch.ones(3))
    assert not adds_directly(weight)
    with adding_directly(True):
        assert adds_directly(weight) and not adds_directly(weight * 1)
        assert not adds_directly(torch.nn.Parameter(weight.bfloat16()))
        with adding_directly(False):
            assert not adds_directly(weight)
        for register in (weight.register_hook, weight.register_post_accumulate_grad_hook):
            hook = register(lambda _: None)
            assert not adds_directly(weight)
            hook.remove()
        assert adds_directly(weight)
    assert not adds_directly(weight)

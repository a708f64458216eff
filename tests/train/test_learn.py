"""State tuning: the gradient of whole documents, for the state alone, in units of the model's own states."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import infctx
from infctx.data.lanes import Window
from infctx.evaluate.held_out import without_state
from infctx.model.quantized import QuantizedLinear, quantize_layers
from infctx.model.rwkv import Compute
from infctx.settings.window import WindowSettings
from infctx.train.learn import freeze_weights, natural_units

from tiny_models import random_model, random_tokens


@pytest.mark.parametrize(
    ("shifts", "recompute", "frozen_dtype"),
    [(False, False, None), (True, True, None), (False, True, "nf4"), (True, False, "int8")],
)
@pytest.mark.parametrize("version", [5, 6, 7])
def test_the_gradient_is_that_of_whole_documents(version, shifts, recompute, frozen_dtype):
    """In float64.  The judge reads documents one by one, each in one graph, with a loop over time.

    It has what quantized matrices are worth, as plain ones.
    """
    model = random_model(version, dtype=torch.float64, backend="chunked", num_layers=3)
    freeze_weights(model, shifts)
    judge = random_model(version, dtype=torch.float64, backend="reference", num_layers=3)
    freeze_weights(judge, shifts)
    if frozen_dtype:
        quantize_layers(model, frozen_dtype)
        for name, layer in model.blocks.named_modules():
            if isinstance(layer, QuantizedLinear):
                judge.blocks.get_submodule(name).weight.data = layer.matrix(torch.float64)
    frozen = {name: part.clone() for name, part in model.named_parameters() if not part.requires_grad}
    model.compute = Compute(recompute_blocks=recompute)
    random = torch.Generator().manual_seed(version)
    for part in model.initial_parts():
        if part is not None:
            part.data.normal_(generator=random)
    lanes = [[75, 1, 60, 20], [176], [16, 16, 130]]  # tokens of the documents in each lane, each at a multiple of 16
    length, segment = 192, 23  # nine segments
    tokens = random_tokens(len(lanes), length)
    targets = torch.full_like(tokens, -100)
    starts = torch.zeros(len(lanes), length // 16, dtype=torch.bool)
    documents = []
    for lane, lengths in enumerate(lanes):
        place = 0
        for count in lengths:
            assert place + count <= length
            wanted = random_tokens(1, count, seed=place + lane)
            targets[lane, place : place + count] = wanted
            starts[lane, place // 16] = True
            documents.append((tokens[lane : lane + 1, place : place + count], wanted))
            place += -(-count // 16) * 16
    loss, _ = infctx.window_backward(model, tokens, targets, segment, starts=starts)
    learned = [part for part in model.initial_parts() if part is not None]
    found = [part.grad for part in learned]

    for its, mine in zip(judge.initial_parts(), model.initial_parts(), strict=True):
        if its is not None:
            its.data = mine.detach().clone()
    total = 0
    for inputs, wanted in documents:
        hidden, _ = judge(inputs)
        total = total + F.cross_entropy(judge.logits(hidden)[0], wanted[0], reduction="sum")
    total = total / sum(wanted.numel() for _, wanted in documents)
    truth = torch.autograd.grad(total, [part for part in judge.initial_parts() if part is not None])
    assert abs(loss - total) <= 1e-11
    assert len(found) == len(truth) == (3 if shifts else 1)
    for mine, its in zip(found, truth, strict=True):
        assert its.norm() > 1e-3
        assert (mine - its).norm() <= 1e-11 * its.norm()
    assert all(model.get_parameter(name).grad is None for name in frozen)
    assert all(torch.equal(model.get_parameter(name), part) for name, part in frozen.items())


class Flops(TorchDispatchMode):
    """Counts the operations of matrix products; torch's counter stops at modules without gradients."""

    total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if operation.overloadpacket in flop_registry:
            self.total += flop_registry[operation.overloadpacket](*arguments, **(options or {}), out_val=result)
        return result


@pytest.mark.parametrize("version", [5, 6, 7])
def test_no_work_is_done_for_frozen_weights(version):
    """For each matrix product forward, training all weights needs two backward, and tuning a state one."""
    sizes = {"num_layers": 4, "width": 64, "head_size": 32, "vocab_size": 64, "backend": "compiled"}
    tokens = random_tokens(1, 256, vocab_size=64)
    flops = {}
    for learn in ("weights", "state", "nothing"):
        model = random_model(version, **sizes)
        if learn != "weights":
            freeze_weights(model)
        with Flops() as counter, torch.set_grad_enabled(learn != "nothing"):
            if learn == "nothing":
                model.logits(model(tokens)[0])
            else:
                infctx.window_backward(model, tokens, tokens, 256)
        flops[learn] = counter.total
    forward = flops["nothing"]
    assert flops["weights"] == pytest.approx(3 * forward, rel=0.02)
    assert flops["state"] == pytest.approx(2 * forward, rel=0.02)


def test_frozen_weights_keep_no_inputs():
    """Autograd keeps less for the backward pass of a segment than when all weights learn."""
    held = {}
    for learn in ("weights", "state"):
        model = random_model(6, num_layers=4, width=64, head_size=32, vocab_size=64)
        freeze_weights(model) if learn == "state" else None
        storages = {}

        def keep(tensor, storages=storages, mine={p.data_ptr() for p in model.parameters()}):  # noqa: B006, B008
            if tensor.data_ptr() not in mine:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden, _ = model(random_tokens(1, 256, vocab_size=64), model.initial_state(1))
        held[learn] = sum(storages.values())
        del hidden
    assert held["state"] < 0.8 * held["weights"]


def test_without_state():
    model = random_model(6, with_state=True)
    parts = model.initial_parts()
    with without_state(model):
        assert not any(part.any() for part in model.initial_state(2))
    assert model.initial_parts() == parts
    assert "initial_wkv" in dict(model.named_parameters())


@pytest.mark.parametrize("lanes_per_pass", [None, 1])
def test_units_are_the_size_of_the_models_own_states(lanes_per_pass):
    model = random_model(6, noise=0.05, num_layers=2, width=32, head_size=16, vocab_size=257)
    tokens = random_tokens(3, 64, vocab_size=257)
    starts = torch.zeros(3, 4, dtype=torch.bool)
    starts[:, 0] = starts[1, 2] = True
    settings = WindowSettings(segment_tokens=32, window_tokens=64, lanes=3, lanes_per_pass=lanes_per_pass)
    units = natural_units(model, Window(tokens, tokens, starts, None, [], 1, [1], 0), settings)
    assert [unit.shape for unit in units] == [(2, 2, 16, 1), (2, 1), (2, 1)]
    first = model(tokens[:, :32])[1]
    second = model(tokens[:, 32:], first, starts[:, 2:])[1]
    both = torch.stack([first.wkv, second.wkv])  # (2, L, B, H, N, N)
    wanted = both.double().square().mean((0, 2, 5)).sqrt()[..., None]
    ratio = units.wkv / wanted
    assert ratio.min() > 0.7 and ratio.max() < 1.42
    assert all(torch.equal(unit.log2(), unit.log2().round()) for unit in units)  # powers of two
    freeze_weights(model, shifts=True)
    for part in model.initial_parts():
        torch.nn.init.normal_(part)
    before, gradients = model.initial_state(1), {}
    for name in ("one", "units"):
        model.zero_grad()
        infctx.window_backward(model, tokens, tokens, 32, starts=starts)
        gradients[name] = [part.grad.clone() for part in model.initial_parts()]
        if name == "one":
            model.set_initial_units(units)
            assert all(torch.equal(*pair) for pair in zip(model.initial_state(1), before, strict=True))
            assert not torch.equal(model.initial_wkv, before.wkv[:, 0])
    for one, other, unit in zip(gradients["one"], gradients["units"], units, strict=True):
        assert torch.allclose(one * unit, other, rtol=1e-6, atol=0)

"""Adapters: their mathematics, their gradient over segments, and dropout that is drawn from places."""

import pytest
import torch
import torch.nn.functional as F

import infctx
from infctx.adapters.dropout import kept, row_keys
from infctx.adapters.forms import merged
from infctx.adapters.install import adapters_of, add_adapters, learned_names
from infctx.adapters.targets import count_learned, refuse_targets
from infctx.errors import InputError
from infctx.model import loss
from infctx.model.layers import Linear
from infctx.model.loss import SegmentLoss
from infctx.model.rwkv import Compute
from infctx.settings.adapter import AdapterSettings
from infctx.train.window import PlainBackward, backward_through_window, cut_window

from tiny_models import random_model, random_tokens

FORMS = ("lora", "dora", "miss")
ALL = ["norms", "mixes", "decays", "bonus"]


def adapted(version, settings, **options):
    """Returns a model with an adapter whose every number is random, so that none can be mistaken for another."""
    model = random_model(version, **options)
    add_adapters(model, settings, seed=1)
    random = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if ".adapter." in name or name.startswith("initial_"):
                part += 0.2 * torch.randn(part.shape, generator=random, dtype=torch.float64).to(part.dtype)
    return model


def packed_window(version):
    """Returns (3, 96) tokens, targets and starts of several documents, and these documents one by one."""
    lanes = [[35, 1, 30], [90], [16, 16, 60]]
    tokens, targets = random_tokens(3, 96, seed=version), torch.full((3, 96), -100)
    starts, documents = torch.zeros(3, 6, dtype=torch.bool), []
    for lane, lengths in enumerate(lanes):
        place = 0
        for count in lengths:
            wanted = random_tokens(1, count, seed=place + lane)
            targets[lane, place : place + count] = wanted
            starts[lane, place // 16] = True
            documents.append((lane, slice(place, place + count), wanted))
            place += -(-count // 16) * 16
    return tokens, targets, starts, documents


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", [5, 6, 7])
def test_the_gradient_is_that_of_whole_documents(monkeypatch, version, form):
    """In float64, over nine segments, with dropout.  The judge reads each document in one graph, over a plain loop."""
    monkeypatch.setattr(loss, "SLICE_LOGITS", 7 * 19)  # the head is applied to seven tokens at a time
    where = ["all", "head"] + ["emb"] * (form == "lora")
    settings = AdapterSettings(form=form, rank=5, dropout=0.25, where=where, train_too=ALL, initial_state=True)
    tokens, targets, starts, documents = packed_window(version)
    rows = row_keys(7, 3, range(3), 96, tokens.device)
    model = adapted(version, settings, dtype=torch.float64, backend="chunked")
    model.compute = Compute(recompute_blocks=form != "dora" or version == 6, backend="chunked")
    state = model.initial_state(3).detach()
    count = int((targets >= 0).sum())
    segments = cut_window(tokens, targets, starts, 11, rows=rows)
    assert len(segments) == 9
    losses, _ = backward_through_window(SegmentLoss(model), segments, state, PlainBackward(1 / count))

    judge = adapted(version, settings, dtype=torch.float64, backend="reference")
    judge.load_state_dict(model.state_dict())
    total = 0
    for lane, place, wanted in documents:
        drawn = rows[lane : lane + 1, place]
        hidden, _ = judge(tokens[lane : lane + 1, place], rows=drawn)
        total = total + F.cross_entropy(judge.logits(hidden, drawn)[0], wanted[0], reduction="sum")
    (total / count).backward()
    assert abs(losses.sum() - total) <= 1e-10
    learning = [name for name, part in model.named_parameters() if part.requires_grad]
    have = {name.partition(".adapter.")[0] for name in learning if ".adapter." in name}
    assert have == set(adapters_of(model)) and "head" in have and ("embedding" in have) == (form == "lora")
    assert "initial_wkv" in learning
    for name in learning:
        truth = judge.get_parameter(name).grad
        assert truth.any(), name
        assert (model.get_parameter(name).grad - truth).abs().max() <= 1e-11 * truth.abs().max(), name
    assert all(part.grad is None for part in model.parameters() if not part.requires_grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(24, 40, 5), (23, 7, 8), (12, 12, 12)])
def test_the_formulas_are_those_of_peft(form, inputs, outputs, rank):
    """As peft writes them (lora/layer.py, lora/dora.py, miss/layer.py): forward, gradients, and the merged matrix."""
    torch.manual_seed(0)
    settings = AdapterSettings(form=form, rank=rank, alpha=None if form == "miss" else 3.0)
    model = random_model(6, dtype=torch.float64)
    layer = Linear(inputs, outputs).double().requires_grad_(False)
    model.blocks[0].time_mix.key = layer
    add_adapters(model, settings.model_copy(update={"where": ["att.key"]}), seed=2)
    adapter, x = layer.adapter, torch.randn(2, 9, inputs, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(layer(x), F.linear(x, layer.weight), rtol=0, atol=1e-13)  # a new one changes nothing
    parts = dict(adapter.named_parameters())
    for part in parts.values():
        part.data += torch.randn_like(part)
    weight, up, scale = layer.weight, torch.randn(2, 9, outputs, dtype=torch.float64), 3.0 / rank
    if form == "miss":
        padded = F.pad(x, (0, -inputs % rank))
        theirs = F.linear(x, weight) + padded.reshape(2, 9, -1, rank).sum(-2) @ parts["block"]
    else:
        product = F.linear(F.linear(x, parts["down"]), parts["up"]) * scale
        theirs = F.linear(x, weight) + product
    if form == "dora":
        length = torch.linalg.norm(weight + scale * (parts["up"] @ parts["down"]).detach(), dim=1)
        factor = (parts["magnitude"] / length).view(1, -1)
        theirs = F.linear(x, weight) + (factor - 1) * F.linear(x, weight) + factor * product
    ours = layer(x)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    wanted = [x, *parts.values()]
    for mine, its in zip(*(torch.autograd.grad((y * up).sum(), wanted) for y in (ours, theirs)), strict=True):
        assert its.any() and torch.allclose(mine, its, rtol=1e-11, atol=1e-11)
    matrix = merged(form, weight, {name: part.detach() for name, part in parts.items()}, settings.scale)
    assert torch.allclose(F.linear(x, matrix), ours, rtol=1e-12, atol=1e-12)


def test_lora_of_full_rank_can_go_where_fine_tuning_goes():
    """With rank = width and B = 0, a step of A and B moves W in full fine-tuning's direction, if A is orthogonal."""
    torch.manual_seed(1)
    width = 24
    model, full = (random_model(6, dtype=torch.float64, backend="chunked") for _ in range(2))
    tokens, targets = random_tokens(2, 40), random_tokens(2, 40, seed=1)
    add_adapters(model, AdapterSettings(rank=width), seed=0)
    for adapter in adapters_of(model).values():
        columns = adapter.down.shape[1]
        orthogonal = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))[0]
        adapter.down.data = orthogonal[: adapter.rank]
    for each in (model, full):
        infctx.window_backward(each, tokens, targets, 16)
    for name, adapter in adapters_of(model).items():
        wanted = full.get_parameter(f"{name}.weight").grad
        moved = (
            adapter.up.grad @ adapter.down.detach()
        )  # the step of W is -lr of this, as A has no gradient where B = 0
        assert not adapter.down.grad.any()
        if wanted.shape[1] == width:  # otherwise its rank is too low for every direction
            assert torch.allclose(moved, wanted, rtol=1e-9, atol=1e-12), name


def test_dropout_is_drawn_from_places():
    rows = row_keys(5, 2, range(4), 64, torch.device("cpu"))
    mask = kept(rows, 3, 50, 0.3)
    assert mask.shape == (4, 64, 50)
    assert abs(mask.double().mean() - 0.7) < 0.01
    for dimension in (0, 1, 2):  # no lane, token or channel stays or goes as a whole, nor like another
        others = [each for each in range(3) if each != dimension]
        assert (mask.double().mean(others) - 0.7).abs().max() < 0.15
    by_row = mask.flatten(0, 1).double() - 0.7
    assert torch.corrcoef(by_row).fill_diagonal_(0).abs().mean() < 0.15
    assert torch.equal(kept(row_keys(5, 2, range(1, 3), 64, rows.device), 3, 50, 0.3), mask[1:3])
    assert torch.equal(kept(rows[:, 20:31], 3, 50, 0.3), mask[:, 20:31])
    changes = [kept(row_keys(*key, range(4), 64, rows.device), 3, 50, 0.3) for key in ((6, 2), (5, 3))]
    for other in (*changes, kept(rows, 4, 50, 0.3)):
        assert abs((other == mask).double().mean() - 0.58) < 0.02  # as of two that know nothing of each other
    model = adapted(6, AdapterSettings(rank=4, dropout=0.5), backend="chunked")
    tokens = random_tokens(4, 64)
    assert torch.equal(model(tokens)[0], model(tokens)[0])  # none outside of training
    assert not torch.equal(model(tokens, rows=rows)[0], model(tokens)[0])


def test_a_lookup_is_a_product_with_one_input():
    """As peft's lora.Embedding writes it; merged, and as the product of the transposed table with a vector of one 1."""
    torch.manual_seed(0)
    model, tokens = random_model(7, dtype=torch.float64), random_tokens(2, 9)
    add_adapters(model, AdapterSettings(rank=5, alpha=3.0, dropout=0.5, where=["emb"]), seed=2)
    table, adapter = model.embedding.weight, model.embedding.adapter
    assert torch.equal(model._embed(tokens), F.embedding(tokens, table)) and adapter.up.any()
    adapter.down.data += torch.randn_like(adapter.down)
    found = model._embed(tokens)
    theirs = F.embedding(tokens, table) + F.embedding(tokens, adapter.down.T) @ adapter.up.T * 3.0 / 5
    matrix = merged("lora", table.T, {name: part.detach() for name, part in adapter.named_parameters()}, 3.0 / 5)
    for wanted in (theirs, F.linear(F.one_hot(tokens, 19).double(), matrix)):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("form", FORMS)
def test_what_learns_is_counted(version, form):
    where = ["head", "all"] + ["emb"] * (form == "lora")
    settings = AdapterSettings(form=form, rank=5, where=where, train_too=ALL, initial_state=True)
    model = random_model(version, num_layers=3)
    add_adapters(model, settings, seed=0)
    learned = sum(part.numel() for part in model.parameters() if part.requires_grad)
    assert count_learned(settings, model.sizes) == learned
    kinds = {name.rpartition(".")[2] for name in learned_names(model)}
    assert {"weight", "bias", "bonus", "decay", "mix_key"} <= kinds


def test_matrices_that_a_version_does_not_have():
    sizes = random_model(7).sizes
    for name in ("att.gate", "ffn.receptance"):
        with pytest.raises(
            InputError, match=f"there is no {name} in Goose; it has att.receptance, att.key, att.value, "
        ):
            refuse_targets(AdapterSettings(where=["att.key", name]), sizes)
        refuse_targets(AdapterSettings(where=[name]), random_model(5).sizes)
    for where, count in (
        ("all", 12),
        ("attention", 8),
        (["att.key", "ffn.value"], 4),
        (["emb", "attention", "att.key", "head"], 10),
    ):
        model = random_model(7)
        add_adapters(model, AdapterSettings(where=where), seed=0)
        assert len(adapters_of(model)) == count

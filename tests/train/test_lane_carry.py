"""window.carry: lane: documents start from the state before them, and no gradient crosses a border."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import infctx
from infctx.model.rwkv import Compute
from infctx.settings.load import load_config
from infctx.train.loop import train

from runs import losses_of, open_run, write_config, write_store
from tiny_models import random_model, random_window


def lane_model(version, **compute):
    """Returns a float64 model with an initial state, whose lanes carry on."""
    model = random_model(version, dtype=torch.float64, with_state=True)
    model.compute = Compute(carry="lane", **compute)
    for part in model.initial_parts():
        if part is not None:
            part.requires_grad_(False)
    return model


def one_after_another(model, tokens, targets, starts, state=None):
    """The judge: runs the documents of each lane in turn, with plain autograd, detached at each border.

    Returns the gradients of the mean loss, the loss, and the state after the last document of each lane.
    """
    model.zero_grad()
    whole = replace(model.compute, carry="document")
    loss, states, model.compute, before = 0.0, [], whole, model.compute
    for lane in range(len(tokens)):
        borders = [16 * place for place, start in enumerate(starts[lane].tolist()) if start and place]
        now = model.initial_state(1) if state is None else state.lanes(slice(lane, lane + 1))
        for begin, end in zip([0, *borders], [*borders, tokens.shape[1]], strict=True):
            hidden, now = model(tokens[lane : lane + 1, begin:end], now.detach())
            logits = model.logits(hidden)[0]
            loss = loss + F.cross_entropy(logits, targets[lane, begin:end], ignore_index=-100, reduction="sum")
        states.append(now.detach())
    loss = loss / (targets != -100).sum()
    loss.backward()
    model.compute = before
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return gradients, loss.item(), type(states[0]).join_lanes(states)


def assert_same(model, truth, loss, last, found):
    found_loss, found_last = found
    assert abs(found_loss.item() - loss) <= 1e-12
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(found_last, last, strict=True))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = truth[name].abs().max().clamp_min(1e-30)
            assert ((parameter.grad - truth[name]).abs().max() / scale).item() <= 1e-11, name
        else:
            assert name.startswith("initial_") and parameter.grad is None


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("segment_tokens", [1, 7, 16, 17, 40, 93, 128])
def test_equals_one_document_after_another(version, segment_tokens):
    """In one window, and in a second that continues from it; wherever segments are cut."""
    model, state = lane_model(version), None
    for seed, num_tokens in enumerate((93, 48)):
        tokens, targets, starts = random_window(num_tokens, batch=3, seed=segment_tokens + seed, start_rate=0.4)
        truth, loss, last = one_after_another(model, tokens, targets, starts, state)
        model.zero_grad()
        found = infctx.window_backward(model, tokens, targets, segment_tokens, starts=starts, state=state)
        assert_same(model, truth, loss, last, found)
        state = found[1]


@pytest.mark.parametrize(
    "compute", [{"backend": "chunked"}, {"backend": "reference"}, {"recompute_blocks": True}], ids=str
)
def test_all_ways_to_compute_agree(compute):
    backend = compute.get("backend", "auto")
    model = random_model(6, dtype=torch.float64, backend=backend)
    model.compute = Compute(carry="lane", **compute)
    tokens, targets, starts = random_window(93, batch=3, start_rate=0.5)
    truth, loss, last = one_after_another(model, tokens, targets, starts)
    model.zero_grad()
    assert_same(model, truth, loss, last, infctx.window_backward(model, tokens, targets, 40, starts=starts))


def test_the_border_matters():
    """Neither the initial state nor a gradient through the border gives the same."""
    model = lane_model(6)
    tokens, targets, starts = random_window(93, batch=3, start_rate=0.4)
    truth, loss, _ = one_after_another(model, tokens, targets, starts)
    through, same_loss, _ = one_after_another(model, tokens, targets, torch.zeros_like(starts))
    assert abs(same_loss - loss) < 1e-12  # the same states, but no border
    off = [((through[name] - truth[name]).abs().max() / truth[name].abs().max()).item() for name in truth]
    assert max(off) > 1e-5, max(off)
    model.compute = Compute()
    other_loss, _ = infctx.window_backward(model, tokens, targets, 40, starts=starts)
    assert abs(other_loss.item() - loss) > 1e-3


def test_the_setting(tmp_path):
    """A run starts its lanes from the initial state, which stays as it is, and resumes where it was."""
    model = infctx.build_model(version=6, num_layers=2, width=32, head_size=16, vocab_size=257)
    model.add_initial_state()
    with torch.no_grad():
        model.initial_wkv += torch.randn_like(model.initial_wkv)
    infctx.save_weights(model, tmp_path / "model.pth")
    write_store(tmp_path / "train", lengths=(60, 90, 33, 150, 20))
    path = write_config(
        tmp_path, model={"weights": str(tmp_path / "model.pth")}, window__carry="lane", optimizer__steps=4,
        run__save_every_steps=2, data={"store": str(tmp_path / "train")},
    )  # fmt: skip
    run = open_run(load_config(path))
    assert torch.equal(run.carry.wkv, model.initial_wkv[:, None].expand_as(run.carry.wkv))
    train(load_config(path))
    whole = losses_of(tmp_path / "run")
    learned = infctx.load_model(tmp_path / "run" / "model.pth")
    assert torch.equal(learned.initial_wkv, model.initial_wkv)
    train(load_config(path, [f"run.folder={tmp_path}/other", "window.carry=document"]))
    assert losses_of(tmp_path / "other")[-1] != whole[-1]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    train(load_config(path))
    assert losses_of(tmp_path / "run") == whole
    train(load_config(path, ["window.carry=document", "optimizer.steps=5"]))  # now the initial state learns
    assert not torch.equal(infctx.load_model(tmp_path / "run" / "model.pth").initial_wkv, model.initial_wkv)
    train(load_config(path, ["optimizer.steps=6"]))

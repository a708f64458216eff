"""The model against the golden files: a float64 reference and the rwkv package, every version, cut anywhere."""

import functools

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F

import infctx
from infctx.errors import InputError
from infctx.formats.weights import stored_names
from infctx.model.delta_time_mix import _Removal
from infctx.model.rwkv import Compute
from infctx.model.sizes import PUBLISHED_SIZES
from infctx.model.state import State
from infctx.ops.wkv import BACKENDS

from places import GOLDEN
from tiny_models import random_model, random_tokens

CPU_BACKENDS = [name for name in BACKENDS if name != "cuda"]
NAMES = ("eagle", "finch", "goose")
TAGS = ("", "init_")
BARS = {
    torch.float32: {"logits": 5e-5, "wkv": 1e-4, "shift": 5e-5},
    torch.float64: dict.fromkeys(("logits", "wkv", "shift"), 1e-10),
}


@functools.cache
def golden(name):
    """Returns the arrays of one golden file by name."""
    return {key: torch.from_numpy(array) for key, array in np.load(GOLDEN / f"{name}-tiny.npz").items()}


@functools.cache
def golden_gradients(name):
    return {key: torch.from_numpy(array) for key, array in np.load(GOLDEN / f"{name}-tiny-grads.npz").items()}


@pytest.fixture(scope="session")
def golden_paths(tmp_path_factory):
    """(name, tag) -> the weights; for the tuned state, one file with weights and state, like an official one."""
    paths = {}
    for name in NAMES:
        paths[name, ""] = GOLDEN / f"{name}-tiny.pth"
        paths[name, "init_"] = tmp_path_factory.mktemp("golden") / f"{name}-with-state.pth"
        parts = [torch.load(GOLDEN / f"{name}-tiny{end}.pth", weights_only=True) for end in ("", "-state")]
        torch.save(parts[0] | parts[1], paths[name, "init_"])
    return paths


def assert_state_is(state, name, tag, after, bars):
    matrices = golden(name)[f"{tag}state{after}_ref64_S"]
    matrices = matrices.mT if name == "goose" else matrices  # value-major, as the package holds it
    assert (state.wkv[:, 0] - matrices).abs().max() <= bars["wkv"]
    for found, stored in ((state.time_shift, "att_x"), (state.channel_shift, "ffn_x")):
        assert (found[:, 0] - golden(name)[f"{tag}state{after}_ref64_{stored}"]).abs().max() <= bars["shift"], stored


def run_in_pieces(model, tokens, borders):
    """Returns logits (T, V) and the state after each part, for tokens cut at the borders."""
    state, logits, states = None, [], []
    for begin, end in zip([0, *borders], [*borders, len(tokens)], strict=True):
        hidden, state = model(tokens[None, begin:end], state)
        logits.append(model.logits(hidden)[0])
        states.append(state)
    return torch.cat(logits), states


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equals_the_golden_files_cut_at_every_place(golden_paths, name, tag, backend, dtype):
    model = infctx.load_model(golden_paths[name, tag], dtype=dtype, backend=backend)
    tokens, bars = golden(name)["tokens"], BARS[dtype]
    cuts = range(1, 64) if dtype == torch.float64 else (1, 2, 15, 16, 17, 31, 32, 33, 48, 62, 63)
    for borders in [[], list(range(1, 64)), *([cut] for cut in cuts)]:
        logits, states = run_in_pieces(model, tokens, borders)
        assert logits.dtype == dtype
        error = (logits - golden(name)[f"{tag}logits_ref64"]).abs().max()
        assert error <= bars["logits"], borders
        assert_state_is(states[-1], name, tag, 64, bars)
        if 32 in borders:
            assert_state_is(states[borders.index(32)], name, tag, 32, bars)


def stored_gradients(model):
    """Returns gradients by official name; the initial state's is value-major, as stored."""
    names = stored_names(model.sizes)
    gradients = {names[ours]: p.grad for ours, p in model.named_parameters() if ours in names and p.requires_grad}
    if model.initial_wkv is not None:
        gradients |= {f"blocks.{n}.att.time_state": grad.mT for n, grad in enumerate(model.initial_wkv.grad)}
    return gradients


def assert_gradients_are(model, name, tag):
    found, checked = stored_gradients(model), set()
    for key, truth in golden_gradients(name).items():
        if key.startswith("init_") == bool(tag):
            key = key.removeprefix("init_")
            error = (found[key].reshape(truth.shape) - truth).abs().max() / truth.abs().max()
            assert truth.any(), key
            assert error <= 1e-6, key
            checked.add(key)
    expected = {key for key in found if tag == "" or ".time_" in key or key.endswith((".w0", ".a0", ".k_k", ".r_k"))}
    assert checked >= {key for key in expected if not key.endswith(("_w1", "_w2"))} if tag else checked == expected


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_golden_files(golden_paths, name, tag, backend):
    model = infctx.load_model(golden_paths[name, tag], dtype=torch.float64, backend=backend)
    tokens = golden(name)["tokens"]
    for borders in [[], list(range(1, 63)), [16], [33, 48]]:
        model.zero_grad()
        logits, _ = run_in_pieces(model, tokens[:-1], borders)
        loss = F.cross_entropy(logits, tokens[1:])
        assert abs(loss.item() - golden(name)[f"{tag}loss_ref64"].item()) <= 1e-12
        loss.backward()
        assert_gradients_are(model, name, tag)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_window_equals_the_golden_files_cut_at_every_place(golden_paths, name, tag):
    model = infctx.load_model(golden_paths[name, tag], dtype=torch.float64)
    tokens = golden(name)["tokens"][None]
    for segment_tokens in [1, 5, 16, 17, 31, 32, 62, 63]:
        model.zero_grad()
        loss, state = infctx.window_backward(model, tokens[:, :-1], tokens[:, 1:], segment_tokens)
        assert abs(loss.item() - golden(name)[f"{tag}loss_ref64"].item()) <= 1e-12
        assert_gradients_are(model, name, tag)


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@torch.no_grad()
def test_rows_are_independent(version, backend):
    model = random_model(version, dtype=torch.float64, with_state=True, backend=backend)
    tokens = random_tokens(3, 70)
    starts = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    random = torch.Generator().manual_seed(2)
    state = State(*(torch.randn(x.shape, generator=random, dtype=torch.float64) for x in model.initial_state(3)))
    hidden, last = model(tokens, state, starts)
    for row in range(3):
        one = slice(row, row + 1)
        alone, last_alone = model(tokens[one], state.lanes(one), starts[one])
        assert torch.allclose(hidden[one], alone, rtol=0, atol=1e-12)
        for found, truth in zip(last.lanes(one), last_alone, strict=True):
            assert torch.allclose(found, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@torch.no_grad()
def test_a_start_is_a_new_document(version, backend):
    model = random_model(version, dtype=torch.float64, with_state=True, backend=backend)
    tokens = random_tokens(1, 90)
    starts = torch.tensor([[0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    hidden, last = model(tokens, None, starts)
    before, _ = model(tokens[:, :32])
    after, last_after = model(tokens[:, 32:])
    assert torch.allclose(hidden, torch.cat([before, after], dim=1), rtol=0, atol=1e-12)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(last, last_after, strict=True))
    assert not torch.allclose(model(tokens)[0][:, 32:], after, rtol=0, atol=1e-3)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_recomputed_blocks_give_the_same_numbers(version):
    model = random_model(version, with_state=True)
    tokens, starts = random_tokens(2, 50), torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)

    def run(recompute):
        model.compute = Compute(recompute_blocks=recompute)
        model.zero_grad()
        hidden, state = model(tokens, None, starts)
        (model.logits(hidden).square().sum() + state.dot(state)).backward()
        return [hidden.detach(), *state.detach(), *(p.grad.clone() for p in model.parameters())]

    assert all(torch.equal(*pair) for pair in zip(run(False), run(True), strict=True))


def relative_rms(found, truth):
    return ((found.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.mark.parametrize("low_weights", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near(golden_paths, name, low_weights):
    if low_weights:
        model = infctx.load_model(golden_paths[name, ""], dtype=torch.bfloat16)
    else:
        model = infctx.load_model(golden_paths[name, ""])
        model.compute = Compute(torch.bfloat16)
    hidden, state = model(golden(name)["tokens"][None])
    logits = model.logits(hidden)
    assert hidden.dtype == logits.dtype == torch.bfloat16
    assert {part.dtype for part in state} == {torch.float32}
    error = relative_rms(logits[0].detach(), golden(name)["logits_ref64"])
    assert 1e-4 < error < 0.02  # bf16 rounds at 2^-9 = 0.002, dozens of times in a row
    matrices = state.wkv[:, 0].detach()
    assert relative_rms(matrices.mT if name == "goose" else matrices, golden(name)["state64_ref64_S"]) < 0.02
    F.cross_entropy(logits[0, :-1].float(), golden(name)["tokens"][1:]).backward()
    weight_dtype = torch.bfloat16 if low_weights else torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {weight_dtype}
    gradients = stored_gradients(model)
    truths = {key: golden_gradients(name)[key].double() for key in gradients}
    errors = sorted(relative_rms(gradients[key].reshape(truth.shape), truth) for key, truth in truths.items())
    # The first tokens of a document have little to normalise, so a few tensors feel the rounding of the inputs most:
    # rounding the weights alone and computing in fp64 moves the worst by 0.18, and the middle one by 0.02.
    assert errors[len(errors) // 2] < 0.08
    assert errors[-1] < 1


@pytest.mark.parametrize("version", [5, 6])
def test_log_decays_keep_their_precision_in_a_bfloat16_model(version):
    mixing = random_model(version, dtype=torch.bfloat16).blocks[0].time_mix.mixing
    zeros = torch.zeros(2, 5, 24, dtype=torch.bfloat16)  # nothing that could change the decays of Finch
    *others, log_decay = mixing(zeros, zeros)
    assert {x.dtype for x in others} == {torch.bfloat16}
    assert log_decay.dtype == torch.float32
    assert torch.equal(log_decay, -mixing.decay.float().exp().flatten().expand(2, 5, 24))


def test_the_unused_blend_of_the_first_block_learns_nothing(golden_paths):
    model = infctx.load_model(golden_paths["goose", ""])
    time_mix = model.blocks[0].time_mix
    unused = [time_mix.first_value, time_mix.first_value_down, time_mix.first_value_up]
    assert not any(part.requires_grad for part in unused)
    assert all(p.requires_grad for p in model.parameters() if all(p is not part for part in unused))
    assert not hasattr(random_model(7).blocks[0].time_mix, "first_value")


@pytest.mark.parametrize("scale", [0, 1e-14])
def test_keys_too_short_to_have_a_direction_remove_what_they_should(scale):
    """By torch's own normalization, outputs and gradients."""
    g = torch.Generator().manual_seed(0)
    k, rate = (torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=g) for _ in range(2))
    scales = [torch.randn(2, 4, dtype=torch.float64, generator=g) for _ in range(2)]
    k[0, 0, 0] *= scale

    def plain(k, rate, scale, key_rate):
        kappa = F.normalize(k * scale, dim=-1)
        return k * (1 + (rate - 1) * key_rate), -kappa, rate * kappa

    found = {}
    for removal in (plain, _Removal.apply):
        leaves = [x.clone().requires_grad_() for x in (k, rate, *scales)]
        outputs = removal(*leaves)
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(x).cumsum(-1) for x in outputs])
        found[removal] = [*outputs, *gradients]
    for truth, mine in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


def test_a_state_comes_in_and_goes_out():
    model = random_model(6, with_state=True)
    state = model.initial_state(3)
    assert [tuple(part.shape) for part in state] == [(2, 3, 3, 8, 8), (2, 3, 24), (2, 3, 24)]
    assert torch.equal(state.wkv[:, 1], model.initial_wkv)
    assert not state.time_shift.any()
    assert not state.channel_shift.any()
    before = State(*(part.clone() for part in state))
    _, last = model(random_tokens(3, 20), state)
    assert all(torch.equal(*pair) for pair in zip(state, before, strict=True))  # nothing is changed in place
    assert [part.shape for part in last] == [part.shape for part in state]


@pytest.mark.parametrize("token", [19, -1])
def test_a_token_outside_the_vocabulary_is_named(token):
    tokens, model = random_tokens(2, 20), random_model(6)
    tokens[1, 7] = token
    for run in (model, lambda given: infctx.window_backward(model, given, random_tokens(2, 20), 8)):
        with pytest.raises(InputError, match=f"model: token {token} is outside the vocabulary of 19 ids; use"):
            run(tokens)


def test_no_initial_state_is_one_of_zeros():
    model = random_model(5)
    hidden, _ = model(random_tokens(1, 20))
    model.add_initial_state()
    assert not model.initial_wkv.any()
    assert torch.equal(model(random_tokens(1, 20))[0], hidden)


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_the_meta_device_takes_no_memory(size):
    before = psutil.Process().memory_info().rss
    model = infctx.build_model(size, device="meta")
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert psutil.Process().memory_info().rss - before < 64 << 20  # the smallest has 0.7 GB of weights

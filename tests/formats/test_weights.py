"""Models on disk: official names, order and shapes; read by the rwkv package; refusals name the tensor."""

import hashlib
import json
import re

import pytest
import torch
from hypothesis import given, settings, strategies
from safetensors.torch import save_file

import infctx
from infctx.errors import InputError
from infctx.formats.other_names import from_official
from infctx.formats.stored_names import stored_names
from infctx.formats.weights import (
    HASHED_AT_ONCE,
    fingerprint,
    has_fingerprint,
    open_weights,
    read_sizes,
    stored_tensors,
)

from places import GOLDEN
from tiny_models import RANKS, random_model, random_tokens

ODD = {"width": 40, "head_size": 20, "vocab_size": 37, "ffn_width": 52}


def stored(version, **options):
    """Returns official name -> tensor of a small random model."""
    return stored_tensors(random_model(version, **options))


def refusal(tensors, path):
    """Returns the one line with which load_model refuses a file of these tensors."""
    torch.save(tensors, path)
    with pytest.raises(InputError) as refused:
        infctx.load_model(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["eagle", "finch", "goose"])
def test_a_file_is_loaded_and_saved_bit_for_bit(tmp_path, name, suffix):
    original = torch.load(GOLDEN / f"{name}-tiny.pth", weights_only=True)
    for step, source in enumerate((GOLDEN / f"{name}-tiny.pth", tmp_path / f"1{suffix}"), start=1):
        infctx.save_weights(infctx.load_model(source), tmp_path / f"{step}{suffix}")
    assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()
    infctx.save_weights(infctx.load_model(tmp_path / f"2{suffix}"), tmp_path / "last.pth")
    found = torch.load(tmp_path / "last.pth", weights_only=True)
    assert type(found) is dict
    assert list(found) == list(original)
    for key, tensor in original.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].is_contiguous()
        assert torch.equal(found[key], tensor), key  # the shape as well


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_the_initial_state_is_stored_value_major(tmp_path, version, suffix):
    model = random_model(version, with_state=True)
    infctx.save_weights(model, tmp_path / f"model{suffix}")
    again = infctx.load_model(tmp_path / f"model{suffix}")
    for (name, mine), (same_name, its) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == same_name
        assert torch.equal(mine, its), name
    assert again.initial_wkv.requires_grad
    infctx.save_weights(again, tmp_path / "again.pth")
    tensors = torch.load(tmp_path / "again.pth", weights_only=True)
    for layer in range(2):
        assert torch.equal(tensors[f"blocks.{layer}.att.time_state"], model.initial_wkv[layer].mT)


@pytest.mark.parametrize("stored_dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_every_dtype_are_read(tmp_path, stored_dtype, suffix):
    model = random_model(6, with_state=True)
    path = tmp_path / f"model{suffix}"
    infctx.save_weights(model, path, stored_dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # saving does not change the model
    low = infctx.load_model(path, dtype=stored_dtype)
    state_dtype = torch.float64 if stored_dtype == torch.float64 else torch.float32
    for (name, mine), its in zip(model.named_parameters(), low.parameters(), strict=True):
        assert its.dtype == (state_dtype if name == "initial_wkv" else stored_dtype)
        assert torch.equal(mine.to(stored_dtype), its.to(stored_dtype)), name
    default = infctx.load_model(path)
    assert {p.dtype for p in default.parameters()} == {torch.float32}
    assert torch.equal(default.head.weight, model.head.weight.to(stored_dtype).float())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_sizes_are_read_from_the_file(tmp_path, version, suffix):
    odd_ranks = {name: 7 + 2 * place for place, name in enumerate(RANKS[version])}
    model = random_model(version, num_layers=11, **ODD, **odd_ranks)  # blocks.10 comes after blocks.9
    infctx.save_weights(model, tmp_path / f"model{suffix}")
    assert read_sizes(tmp_path / f"model{suffix}") == model.sizes
    again = infctx.load_model(tmp_path / f"model{suffix}")
    assert again.sizes == model.sizes
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))


def test_the_order_of_the_file_does_not_matter(tmp_path):
    tensors = stored(6, with_state=True)
    torch.save(dict(reversed(tensors.items())), tmp_path / "model.pth")
    again = stored_tensors(infctx.load_model(tmp_path / "model.pth"))
    assert list(again) == list(tensors)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_loaded_model_shares_nothing_with_its_file(tmp_path):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        infctx.save_weights(random_model(5), path)
        before = path.read_bytes()
        model = infctx.load_model(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert path.read_bytes() == before
        model = infctx.load_model(path)
        wanted = [parameter.detach().clone() for parameter in model.parameters()]
        path.write_bytes(bytes(len(before)))  # overwritten in place, as a copy in progress would
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), wanted, strict=True))


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 3, "width": 128, "vocab_size": 50, "head_size": 64},
        {"num_layers": 2, "width": 96, "vocab_size": 33, "head_size": 32, "ffn_width": 72},
        {"num_layers": 2, "width": 192, "vocab_size": 70, "head_size": 64, "mix_rank": 9, "decay_rank": 13},
    ],
)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the class for RWKV-7 uses it
def test_the_rwkv_package_reads_our_files(tmp_path, request, version, with_state, sizes):
    sizes = {name: value for name, value in sizes.items() if not name.endswith("_rank") or name in RANKS[version]}
    model = random_model(version, with_state=with_state, noise=0.1, seed=version, **sizes)
    infctx.save_weights(model, tmp_path / "model.pth")
    package = request.getfixturevalue("rwkv_7_package" if version == 7 else "rwkv_package")
    judge = package(str(tmp_path / "model"), "cpu fp32", **({} if version == 7 else {"verbose": False}))
    its_first = None
    if version == 7:  # its class for RWKV-7 takes a state only by hand, and S value by key
        its_first = judge.generate_zero_state()
        for layer in range(sizes["num_layers"] if with_state else 0):
            its_first[3 * layer + 1] = model.initial_wkv[layer].mT.clone()
    else:
        assert int(judge.version) == version
    tokens = random_tokens(1, 45, vocab_size=sizes["vocab_size"])
    hidden, state = model(tokens)
    logits = model.logits(hidden)[0]
    assert logits.std() > 0.1
    found, its_state = judge.forward(tokens[0].tolist(), its_first, full_output=True)
    assert (logits - found).abs().max() <= 5e-5
    for layer in range(sizes["num_layers"]):
        time_shift, wkv, channel_shift = its_state[3 * layer : 3 * layer + 3]
        assert (state.wkv[layer, 0] - (wkv.mT if version == 7 else wkv)).abs().max() <= (1e-4 if version == 7 else 2e-4)
        assert (state.time_shift[layer, 0] - time_shift).abs().max() <= 5e-5
        assert (state.channel_shift[layer, 0] - channel_shift).abs().max() <= 5e-5
    found, _ = judge.forward([3], its_state)  # one token, from its state and from ours
    hidden, _ = model(torch.tensor([[3]]), state)
    assert (model.logits(hidden)[0, 0] - found).abs().max() <= 5e-5


@pytest.mark.parametrize("version", [5, 6, 7])
def test_every_missing_tensor_is_named(tmp_path, version):
    tensors = stored(version, with_state=True)
    for name in tensors:
        message = refusal({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.pth")
        assert f"tensor {name} " in message
        assert "missing" in message


@pytest.mark.parametrize(
    "version", [pytest.param(5, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow), 7]
)
def test_every_odd_shape_is_named(tmp_path, version):
    tensors = stored(version, with_state=True)
    for name, tensor in tensors.items():
        # Some tensors decide a size; the refusal then names the next tensor that disagrees, with both shapes.
        part = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
        telltale = {"emb", "time_faaaa", "time_maa_w2", "time_decay_w1", "r_k", "w1", "a1", "v1", "g1"} | (
            {"key"} if ".ffn." in name else set()
        )
        odds = [torch.cat([tensor, tensor[:1]]), tensor[None], tensor[:0]]
        for odd in odds[:1] if name.startswith("blocks.1.") else odds:
            message = refusal(tensors | {name: odd}, tmp_path / "model.safetensors")
            assert re.search(r"tensors? (emb|blocks\.\d|ln_out|head)\.\S+ (has |is |\()", message), message
            if part not in telltale:
                assert f"tensor {name} " in message
                assert str(tuple(odd.shape)) in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "name",
    ["blocks.0.att.extra", "blocks.1.att.time_maa_q", "blocks.01.ln1.weight", "_strategy", "blocks.x.ln1.weight"],
)
def test_an_extra_tensor_is_named(tmp_path, name, suffix):
    path = tmp_path / f"model{suffix}"
    infctx.formats.tensor_file.write_tensors(stored(6) | {name: torch.ones(24)}, path)
    with pytest.raises(InputError, match=f"tensor {re.escape(name)} does not belong to RWKV-6"):
        infctx.load_model(path)


@pytest.mark.parametrize("layer", ["9999", "10000", "999999999", "1" * 5000, "-1"])
def test_a_layer_out_of_all_bounds_costs_nothing(tmp_path, layer):
    message = refusal(stored(6) | {f"blocks.{layer}.ln1.weight": torch.ones(24)}, tmp_path / "model.pth")
    assert "tensor blocks." in message


def renamed(tensors, *pairs):
    for old, new in pairs:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def without(tensors, *parts):
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


OTHERS = {
    "RWKV-4": (lambda eagle, _: renamed(without(eagle, "ln_x", "gate"), ("faaaa", "first")), "blocks.0.att.time_first"),
    "RWKV-5.0": (lambda eagle, _: renamed(without(eagle, "gate"), ("faaaa", "first")), "blocks.0.att.time_first"),
    "RWKV-5.1": (
        lambda eagle, _: (
            eagle | {f"blocks.{n}.att.time_{x}": torch.ones(3) for n in range(2) for x in ("decay", "faaaa")}
        ),
        "blocks.0.att.time_faaaa",
    ),
    "decay of RWKV-5.1": (
        lambda eagle, _: eagle | {f"blocks.{n}.att.time_decay": torch.ones(3) for n in range(2)},
        "blocks.0.att.time_decay",
    ),
    "no head norm": (lambda eagle, _: without(eagle, "ln_x"), "blocks.0.att.ln_x.weight"),
    "no gate": (lambda _, finch: without(finch, "gate"), "blocks.0.att.gate.weight"),
    "RWKV-7a": (lambda *_: stored(7) | {"blocks.0.ffn.s_emb.weight": torch.ones(19, 3)}, "blocks.0.ffn.s_emb.weight"),
    "RWKV-7b": (lambda *_: stored(7) | {"blocks.0.qkv.qq.weight": torch.ones(3, 24)}, "blocks.0.qkv.qq.weight"),
    "half of the unused blend of Goose": (
        lambda *_: stored(7) | {"blocks.0.att.v1": torch.ones(24, 2)},
        "blocks.0.att.v0",
    ),
    "Finch with a mix of Goose": (
        lambda _, finch: finch | {"blocks.0.att.x_r": torch.ones(1, 1, 24)},
        "blocks.0.att.x_r",
    ),
    "no model at all": (lambda *_: {"conv.weight": torch.ones(3)}, "emb.weight"),
    "nothing": (lambda *_: {}, "emb.weight"),
    "Finch with the mixes of Eagle": (
        lambda eagle, finch: finch | {"blocks.1.att.time_mix_k": eagle["blocks.1.att.time_mix_k"]},
        "blocks.1.att.time_mix_k",
    ),
    "half of a state": (lambda _, finch: without(finch, "1.att.time_state"), "blocks.1.att.time_state"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_refused_by_a_tensor(tmp_path, name):
    change, tensor = OTHERS[name]
    message = refusal(change(stored(5), stored(6, with_state=True)), tmp_path / "model.pth")
    assert f"tensor {tensor} " in message
    if name.startswith(("RWKV-4", "RWKV-5.0", "RWKV-7")):
        assert name[:6] in message


def test_values_beyond_fp16_are_named(tmp_path):
    model = random_model(6)
    with torch.no_grad():
        model.blocks[1].channel_mix.value.weight[3, 2] = 7e4
    with pytest.raises(InputError, match=r"model.pth: blocks.1.ffn.value.weight\[3, 2\] is 70000, beyond the 65504 of"):
        infctx.save_weights(model, tmp_path / "model.pth", torch.float16)
    assert list(tmp_path.iterdir()) == []
    infctx.save_weights(model, tmp_path / "model.pth", torch.bfloat16)
    with torch.no_grad():  # a value that is not finite is stored unchanged
        model.blocks[1].channel_mix.value.weight[3, 2] = float("inf")
    infctx.save_weights(model, tmp_path / "model.pth", torch.float16)
    assert infctx.load_model(tmp_path / "model.pth").blocks[1].channel_mix.value.weight[3, 2] == float("inf")


@pytest.mark.parametrize(("version", "naming"), [(5, "huggingface"), (6, "huggingface"), (6, "fla"), (7, "fla")])
@pytest.mark.parametrize("layout", ["model.safetensors", "pytorch_model.bin", "file.pth", "shards"])
def test_files_and_folders_under_other_names(tmp_path, version, naming, layout):
    model = random_model(version, num_layers=3)
    tensors = from_official(stored_tensors(model), naming, "test")
    path = tmp_path / layout
    if layout == "shards":
        names = list(tensors)
        parts = {"part-1.safetensors": names[: len(names) // 3], "part-2.safetensors": names[len(names) // 3 :]}
        for file, chosen in parts.items():
            save_file({name: tensors[name] for name in chosen}, tmp_path / file)
        index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        path = tmp_path
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    for place in {path, tmp_path} if layout != "file.pth" else {path}:
        again = infctx.load_model(place)
        assert again.sizes == model.sizes == read_sizes(place)
        for name, parameter in model.named_parameters():
            assert torch.equal(again.get_parameter(name), parameter), name


def test_a_broken_index_of_shards_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content in ("", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        with pytest.raises(InputError, match="model.safetensors.index.json: not an index of weight files"):
            infctx.load_model(tmp_path)
    outside = tmp_path.parent / "outside.safetensors"
    index.write_text(json.dumps({"weight_map": {"emb.weight": f"../{outside.name}"}}))
    infctx.formats.tensor_file.write_tensors(stored(6), outside)
    with pytest.raises(InputError, match=f"{tmp_path.name}/outside.safetensors: no such file"):
        infctx.load_model(tmp_path)


def test_the_fingerprint_distinguishes_models(tmp_path):
    model = random_model(6, with_state=True)
    infctx.save_weights(model, tmp_path / "low.pth", torch.bfloat16)
    low = infctx.load_model(tmp_path / "low.pth")
    kept = fingerprint(low)
    assert kept == fingerprint(model) == fingerprint(infctx.load_model(tmp_path / "low.pth", torch.bfloat16))
    low.initial_wkv.data.zero_()
    assert fingerprint(low) == kept  # a state is not a weight
    for name, parameter in low.named_parameters():
        if not name.startswith("initial"):
            before = parameter.data.clone()
            parameter.data.view(-1)[-1] += 0.5
            assert fingerprint(low) != kept, name
            parameter.data.copy_(before)
    swapped = low.blocks[0].time_mix.key.weight.data
    swapped[[0, 1]] = swapped[[1, 0]]
    assert fingerprint(low) != kept


@given(data=strategies.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_fingerprint_sees_any_two_values_exchanged_and_any_bit(large_weights, data):
    """0.1.0 could not see two values exchanged 231 = 3 * 7 * 11 places apart."""
    model, kept = large_weights
    parameter = data.draw(strategies.sampled_from(list(model.parameters())))
    bits = parameter.data.view(-1).view(torch.int16)
    place = strategies.integers(0, bits.numel() - 1)
    first = data.draw(place)
    second = data.draw(place | strategies.just((first + 231) % bits.numel()))
    before = bits.clone()
    if data.draw(strategies.booleans()):
        bits[[first, second]] = bits[[second, first]]
    else:
        bits[first] ^= data.draw(strategies.sampled_from([1 << bit for bit in range(15)] + [-(1 << 15)]))
    assert (fingerprint(model) == kept) == torch.equal(bits, before)
    bits.copy_(before)


@pytest.fixture(scope="module")
def large_weights():
    """Returns a model with more values in a matrix than are hashed at a time, and its fingerprint."""
    model = infctx.build_model(version=5, num_layers=1, width=64, vocab_size=18000, dtype=torch.bfloat16)
    assert model.head.weight.numel() > HASHED_AT_ONCE
    return model, fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_fingerprint_does_not_depend_on_how_weights_are_held(tmp_path, dtype, suffix):
    infctx.save_weights(random_model(6, dtype=torch.float64), tmp_path / f"a{suffix}", dtype)
    marks = {fingerprint(open_weights(tmp_path / f"a{suffix}"))}
    marks |= {fingerprint(infctx.load_model(tmp_path / f"a{suffix}", held)) for held in (torch.float32, torch.bfloat16)}
    (mark,) = marks
    assert re.fullmatch(r"sha256:[0-9a-f]{16}", mark)


def test_fingerprints_of_0_1_0_are_still_recognized():
    model = infctx.build_model(version=5, num_layers=1, width=64, vocab_size=66000, dtype=torch.bfloat16)
    assert model.head.weight.numel() > 1 << 22  # more than was summed at a time
    digest = hashlib.sha256()
    for ours in stored_names(model.sizes):
        bits = model.get_parameter(ours).detach().flatten().view(torch.int16).long()
        sums = [int(bits[::stride].sum()) for stride in (1, 3, 7, 11)]
        digest.update(f"{ours} {bits.numel()} {sums}".encode())
    mark = digest.hexdigest()[:16]
    assert has_fingerprint(model, mark) and has_fingerprint(model, fingerprint(model))
    model.head.weight.data.view(-1)[5] += 1
    assert not has_fingerprint(model, mark)

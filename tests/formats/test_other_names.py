"""Weights under other programs' names: names, order and shapes; there and back bit for bit; refusals by name."""

import random
import re
import tracemalloc

import pytest
import torch

from infctx.errors import InputError
from infctx.formats.other_names import NAMINGS, from_official, naming_of, to_official
from infctx.formats.weights import stored_tensors
from infctx.model.time_mix import DataDependentMixing

from other_tensors import TABLES
from tiny_models import random_model

every_table = pytest.mark.parametrize(("naming", "version"), TABLES)


def table(naming, version):
    """Returns their name -> shape and official name (None if the tensor differs), for both layers."""
    text = re.sub(r"(.*)\*(.*)\*\n", r"\1weight\2weight\n\1bias\2bias\n", TABLES[naming, version])
    before, of_layer, after = re.fullmatch(r"\n([^N]*\n)(.*N\S*\n)([^N]*)\n", text, re.DOTALL).groups()
    lines = [before, of_layer.replace(".N.", ".0."), of_layer.replace(".N.", ".1."), after]
    rows = (line.split() + [None] for line in "".join(lines).splitlines() if ".0.attn.v_lora." not in line)
    return {name: (tuple(int(size) for size in shape.split("x")), official) for name, shape, official, *_ in rows}


def official(version, **options):
    return stored_tensors(random_model(version, **options))


def theirs(naming, version, **options):
    return from_official(official(version, **options), naming, "model.pth")


def to_naming(naming):
    return lambda tensors, path: from_official(tensors, naming, path)


def refusal(convert, *arguments):
    """Returns the one line of a conversion's InputError."""
    with pytest.raises(InputError) as refused:
        convert(*arguments, "some/model.pth")
    message = str(refused.value)
    assert message.startswith("some/model.pth: ")
    assert message.isprintable()
    return message


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].is_contiguous(), name
        assert torch.equal(found[name], tensor), name


@every_table
def test_names_order_and_shapes(naming, version):
    found = theirs(naming, version)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: shape for name, (shape, _) in table(naming, version).items()
    }
    assert list(found) == list(table(naming, version))
    assert all(tensor.is_contiguous() for tensor in found.values())


@every_table
def test_renamed_tensors_keep_their_values(naming, version):
    stored = official(version)
    found = from_official(stored, naming, "model.pth")
    for name, (_, same) in table(naming, version).items():
        if same:
            assert torch.equal(found[name], stored[same]), name


def test_other_tensors_of_fla_hold_the_values_where_its_code_reads_them():
    stored, found, rank = official(6), theirs("fla", 6), 3
    for layer in range(2):
        att, ffn = f"blocks.{layer}.att", f"blocks.{layer}.ffn"
        attn, channels = f"model.layers.{layer}.attn", f"model.layers.{layer}.ffn"
        for ours, letter in enumerate("wkvrg"):
            its = "rwkvg".index(letter)
            rows, columns = slice(its * rank, (its + 1) * rank), slice(ours * rank, (ours + 1) * rank)
            assert torch.equal(found[f"{attn}.x_bias"][its], stored[f"{att}.time_maa_{letter}"][0, 0])
            down, up = stored[f"{att}.time_maa_w1"], stored[f"{att}.time_maa_w2"]
            assert torch.equal(found[f"{attn}.x_proj.0.linear.weight"][rows], down[:, columns].T)
            assert torch.equal(found[f"{attn}.x_proj.2.weight"][:, rows], up[ours].T)
        lora = f"{attn}.w_proj.linear.lora"
        assert torch.equal(found[f"{attn}.x_proj.0.mu"], stored[f"{att}.time_maa_x"][0, 0])
        assert torch.equal(found[f"{lora}.0.weight"], stored[f"{att}.time_decay_w1"].T)
        assert torch.equal(found[f"{lora}.2.weight"], stored[f"{att}.time_decay_w2"].T)
        assert torch.equal(found[f"{lora}.2.bias"], stored[f"{att}.time_decay"][0, 0])
        assert torch.equal(found[f"{channels}.key.mu"], stored[f"{ffn}.time_maa_k"][0, 0])
        assert torch.equal(found[f"{channels}.receptance.mu"], stored[f"{ffn}.time_maa_r"][0, 0])


def test_products_of_goose_are_where_flas_code_reads_them():
    stored, found = official(7), theirs("fla", 7)
    for letter in "wvag":
        lora = f"model.layers.1.attn.{letter}_lora.lora"
        assert torch.equal(found[f"{lora}.0.weight"], stored[f"blocks.1.att.{letter}1"].T)
        assert torch.equal(found[f"{lora}.2.weight"], stored[f"blocks.1.att.{letter}2"].T)
        if letter != "g":
            assert torch.equal(found[f"{lora}.2.bias"], stored[f"blocks.1.att.{letter}0"][0, 0])
    for name in ("attn.k_k", "attn.k_a", "ffn.x_k"):
        ours = name.replace("attn", "att")
        assert torch.equal(found[f"model.layers.1.{name}"], stored[f"blocks.1.{ours}"][0, 0])


def test_the_unused_blend_of_goose_is_left_out_for_fla():
    stored = official(7)
    more = {f"blocks.0.att.v{part}": stored[f"blocks.1.att.v{part}"] for part in "012"}
    assert_same(from_official(stored | more, "fla", "model.pth"), from_official(stored, "fla", "model.pth"))


def stacked_blends(**options):
    """Makes fla's tensors as its first files of Goose have them: six blends in one tensor, (6, D)."""
    tensors = theirs("fla", 7, **options)
    for layer in ("model.layers.0.attn", "model.layers.1.attn"):
        tensors[f"{layer}.x_x"] = torch.cat([tensors.pop(f"{layer}.x_{letter}")[0] for letter in "rwkvag"])
    return tensors


def test_stacked_blends_of_early_files_of_goose():
    assert_same(to_official(stacked_blends(), "model.pth"), official(7))
    assert naming_of(stacked_blends()) == "fla"
    for name, tensor, problem in [
        ("model.layers.1.attn.x_x", torch.ones(5, 24), "has shape (5, 24); (6, D) is expected"),
        ("model.layers.1.attn.bonus", torch.ones(3, 8), "does not belong to RWKV-7 under the early fla names"),
    ]:
        assert problem in refusal(to_official, stacked_blends() | {name: tensor})


def test_mixing_as_fla_computes_it_is_ours():
    model = random_model(6, dtype=torch.float64)
    mixing = model.blocks[1].time_mix.mixing
    assert isinstance(mixing, DataDependentMixing)
    found = from_official(stored_tensors(model), "fla", "model.pth")
    attn = {name.split(".attn.")[1]: tensor for name, tensor in found.items() if ".layers.1.attn." in name}
    generator = torch.Generator().manual_seed(3)
    x, before = torch.randn(2, 2, 7, 24, dtype=torch.float64, generator=generator)
    low = torch.tanh((x + (before - x) * attn["x_proj.0.mu"]) @ attn["x_proj.0.linear.weight"].T)  # (B, T, 5 M)
    up = attn["x_proj.2.weight"].unflatten(1, (5, 3))  # (D, 5, M)
    mixes = torch.einsum("btqm,dqm->qbtd", low.unflatten(2, (5, 3)), up) + attn["x_bias"][:, None, None]
    x_r, x_w, x_k, x_v, x_g = x + (before - x) * mixes
    lora = [attn[f"w_proj.linear.lora.{part}"] for part in ("0.weight", "2.weight", "2.bias")]
    log_decay = -torch.exp(torch.tanh(x_w @ lora[0].T) @ lora[1].T + lora[2])
    for found, expected in zip((x_r, x_k, x_v, x_g, log_decay), mixing(x, before), strict=True):
        assert found.std() > 0.05
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_table
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_there_and_back_bit_for_bit(naming, version, dtype):
    stored = official(version, dtype=dtype, num_layers=11)  # layer 10 comes after layer 9
    found = from_official(stored, naming, "model.pth")
    assert naming_of(found) == naming
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert_same(to_official(found, "model.pth"), stored)
    names = list(found)
    random.Random(0).shuffle(names)
    again = to_official({name: found[name] for name in names}, "model.pth")
    assert_same(again, stored)
    assert_same(from_official(again, naming, "model.pth"), found)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_official_tensors_are_returned_unchanged(version):
    stored = official(version, with_state=True)
    for found in (to_official(stored, "model.pth"), from_official(stored, "official", "model.pth")):
        assert list(found) == list(stored)
        assert all(found[name] is tensor for name, tensor in stored.items())


@every_table
def test_renamed_tensors_are_not_copied_and_parts_do_not_keep_the_whole(naming, version):
    found = theirs(naming, version)
    again = to_official(found, "model.pth")
    for name, (_, same) in table(naming, version).items():
        if same:
            assert again[same] is found[name]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in again.values())


@pytest.mark.parametrize(
    ("names", "naming"),
    [
        ([], "official"),
        (["emb.weight", "blocks.0.ln1.weight", "head.weight"], "official"),
        (["emb.weight", "rwkv.blocks.0.ln1.weight", "model.embeddings.weight"], "official"),
        (["blocks.0.att.time_state"], "official"),
        (["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "official"),
        (["wrong_rwkv.embeddings.weight", "my_model.embeddings.weight"], "official"),
        (["head.weight", "rwkv.embeddings.weight"], "huggingface"),
        (["rwkv.blocks.12.ln1.weight"], "huggingface"),
        (["lm_head.weight", "model.embeddings.weight"], "fla"),
        (["model.layers.12.attn.x_bias"], "fla"),
    ],
)
def test_a_naming_is_recognized_by_its_names(names, naming):
    assert naming in NAMINGS
    assert naming_of(iter(names)) == naming
    if naming == "official":
        tensors = {name: torch.ones(2) for name in names}
        assert to_official(tensors, "model.pth") == tensors  # left to the reader of the official names


@every_table
def test_every_missing_tensor_is_named(naming, version):
    tensors = theirs(naming, version)
    for name in tensors:
        message = refusal(to_official, {key: value for key, value in tensors.items() if key != name})
        assert f"tensor {name} is missing; not a whole model of RWKV-{version} under the {naming} names" in message
    stored = official(version)
    for name in stored:
        message = refusal(to_naming(naming), {key: value for key, value in stored.items() if key != name})
        assert f"tensor {name} is missing" in message


UNKNOWN = {
    ("huggingface", 5): """
        rwkv.blocks.1.attention.time_first rwkv.blocks.1.attention.time_mix_k rwkv.blocks.1.attention.time_state
        rwkv.blocks.1.pre_ln.weight rwkv.blocks.1.ln0.weight rwkv.blocks.1.ln1.weight.ln1.weight blocks.1.ln1.weight
        rwkv.blocks.01.ln1.weight rwkv.blocks.-1.ln1.weight rwkv.blocks.x.ln1.weight rwkv.blocks.\u0661.ln1.weight
        rwkv.head.weight model.embeddings.weight _strategy
    """,
    ("huggingface", 6): "rwkv.blocks.0.attention.time_mix_gate rwkv.blocks.0.attention.x_r rwkv.blocks.0.pre_ln",
    ("fla", 6): """
        model.layers.0.attn.x_r model.layers.0.attn.q_proj.weight model.layers.0.attn.x_proj.1.weight head.weight
        model.layers.0.attn.r_proj.linear.bias model.layers.1.pre_norm.bias model.layers.\u0661.attn.bonus model.norm
    """,
    ("fla", 7): "model.layers.0.attn.v_lora.lora.2.bias model.layers.0.attn.bonus model.layers.1.attn.x_x",
}


@pytest.mark.parametrize(
    ("naming", "version", "name"), [(*key, name) for key, names in UNKNOWN.items() for name in names.split()]
)
def test_an_unknown_tensor_is_named(naming, version, name):
    message = refusal(to_official, theirs(naming, version) | {name: torch.ones(24)})
    assert f"tensor {name!r} does not belong to RWKV-{version} under the {naming} names" in message
    assert "infctx reads RWKV-5.2, RWKV-6 and RWKV-7" in message


@every_table
@pytest.mark.parametrize("layer", ["2", "9999", "1" * 5000])
def test_a_layer_with_a_single_tensor_costs_nothing(naming, version, layer):
    tensors = theirs(naming, version)
    known = next(name for name in tensors if ".1." in name)
    message = refusal(to_official, tensors | {known.replace(".1.", f".{layer}."): torch.ones(24)})
    assert f".{layer}." in message
    assert "is missing" in message


def test_many_layers_with_one_tensor_each_cost_no_memory():
    tensor = torch.ones(1)
    tensors = {f"rwkv.blocks.{10**30 + layer}.ln1.weight": tensor for layer in range(2000)}
    tracemalloc.start()
    try:
        message = refusal(to_official, tensors)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "tensor rwkv.embeddings.weight is missing" in message
    assert peak < 3e6  # bytes; all the names of these layers would need more than 5 MB


def test_names_are_shown_on_one_line():
    for name in ("rwkv.a\nb", "rwkv.\x1b[31m", "rwkv.\u2028"):
        assert repr(name) in refusal(to_official, {name: torch.ones(1)})


CONVERTED = [name for name, (_, same) in table("fla", 6).items() if same is None]


@pytest.mark.parametrize("name", CONVERTED)
def test_a_shape_that_cannot_be_converted_is_named(name):
    tensors = theirs("fla", 6)
    tensor = tensors[name]
    odd = [tensor[None], tensor[..., None], tensor[:0], tensor.new_ones(()), tensor.new_ones(0, 5, 0)]
    if name.endswith("x_bias"):
        odd += [tensor[:4], torch.cat([tensor, tensor]), tensor[:, :0]]
    if name.endswith("x_proj.0.linear.weight"):
        odd += [tensor[:14], tensor[:, :0]]
    if name.endswith("x_proj.2.weight"):
        odd += [tensor[:, :14], tensor[:, :0]]
    for wrong in odd:
        message = refusal(to_official, tensors | {name: wrong})
        assert f"tensor {name} has shape {tuple(wrong.shape)}; (" in message
        assert message.count("D") >= 2  # the letters of the shape, and their meaning


@every_table
def test_the_shapes_of_renamed_tensors_are_left_to_the_reader(naming, version):
    tensors = theirs(naming, version)
    for name, (_, same) in table(naming, version).items():
        for odd in (torch.ones(()), torch.ones(0, 3), torch.ones(1, 2, 3, 4)):
            if same:
                assert to_official(tensors | {name: odd}, "model.pth")[same] is odd


@every_table
def test_a_learned_state_is_refused(naming, version):
    message = refusal(to_naming(naming), official(version, with_state=True))
    assert f"tensor 'blocks.0.att.time_state' has no place under the {naming} names" in message
    assert "leave the initial state out" in message
    assert "official names" in message


def test_eagle_has_no_fla_names():
    message = refusal(to_naming("fla"), official(5))
    assert message.endswith("RWKV-5 has no fla names; choose one of official, huggingface")


def test_an_unknown_naming_is_refused():
    message = refusal(to_naming("gguf"), official(6))
    assert message.endswith("RWKV-6 has no gguf names; choose one of official, huggingface, fla")


@pytest.mark.parametrize("name", ["blocks.0.att.x_q", "blocks.01.ln1.weight", "rwkv.embeddings.weight", "a\nb"])
@every_table
def test_an_unknown_official_tensor_is_named(naming, version, name):
    message = refusal(to_naming(naming), official(version) | {name: torch.ones(24)})
    assert f"tensor {name!r} does not belong to RWKV-{version} under the official names" in message


@pytest.mark.filterwarnings("ignore")  # the library warns when it is imported and used
def test_the_real_library_holds_these_tensors():
    models = pytest.importorskip("fla.models")
    found = theirs("fla", 6)
    ranks = {"proj_low_rank_dim": 3, "gate_low_rank_dim": 5}
    sizes = {"vocab_size": 19, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 3, "intermediate_size": 64}
    model = models.RWKV6ForCausalLM(models.RWKV6Config(**sizes, **ranks, expand_k=1.0))
    expected = model.state_dict()
    assert [(name, tensor.shape) for name, tensor in found.items()] == [(n, t.shape) for n, t in expected.items()]
    assert [name for name, _ in model.named_parameters()] == list(found)
    model.load_state_dict(found)
    assert_same(to_official(model.state_dict(), "model.pth"), official(6))

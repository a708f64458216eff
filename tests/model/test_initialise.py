"""New weights: the formulas of the official initialization, written out again in numpy."""

import numpy as np
import pytest
import torch

import infctx
from infctx.formats.weights import stored_tensors
from infctx.model.initialise import initialise

from tiny_models import random_model

WIDTH, VOCAB, HEAD_SIZE = 96, 200, 16


def new_weights(version, num_layers, seed=3, **changed):
    sizes = {"width": WIDTH, "vocab_size": VOCAB, "head_size": HEAD_SIZE} | changed
    model = infctx.build_model(version=version, num_layers=num_layers, seed=seed, **sizes)
    return {name: tensor.numpy() for name, tensor in stored_tensors(model).items()}


def curves(version, layer, num_layers):
    """Returns official name -> values over the channels (D,), for one block."""
    a = layer / (num_layers - 1) if num_layers > 1 else 0.0
    b = 1 - layer / num_layers
    n = np.arange(WIDTH)
    e = n / WIDTH
    place = n / (WIDTH - 1)
    wanted = {
        "att.ln_x.weight": np.full(WIDTH, ((1 + layer) / num_layers) ** 0.7),
        "att.ln_x.bias": np.zeros(WIDTH),
    }
    wanted |= {f"{norm}.weight": np.ones(WIDTH) for norm in ("ln1", "ln2")}
    wanted |= {f"{norm}.bias": np.zeros(WIDTH) for norm in ("ln1", "ln2")}
    if version == 7:
        return wanted | goose_curves(layer, a, b)
    wanted |= {
        "att.time_decay": -6 + 5 * place ** (0.7 + 1.3 * a),
        "att.time_faaaa": a * (1 - place) + np.array([(-0.1, 0.0, 0.1)[(i + 1) % 3] for i in n]),
    }
    if version == 5:
        return wanted | {
            "att.time_mix_k": e**b,
            "att.time_mix_v": e**b + 0.3 * a,
            "att.time_mix_r": e ** (b / 2),
            "att.time_mix_g": e ** (b / 2),
            "ffn.time_mix_k": e**b,
            "ffn.time_mix_r": e**b,
        }
    return wanted | {
        "att.time_maa_x": 1 - e**b,
        "att.time_maa_w": 1 - e**b,
        "att.time_maa_k": 1 - e**b,
        "att.time_maa_v": 1 - (e**b + 0.3 * a),
        "att.time_maa_r": 1 - e ** (b / 2),
        "att.time_maa_g": 1 - e ** (b / 2),
        "ffn.time_maa_k": 1 - e ** (b**3),
        "ffn.time_maa_r": 1 - e ** (b**3),
    }


def goose_curves(layer, a, b):
    """The same for the rest of a block of RWKV-7."""
    n = np.arange(WIDTH)
    z = ((n % HEAD_SIZE) - (HEAD_SIZE - 1) / 2) / ((HEAD_SIZE - 1) / 2)
    zigzag, linear, e = z * abs(z), n / (WIDTH - 1) - 0.5, n / WIDTH
    powers = {"r": 0.2, "g": 0.2, "w": 0.9, "a": 0.9, "k": 0.7, "v": 0.7}
    wanted = {f"att.x_{letter}": 1 - e ** (power * b) for letter, power in powers.items()}
    if layer > 0:
        wanted["att.v0"] = 0.73 - 0.4 * linear
    return wanted | {
        "att.w0": -6 + 6 * (n / (WIDTH - 1)) ** (1 + a**0.3) + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "att.k_k": 0.71 - 0.1 * linear,
        "att.k_a": np.full(WIDTH, 1.02),
        "att.r_k": np.full(WIDTH, -0.04),
        "ffn.x_k": 1 - e ** (b**4),
    }


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_curves_norms_and_zeros(version, num_layers):
    weights = new_weights(version, num_layers)
    for layer in range(num_layers):
        for name, values in curves(version, layer, num_layers).items():
            found = weights[f"blocks.{layer}.{name}"].reshape(-1)
            np.testing.assert_allclose(found, values, rtol=2e-7, atol=1e-7, err_msg=f"blocks.{layer}.{name}")
        zeros = {"att.output.weight", "ffn.value.weight"} | ({"ffn.receptance.weight"} if version < 7 else set())
        for name in zeros:
            assert not weights[f"blocks.{layer}.{name}"].any(), name
    for norm in ("blocks.0.ln0", "ln_out"):
        assert (weights[f"{norm}.weight"] == 1).all()
        assert not weights[f"{norm}.bias"].any()
    assert all(np.isfinite(values).all() for values in weights.values())


def assert_orthogonal(matrix, gain):
    """Checks that rows of the shorter side have length `gain` and are orthogonal to each other."""
    matrix = matrix.astype(np.float64)
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    np.testing.assert_allclose(gram, gain**2 * np.eye(min(rows, columns)), atol=2e-6 * max(gain, 1) ** 2)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_orthogonal_matrices(version):
    weights = new_weights(version, 2)
    gains = {"att.receptance": 1, "att.key": 0.1, "att.value": 1, "att.gate": 0.1, "ffn.key": 1}
    gains = {f"{name}.weight": gain for name, gain in gains.items()}
    if version == 7:
        gains = dict.fromkeys(("att.w2", "att.a2", "att.g2"), 0.1)
    for layer in range(2):
        for name, gain in gains.items():
            assert_orthogonal(weights[f"blocks.{layer}.{name}"], gain)
    assert_orthogonal(weights["head.weight"], 0.5 * np.sqrt(VOCAB / WIDTH))
    assert_orthogonal(new_weights(version, 1, vocab_size=50)["head.weight"], 0.5)


def assert_uniform(values, bound):
    count = values.size
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > bound * (1 - 30 / count)
    assert abs(values.mean()) < 5 * bound / np.sqrt(3 * count)
    assert abs(values.std() - bound / np.sqrt(3)) < 5 * bound / np.sqrt(3 * count)


def test_uniform_tensors():
    weights = new_weights(6, 2)
    assert_uniform(weights["emb.weight"], 1e-4)
    for layer in range(2):
        att = f"blocks.{layer}.att"
        assert not weights[f"{att}.time_maa_w1"].any()
        assert not weights[f"{att}.time_decay_w1"].any()
        assert_uniform(weights[f"{att}.time_maa_w2"], 0.01)
        assert_uniform(weights[f"{att}.time_decay_w2"], 0.01)
    weights, bound = new_weights(7, 2), 0.5 / np.sqrt(WIDTH)
    assert_orthogonal(weights["blocks.1.att.v2"], 0.1)
    for layer in range(2):
        assert not any(weights[f"blocks.{layer}.att.{letter}1"].any() for letter in ("wag", "wavg")[layer])
        for name, its in (("att.receptance", 1), ("att.value", 1), ("att.key", 0.1), ("ffn.key", 1)):
            assert_uniform(weights[f"blocks.{layer}.{name}.weight"], its * bound)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_seed_gives_the_same_weights_and_another_others(version):
    first, again, other = (new_weights(version, 2, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    drawn = ["emb.weight", "head.weight", "blocks.1.att.key.weight", "blocks.1.ffn.key.weight"]
    assert not any(np.array_equal(first[name], other[name]) for name in drawn)
    for name in ("att.receptance.weight", "att.key.weight", "ffn.key.weight"):
        assert not np.array_equal(first[f"blocks.0.{name}"], first[f"blocks.1.{name}"])


def test_random_numbers_of_the_process_are_left_alone():
    before = torch.get_rng_state()
    new_weights(6, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_do_not_depend_on_the_dtype():
    models = [infctx.build_model(version=6, num_layers=2, width=32, vocab_size=9, head_size=16, dtype=dtype, seed=1)
              for dtype in (torch.float64, torch.float32, torch.bfloat16)]  # fmt: skip
    for precise, single, low in zip(*(model.parameters() for model in models), strict=True):
        assert (precise.dtype, single.dtype, low.dtype) == (torch.float64, torch.float32, torch.bfloat16)
        assert torch.equal(precise.float(), single)
        assert (low.float() - single).abs().max() <= single.abs().max() * 2**-8


def test_every_weight_is_written():
    model = random_model(6, with_state=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialise(model, seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.initial_wkv.any()


@pytest.mark.parametrize("version", [5, 6, 7])
def test_a_new_model_of_one_layer_runs(version):
    model = infctx.build_model(version=version, num_layers=1, width=32, vocab_size=9, head_size=16)
    hidden, _ = model(torch.arange(9)[None])
    assert model.logits(hidden).isfinite().all()

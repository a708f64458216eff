"""Quantized matrices: what they hold, the same bits by both ways of making them, and their products."""

import pytest
import torch

from infctx.cpu import dequantize as compiled
from infctx.errors import InputError
from infctx.model import quantized
from infctx.model.layers import Linear
from infctx.model.quantized import BLOCK, NF4_VALUES, QuantizedLinear, nf4_values, quantize, quantize_layers

from tiny_models import random_model

FORMS = ("int8", "nf4")


def random_matrix(outputs, inputs, seed=0):
    """Makes weights of very different sizes, with a block of zeros and one large weight."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randn(outputs, 1, generator=random).exp()
    matrix = torch.randn(outputs, inputs, generator=random) * sizes / 50
    matrix.view(-1)[:BLOCK] = 0
    matrix.view(-1)[-1] = 3
    return matrix


def random_layer(form, outputs, inputs):
    layer = QuantizedLinear(inputs, outputs, form)
    layer.load_state_dict(quantize(random_matrix(outputs, inputs), form))
    return layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 5), (7, 64), (24, 36), (65, 129)])
def test_a_weight_becomes_the_nearest_value_of_its_block(form, shape):
    """The judge looks at every value that a block could hold, in float64."""
    matrix = random_matrix(*shape)
    layer = random_layer(form, *shape)
    values = torch.tensor(NF4_VALUES) if form == "nf4" else torch.arange(-127, 128) / 127
    flat, found = matrix.double().flatten(), layer.matrix(torch.float64).flatten()
    for begin in range(0, len(flat), BLOCK):
        block = flat[begin : begin + BLOCK]
        largest = block.abs().max().to(torch.bfloat16)
        possible = values.double() * largest
        nearest = (block[:, None] - possible).abs().min(1).values
        assert torch.allclose((found[begin : begin + BLOCK] - block).abs(), nearest, atol=1e-6 * float(largest), rtol=0)
    assert layer.scales.nbytes + layer.codes.nbytes <= matrix.numel() * (8.25 if form == "int8" else 4.25) / 8 + 3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_form_makes_the_bits_of_plain_torch(monkeypatch, form, threads):
    """Also over the borders of the pieces that either takes at once, and of threads."""
    monkeypatch.setattr(quantized, "AT_ONCE", 3 * BLOCK)
    monkeypatch.setattr(compiled, "BLOCKS_AT_ONCE", 5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for outputs, inputs in ((1, 1), (3, 5), (24, 36), (65, 129)):
            layer = random_layer(form, outputs, inputs)
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                wanted = torch.full((outputs * inputs,), torch.nan, dtype=dtype)
                quantized.dequantize(layer.codes, layer.steps(), nf4_values(wanted.device), wanted)
                assert torch.equal(layer.matrix(dtype).flatten(), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_quantizing_in_pieces_changes_no_bit(monkeypatch, form):
    matrix = random_matrix(65, 129)
    whole = quantize(matrix, form)
    monkeypatch.setattr(quantized, "AT_ONCE", 3 * BLOCK)
    assert all(torch.equal(part, whole[name]) for name, part in quantize(matrix, form).items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float64, 1e-14)])
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_dequantized_matrix(form, dtype, bound):
    """Forward and backward against float64, rounded to the dtype: a result in bf16 is never nearer than 1e-3."""
    layer = random_layer(form, 65, 129)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 129, generator=random).to(dtype).requires_grad_()
    gradient = torch.randn(2, 7, 65, generator=random).to(dtype)
    y = layer(x)
    y.backward(gradient)
    matrix = layer.matrix(dtype).double()
    for found, wanted in ((y, x.double() @ matrix.T), (x.grad, gradient.double() @ matrix)):
        assert found.dtype == dtype
        assert (found.double() - wanted.to(dtype).double()).norm() <= bound * wanted.norm()


def test_no_made_matrix_is_kept_for_the_backward_pass():
    layer = random_layer("nf4", 65, 129)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
        layer(torch.ones(3, 129, requires_grad=True)).sum()
    assert not [tensor for tensor in kept if tensor.numel() >= 65 * 129]


def test_all_matrices_of_the_blocks_are_quantized_and_nothing_else():
    model = random_model(7)
    names = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantize_layers(model, "nf4")
    changed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert changed == names - {"head"} and len(changed) == 2 * 6
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])
        else:
            assert not parameter.requires_grad and name.rpartition(".")[0] in changed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(form, value):
    matrix = random_matrix(3, 5)
    matrix[1, 2] = value
    with pytest.raises(InputError, match="not finite"):
        quantize(matrix, form)

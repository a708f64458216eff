"""What the kernels assume of tensor cores: operands that hold under every model of tf32, and which lane holds what.

fragment_maps.json has the second, by CuTe, which is not ours; tools/fragment_maps.py wrote it.
"""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.ops.wkv_reference import wkv_reference

import fragment_maps
from emulator.emulator import HERE, TF32, build
from wkv_emulated import DTYPES, FP32_BAR, emulated, make_inputs, same_bits, values_and_gradients
from wkv_inputs import relative_rms

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles with g++")


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_the_same_whatever_tensor_cores_do_with_low_bits(dtype):
    """Results in fp32 stay near 1e-7: with large parts that are not masked they were 3e-4 to 1.5e-3."""
    inputs, starts, cotangents = make_inputs(1, dtype, (1, 117, 1, 64))
    precise = {name: x.double() for name, x in inputs.items()}
    truth = values_and_gradients(wkv_reference, precise, starts, [x.double() for x in cotangents])
    found = {}
    for model in TF32:
        with emulated(processors=4, tf32=model):
            found[model] = values_and_gradients(wkv_cuda, inputs, starts, cotangents)
        for name, x in found[model].items():
            bar = FP32_BAR if x.dtype == torch.float32 else 2e-3
            assert relative_rms(x, truth[name]) <= bar, (model, name)
    assert not same_bits(found["cut off"], found["all bits"])  # the models differ, in small parts


# ---- which lane holds what, by CuTe ----

MAPS = json.loads(Path(__file__).with_name("fragment_maps.json").read_text())["maps"]
DEPTHS = {"tf32": 8, "bf16": 16}


@pytest.fixture(scope="module")
def sample():
    return build(HERE / "sample.cu")


def held(matrix, places):
    """Returns the elements that each lane holds, (32 lanes, elements)."""
    rows, columns = np.moveaxis(np.array(places), 2, 0)
    return matrix[rows, columns].astype(np.float32)


def registers(elements, kind):
    bits = elements.view(np.uint32)
    if kind == "bf16":  # two in a register, the first in the lower half
        bits = bits[:, ::2] >> 16 | bits[:, 1::2] & 0xFFFF0000
    return torch.from_numpy(bits.view(np.int32).copy())


def product_is_right(sample, maps, kind, left, right, sums):
    """Puts operands into lanes, multiplies them and reads the sum from the lanes, all by the maps."""
    found = {name: torch.full((32, 4), torch.nan) for name in ("bf16", "tf32")}
    words = [registers(held(x, maps[f"{kind} {side}"]), kind) for side, x in (("left", left), ("right", right))]
    # The kernel multiplies as bf16 and as tf32; bf16 has as many registers, in another arrangement.
    arguments = (*words, torch.from_numpy(held(sums, maps[f"{kind} sum"])), *found.values())
    sample.launch("multiply_fragments", 1, 32, arguments=arguments)
    return np.array_equal(found[kind].numpy(), held(sums + left @ right, maps[f"{kind} sum"]))


def draw(seed, kind):
    random = np.random.default_rng(seed)
    shapes = (16, DEPTHS[kind]), (DEPTHS[kind], 8), (16, 8)
    return [random.integers(-64, 65, shape) / 4 for shape in shapes]  # exact in any order


@pytest.mark.parametrize("kind", DEPTHS)
def test_mma_has_the_fragments_of_cute(sample, kind):
    assert all(product_is_right(sample, MAPS, kind, *draw(seed, kind)) for seed in range(5))
    for row, column in np.ndindex(16, DEPTHS[kind]):  # one element of the left operand alone
        left, right, sums = draw(row, kind)
        left[:] = 0
        left[row, column] = 1
        assert product_is_right(sample, MAPS, kind, left, right, sums)


def loads_are_right(sample, maps):
    elements = torch.arange(256, dtype=torch.int16)
    loaded = torch.zeros(32, 14, dtype=torch.int32)
    sample.launch("load_matrices", 1, 32, arguments=(elements.view(torch.bfloat16), loaded))
    halves, first = loaded.numpy().view(np.uint16), 0
    for name, places in maps.items():
        if name.startswith("ldmatrix"):
            rows, columns = np.moveaxis(np.array(places), 2, 0)
            if not np.array_equal(halves[:, first : first + rows.shape[1]], 8 * rows + columns):
                return False
            first += rows.shape[1]
    assert first == 28
    return True


def test_ldmatrix_has_the_fragments_of_cute(sample):
    assert loads_are_right(sample, MAPS)


@pytest.mark.parametrize("name", MAPS)
def test_a_wrong_map_is_found(sample, name):
    """Two elements of a lane, or of two lanes, in each other's place."""
    for one, other in (((0, 0), (0, 1)), ((5, 1), (9, 1)), ((0, 0), (31, 1))):
        wrong = copy.deepcopy(MAPS)
        lanes = wrong[name]
        lanes[one[0]][one[1]], lanes[other[0]][other[1]] = lanes[other[0]][other[1]], lanes[one[0]][one[1]]
        if name.startswith("ldmatrix"):
            assert not loads_are_right(sample, wrong)
        else:
            kind = name.split()[0]
            # A sum goes in and comes out by its map, so only another product shows it.
            assert not all(product_is_right(sample, wrong, kind, *draw(seed, kind)) for seed in range(3))


HEADER = """
using SM80_16x8_Row = Layout<Shape <Shape < _4,_8>,Shape < _2,_2>>,
                             Stride<Stride<_32,_1>,Stride<_16,_8>>>;
template <> struct MMA_Traits<First>
{
  using BLayout = Layout<Shape <Shape <_4,_8>, _2>,
                         Stride<Stride<_8,_1>,_32>>;
  using CLayout = SM80_16x8_Row;
};
template <> struct MMA_Traits<Second>
     : MMA_Traits<First>
{
  using ValTypeD = float;
};
"""


def test_traits_are_evaluated_as_cute_does():
    def places(trait, layout, rows):
        table = fragment_maps.lanes(*fragment_maps.find_layout(HEADER, "MMA_Traits", trait, layout))
        return [[[x % rows, x // rows] for x in lane] for lane in table]

    assert places("First", "CLayout", 16) == places("Second", "CLayout", 16) == MAPS["bf16 sum"]
    assert places("Second", "BLayout", 8) == [[place[::-1] for place in lane] for lane in MAPS["tf32 right"]]
    with pytest.raises(SystemExit, match="headers have no Third; use version 4.2.0"):
        places("Third", "CLayout", 16)

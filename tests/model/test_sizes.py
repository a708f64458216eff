"""Sizes: every published model has exactly its published number of parameters."""

import math

import pytest

import infctx
from infctx.errors import InputError
from infctx.model.sizes import PUBLISHED_SIZES, Sizes, describe, make_sizes, published_sizes

from tiny_models import RANKS

PARAMETERS = {
    "eagle-0.4b": 461_721_600,
    "eagle-1.5b": 1_577_754_624,
    "eagle-3b": 3_062_999_040,
    "eagle-7b": 7_518_044_160,
    "finch-1.6b": 1_599_873_024,
    "finch-3b": 3_099_863_040,
    "finch-7b": 7_635_746_816,
    "finch-14b": 14_069_088_256,
    "goose-0.1b": 191_034_624,
    "goose-0.4b": 450_767_872,
    "goose-1.5b": 1_527_404_544,
    "goose-2.9b": 2_947_735_040,
    "goose-7.2b": 7_199_141_888,
    "goose-13.3b": 13_269_245_952,
}
STATE_ELEMENTS = {  # matrices and shift vectors of one lane
    "eagle-0.4b": 1_622_016,
    "eagle-1.5b": 3_244_032,
    "eagle-3b": 5_406_720,
    "eagle-7b": 8_650_752,
    "finch-1.6b": 3_244_032,
    "finch-3b": 5_406_720,
    "finch-7b": 8_650_752,
    "finch-14b": 16_490_496,
    "goose-0.1b": 66 * 12 * 768,
    "goose-0.4b": 66 * 24 * 1024,
    "goose-1.5b": 66 * 24 * 2048,
    "goose-2.9b": 66 * 32 * 2560,
    "goose-7.2b": 66 * 32 * 4096,
    "goose-13.3b": 66 * 61 * 4096,
}


def test_all_published_models_are_here():
    assert PARAMETERS.keys() == PUBLISHED_SIZES.keys() == STATE_ELEMENTS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_state(name):
    sizes = published_sizes(name)
    assert sizes.num_parameters == PARAMETERS[name]
    model = infctx.build_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert sizes.state_elements == STATE_ELEMENTS[name]
    assert sum(math.prod(part.shape) for part in model.initial_state(1)) == STATE_ELEMENTS[name]
    assert model.sizes == sizes


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("eagle-0.4b", (5, 24, 1024, 16, 3584, None, None)),
        ("eagle-7b", (5, 32, 4096, 64, 14336, None, None)),
        ("finch-3b", (6, 32, 2560, 40, 8960, 32, 64)),
        ("finch-7b", (6, 32, 4096, 64, 14336, 64, 128)),
        ("finch-14b", (6, 61, 4096, 64, 14336, 64, 128)),
    ],
)
def test_shapes(name, shape):
    sizes = published_sizes(name)
    found = (sizes.version, sizes.num_layers, sizes.width, sizes.num_heads, sizes.ffn_width)
    assert (*found, sizes.mix_rank, sizes.decay_rank) == shape
    assert (sizes.vocab_size, sizes.head_size) == (65536, 64)


def test_what_is_left_out_is_derived():
    assert make_sizes(version=5, num_layers=12, width=768) == Sizes(5, 12, 768, 65536, 64, 2688, None, None)
    assert make_sizes(version=5, num_layers=12, width=768).num_parameters == 192_807_936
    odd = make_sizes(version=6, num_layers=3, width=200, vocab_size=300, head_size=8)
    assert odd == Sizes(6, 3, 200, 300, 8, 672, 32, 64)  # 3.5 * 200 = 700, down to a multiple of 32
    given = make_sizes(version=6, num_layers=1, width=64, ffn_width=31, mix_rank=3, decay_rank=5)
    assert (given.ffn_width, given.mix_rank, given.decay_rank) == (31, 3, 5)
    assert make_sizes(version=5, num_layers=1, width=8, head_size=8).ffn_width == 32
    goose = make_sizes(version=7, num_layers=2, width=384)
    ranks = {"decay_rank": 64, "rate_rank": 64, "value_rank": 32, "gate_rank": 96}  # 49, 49, 33 and 98, to 32s
    assert goose == Sizes(7, 2, 384, 65536, 64, 4 * 384, None, **ranks)


@pytest.mark.parametrize("version", [5, 6, 7])
def test_closed_form_holds_for_odd_sizes(version):
    sizes = dict(version=version, num_layers=2, width=24, vocab_size=19, head_size=8, ffn_width=50, **RANKS[version])
    model = infctx.build_model(**sizes, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == make_sizes(**sizes).num_parameters


def test_describe():
    assert describe(published_sizes("finch-3b")) == "Finch, 3,099,863,040 parameters, 32 layers of width 2560"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"version": 8}, "version: 8"),
        ({"num_layers": 0}, "num_layers: 0"),
        ({"width": -64}, "width: -64"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"head_size": 0}, "head_size: 0"),
        ({"ffn_width": 0}, "ffn_width: 0"),
        ({"mix_rank": 0}, "mix_rank: 0"),
        ({"decay_rank": -1}, "decay_rank: -1"),
        ({"width": 100}, "width: 100 is not a multiple of head_size 64"),
        ({"version": 5, "mix_rank": 32}, "mix_rank: only version 6 has it"),
        ({"version": 5, "decay_rank": 32}, "decay_rank: only version 6 and 7 has it"),
        ({"version": 6, "gate_rank": 32}, "gate_rank: only version 7 has it"),
    ],
)
def test_sizes_that_make_no_model_are_refused(changed, match):
    with pytest.raises(InputError, match=match) as refusal:
        make_sizes(**({"version": 6, "num_layers": 2, "width": 128} | changed))
    assert "\n" not in str(refusal.value)


def test_names_that_are_not_known_are_refused():
    with pytest.raises(
        InputError, match=r"'finch-2b'; choose one of these:\n  eagle-0.4b, .*\n.*finch-14b\n.*goose-13.3b"
    ):
        infctx.build_model("finch-2b", device="meta")
    with pytest.raises(InputError, match="name of a published size, or version"):
        infctx.build_model(device="meta")
    with pytest.raises(InputError, match="name of a published size, or version"):
        infctx.build_model("finch-3b", width=128, device="meta")
    with pytest.raises(InputError, match="there is no size or option 'widht'; did you mean width?"):
        infctx.build_model(version=6, num_layers=2, widht=128, device="meta")
    with pytest.raises(InputError, match="there is no size or option 'x'; known: version, num_layers, width, "):
        infctx.build_model(version=6, num_layers=2, width=128, x=1, device="meta")
    with pytest.raises(InputError, match="there is no size or option 'devise'; did you mean device?"):
        infctx.build_model("finch-3b", devise="meta")
    with pytest.raises(InputError, match="needs more than width; give version, num_layers too"):
        infctx.build_model(width=128, device="meta")

"""How time is cut into spans: balanced, counted in waves, and by a model that agrees with the times of an H100."""

import random

import pytest
import torch

from infctx.conventions import START_SPACING
from infctx.cuda.wkv_layout import CHUNK_TOKENS, SPAN_TOKENS, cut
from infctx.cuda.wkv_time import COSTS, FITTED, LAUNCHES, Processors, find_layout, microseconds
from infctx.ops import wkv_check

BF16 = torch.bfloat16
H100 = Processors(132, 233_472)
DIRECTIONS = ("forward", "backward")


@pytest.mark.parametrize("seed", range(5))
def test_spans_are_even_and_no_other_number_is_much_better(seed):
    """Counts in the time of 64 tokens, about 7.5 us of an H100, what spans cost backward: the longest one and a third
    of a unit to begin, once for each wave of blocks; two fifths of that for the sums before; and the memory traffic, of
    which 25 million bytes take as long.  The best of all numbers of spans is at most 15 % better.
    """
    draw = random.Random(seed)
    for _ in range(100):
        batch, heads, count = draw.randint(1, 9), draw.randint(1, 70), draw.choice([16, 46, 80, 108, 132, 188])
        tokens = int(2 ** draw.uniform(10, 16))
        units = -(-tokens // SPAN_TOKENS)

        def cost(spans, units=units, shape=(batch, tokens, heads, 64), count=count):
            rows, longest = shape[0] * shape[2], -(-units // spans) + 0.3
            sums = -(-rows * (spans - 1) // (4 * count)) * 0.4
            traffic = cut(shape, BF16, spans).backward_bytes() * rows * shape[1] / 25e6
            return longest * (-(-rows * spans // count) + sums) + traffic

        layout = find_layout((batch, tokens, heads, 64), BF16, Processors(count), "backward")
        assert layout.span_tokens % SPAN_TOKENS == 0
        assert (layout.spans - 1) * layout.span_tokens < tokens <= layout.spans * layout.span_tokens
        best = min(cost(spans) for spans in range(1, units + 1))
        assert cost(layout.spans) <= 1.15 * best, (batch, tokens, heads, count)


@pytest.mark.parametrize(
    ("shape", "most_chunks"),
    [
        ((1, 2048, 12), 12),  # not 48: the last span had the whole remainder
        ((1, 4096, 12), 24),  # not 56
        ((1, 8192, 12), 48),  # not 72
        ((4, 4096, 40), 320),  # not 512: 160 blocks on 132 processors are two waves
        ((8, 4096, 32), 512),  # two full waves; more spans would only cost their sums
    ],
)
def test_chunks_in_sequence(shape, most_chunks):
    layout = find_layout((*shape, 64), BF16, H100, "backward")
    waves = -(-layout.rows * layout.spans // H100.count)
    assert waves * layout.span_tokens // CHUNK_TOKENS <= most_chunks


def test_a_second_block_on_a_processor_counts_in_forward():
    """An H100 has room for two blocks of forward; processors with 100 KB of shared memory have room for one.  Launches
    and traffic are left out, which are the same.
    """
    layout, costs = cut((8, 4096, 32, 64), BF16, 1), COSTS["forward"]
    same = LAUNCHES["forward"] + costs.megabyte * layout.forward_bytes() * layout.rows * layout.tokens / 1e6
    with_two, with_one = (microseconds(layout, Processors(132, x), "forward") - same for x in (233_472, 102_400))
    assert 1.6 < with_one / with_two < 2.0
    assert find_layout((1, 4096, 40, 64), BF16, H100, "forward").spans > 3


def test_the_check_of_a_new_device_has_several_spans():
    for count in (16, 46, 80, 108, 132, 188):
        for dtype in (BF16, torch.float32):
            for shared_bytes in (102_400, 233_472):
                for direction in DIRECTIONS:
                    shape = (1, wkv_check.NUM_TOKENS, 1, 64)
                    assert find_layout(shape, dtype, Processors(count, shared_bytes), direction).spans == 3
    assert SPAN_TOKENS % START_SPACING == 0


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (0, 4096, 40, 64), (3, 4096, 0, 64)])
def test_one_unit_or_none(shape):
    for direction in DIRECTIONS:
        assert find_layout(shape, BF16, H100, direction).rows == shape[0] * shape[2]


# docs/benchmarks/wkv-nvidia-h100-80gb-hbm3.md at 2681cb9: B, T, H, spans at that time, forward to train and backward in
# us.
MEASURED = [
    (1, 1024, 40, 2, 109.5, 194.2),
    (1, 4096, 40, 3, 279.8, 507.7),
    (1, 4096, 64, 2, 405.1, 716.4),
    (1, 65536, 40, 3, 4112.4, 7298.2),
    (8, 1024, 64, 1, 346.8, 1178.3),
    (8, 4096, 32, 1, 678.2, 2328.5),
    (8, 4096, 40, 1, 1282.0, 3257.9),
    (8, 16384, 64, 1, 5285.7, 18056.8),
    (8, 65536, 32, 1, 10567.1, 36730.9),
]


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_the_model_agrees_with_times_of_an_h100(row):
    *shape, spans, forward, backward = row
    layout = cut((*shape, 64), BF16, spans)
    found = [microseconds(layout, H100, direction, FITTED) for direction in DIRECTIONS]
    assert found == pytest.approx([forward, backward], rel=0.08)

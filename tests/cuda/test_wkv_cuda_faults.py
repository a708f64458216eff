"""The tests of the CUDA WKV op find faults: every order of threads gives the same bits, every output is written,
faults planted in the kernels' sources are caught, sanitizers find nothing, and offsets do not overflow."""

import itertools
import re
import shutil

import pytest
import torch

from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.ops.wkv_reference import wkv_reference

from emulator.emulator import ORDERS, EmulatorError, build
from wkv_emulated import DTYPES, FP32_BAR, NAMES, SOURCES, emulated, make_inputs, same_bits, values_and_gradients
from wkv_inputs import relative_rms

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles with g++")

# ---- every order, every element ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [32, 64])
def test_every_order_gives_the_same_bits(channels, dtype):
    inputs, starts, cotangents = make_inputs(1, dtype, (2, 150, 2, channels))
    for processors in (1, 24):
        results = []
        for order in (*ORDERS, "forward"):
            with emulated(processors, order) as launched:
                results.append(values_and_gradients(wkv_cuda, inputs, starts, cotangents))
        assert len(launched) == (2 if processors == 1 else 6)
        assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 77, 2, 32), (1, 150, 1, 60), (1, 20, 1, 80)])
def test_every_element_of_the_outputs_is_written(shape, dtype, monkeypatch):
    inputs, starts, cotangents = make_inputs(2, dtype, shape)
    calls = [(inputs, starts), ({name: inputs[name] for name in NAMES}, None)]

    def run_all():
        results = []
        for processors in (1, 24):
            with emulated(processors):
                results += [values_and_gradients(wkv_cuda, given, begins, cotangents) for given, begins in calls]
        return results

    expected = run_all()
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    poisoned = []

    def poison(x):
        poisoned.append(x.shape)
        return x.fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    found = run_all()
    assert len(poisoned) >= 8 * len(found)  # y, final, kept, dr, dk, dv, dw, du, dstate and more
    for one, other in zip(found, expected, strict=True):
        assert same_bits(one, other)
        assert all(x.isfinite().all() for x in one.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_sanitizers_find_nothing(dtype):
    inputs, starts, cotangents = make_inputs(3, dtype, (1, 117, 1, 32))
    with emulated(processors=24):
        expected = values_and_gradients(wkv_cuda, inputs, starts, cotangents)
    with emulated(processors=24, sanitize=True) as launched:
        assert same_bits(values_and_gradients(wkv_cuda, inputs, starts, cotangents), expected)
    assert len(launched) == 6


# ---- planted faults ----

# By name: text in one of the files => its replacement; line breaks may differ.
FORWARD_FAULTS = {
    "no barrier at the end of a chunk": "cp_async_wait<2>(); sync_block(); => cp_async_wait<2>();",
    "values are not waited for": "cp_async_wait<2>(); => cp_async_wait<3>();",
    "too few buffers of staged chunks": "staged_chunks = 3; => staged_chunks = 2;",
    "too few buffers of values": "value_stages = 4; => value_stages = 3;",
    "one buffer of scores": "scores + (chunk + 1) % 2 * chunk_scores => scores",
    "starts are passed over": "if (begins.at(chunk)) { => if (false) {",
    "initial of the first head": "initial_batch + place.head => initial_batch",
    "a kept state is late": "place.span * state_step => place.span * state_step / 2",
    "no barrier in sums": "<span_stages - 2>(); sync_block(); => <span_stages - 2>();",
    "sums do not wait for values": "wait<span_stages - 2> => wait<span_stages - 1>",
    "decays of spans pass over starts": "cut ? 0.0f : => false ? 0.0f :",
    "another span's beginning": "ends[(backward ? span + 1 : span) => ends[(backward ? span : span + 1)",
    "reads tokens after the end": "if (places.inside(group, which)) { loaded => if (true) { loaded",
    "copies tokens after the end": "const bool inside = token < end; => const bool inside = true;",
    "writes tokens after the end": "if (token < end) { => if (true) {",
    "half a decay": "decay_of(decays.log_whole[channel]) => decay_of(decays.eight[channel][0])",
    "decay before a token twice": "return which == 0 ? since : since * => return since *",
    "no decay of the first group": "group == 0 ? since : since * eight[channel][0] => since",
}
BACKWARD_FAULTS = {
    "a tile is overwritten": "end = span.place.end_token; sync_roles(); => end = span.place.end_token;",
    "no barrier after a tile": "cp_async_wait<0>(); sync_roles(); => cp_async_wait<0>();",
    "a tile is not waited for": "cp_async_wait<0>(); sync_roles => cp_async_wait<1>(); sync_roles",
    "values miss a barrier": "sync_roles(); SumFragment => SumFragment",
    "keys miss a barrier": "sync_roles(); scale_outside => scale_outside",
    "no barrier before scores": [
        "sync_roles(); find_scores => find_scores",
        "sync_roles(); scale_outside => scale_outside",
    ],
    "no barrier after scores": [
        "sync_roles(); SumFragment => SumFragment",
        "sync_roles(); find_inner => find_inner",
    ],
    "one buffer of staged chunks": "chunk % 2 * staged_floats => 0",
    "keys lose dS_T": "gradient.load(span.entering(), slab) => gradient.clear()",
    "values lose dS_T": "reader.load(span.entering(), span.slab) => reader.clear()",
    "keys pass over starts": "gradient.clear(); =>",
    "values pass over starts": "if (span.begins_at(first + chunk)) reader.clear(); =>",
    "the walk passes over starts": "if (!span.begins_at(chunk)) return; => return;",
    "sums pass over starts": "if (begins && backward) state.clear(); =>",
    "decays of spans pass over starts": "cut ? 0.0f : => false ? 0.0f :",
    "dinitial of one start alone": "sum.x[n].x[i] += more => sum.x[n].x[i] = more",
    "decay of the wrong side": "*= decays.until( => *= decays.since(",
    "paths do not decay": "d.w.x[channel][0][0] * decays.whole[channel] => d.w.x[channel][0][0]",
    "a level is left out": "meet_halves<2>(d, dscores, r, k, decays); =>",
    "writes tokens after the end": "if (places.inside(group, which)) { store => if (true) { store",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """`planted(fault)`: a copy of the kernels with the fault, and a cache for such copies."""
    cache = tmp_path_factory.mktemp("cache")

    def plant(fault):
        folder = tmp_path_factory.mktemp("kernels")
        for file in (*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")):
            shutil.copy(file, folder)
        for text in [fault] if isinstance(fault, str) else fault:
            old, _, new = text.partition(" =>")
            pattern = re.compile(r"\s+".join(re.escape(word) for word in old.split()))
            files = [file for file in folder.iterdir() if pattern.search(file.read_text())]
            assert files, f"{old!r} is nowhere to be replaced"
            for file in files:
                file.write_text(pattern.sub(lambda _, new=new: new.strip(), file.read_text()))
        return {"source_folder": folder, "cache": cache}

    return plant


@pytest.fixture(scope="module")
def problem():
    """Returns a call of each op with three spans, and its results in float64."""
    inputs, starts, cotangents = make_inputs(4, torch.float32, (2, 149, 2, 32), "slow")  # a leak shows far away
    starts = torch.zeros_like(starts)
    starts[0, [1, 2, 6]] = True  # two documents begin in the first span, one in the second
    starts[1, 9] = True
    precise = {name: x.double() for name, x in inputs.items()}
    truth = values_and_gradients(wkv_reference, precise, starts, [x.double() for x in cotangents])
    tokens = tuple(inputs[name] for name in NAMES[:5])
    with emulated(processors=24):
        kept = torch.ops.infctx.wkv_forward(*tokens, inputs["state"], starts, inputs["initial"], True)[2]
    return (
        ((*tokens, inputs["state"], starts, inputs["initial"], True), [truth["y"], truth["S_T"]]),
        (
            (*tokens, starts, inputs["initial"], kept, *cotangents, True),
            [truth[f"d{name}"] for name in (*NAMES, "initial")],
        ),
    )


def how_caught(op, call, truth, **kernels):
    """Returns, by order of threads, an EmulatorError's message or the worst error, if there is one."""
    caught = {}
    for order in ORDERS:
        try:
            with emulated(processors=24, order=order, **kernels):
                results = op(*call)
        except EmulatorError as error:
            assert not str(error).startswith("g++ failed"), error
            caught[order] = str(error)
        else:
            errors = [relative_rms(found, true) for found, true in zip(results, truth, strict=False)]  # except kept
            if not all(error <= FP32_BAR for error in errors):
                caught[order] = f"relative errors {errors}"
    return caught


def test_nothing_is_caught_without_a_fault(problem):
    forward, backward = problem
    assert not how_caught(torch.ops.infctx.wkv_forward, *forward)
    assert not how_caught(torch.ops.infctx.wkv_backward, *backward)


def one_of_six(faults):
    """Picks every sixth fault; the others are marked slow."""
    slow = [pytest.mark.slow]
    return [pytest.param(fault, marks=slow if number % 6 else []) for number, fault in enumerate(faults)]


@pytest.mark.parametrize("fault", one_of_six(FORWARD_FAULTS))
def test_fault_in_the_forward_is_caught(fault, planted, problem):
    assert how_caught(torch.ops.infctx.wkv_forward, *problem[0], **planted(FORWARD_FAULTS[fault]))


@pytest.mark.parametrize("fault", one_of_six(BACKWARD_FAULTS))
def test_fault_in_the_backward_is_caught(fault, planted, problem):
    assert how_caught(torch.ops.infctx.wkv_backward, *problem[1], **planted(BACKWARD_FAULTS[fault]))


# ---- offsets beyond 2^31 ----

OFFSETS = """
#include "wkv_spans.cuh"

extern "C" __global__ void find_offsets(int64* offsets, int64 num_batches, int64 num_tokens, int64 num_heads,
                                        int64 num_spans, int64 span_tokens, int64 w_batch, int64 w_token,
                                        int64 w_head) {
    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const Place place = find_place(problem, 0, static_cast<int32>(num_spans));
    if (threadIdx.x != 0) return;
    const Input* base = reinterpret_cast<const Input*>(offsets);
    const float* floats = reinterpret_cast<const float*>(offsets);
    const uint8* flags = reinterpret_cast<const uint8*>(offsets);
    const int32 token = place.end_token - 1;
    const int64 tile = place.row * problem.num_tiles() + token / tile_tokens;
    const auto rows = find_rows(base, problem, place);
    const Starts begins = find_starts(flags, problem, place);
    int64* to = offsets + blockIdx.x * 5;
    to[0] = rows.at(token) - base;
    to[1] = own_places(rows, 3, token, place.end_token).at(1, 1);
    to[2] = find_matrix(base, tile) - base;
    to[3] = find_decay_rows(floats, w_batch, w_token, w_head, place).at(token) - floats;
    to[4] = begins.flags - flags + begins.first;
}
"""


def test_offsets_of_huge_problems_do_not_overflow(tmp_path):
    (tmp_path / "offsets.cu").write_text(OFFSETS)
    B, T, H, N, spans, span_tokens = 3, 2**21 + 5, 40, 64, 2, 2**20
    emulation = build(tmp_path / "offsets.cu", [f"HEAD_SIZE={N}"], (SOURCES,), cache=tmp_path / "cache")
    strides = (T * H * N + 2, H * N, N)
    places = list(itertools.product(range(B), range(H), range(spans)))
    offsets = torch.full((len(places), 5), -1)
    arguments = (offsets, B, T, H, spans, span_tokens, *strides)
    emulation.launch("find_offsets", len(places), 32, arguments=arguments)
    expected = []
    for batch, head, span in places:
        token = (T if span == spans - 1 else span_tokens) - 1
        row = ((batch * T + token) * H + head) * N
        own = row + 9 * H * N + 48  # of lane 0: token 8 + 1, channel 0 of slab 3
        tile = (batch * H + head) * -(-T // 64) + token // 64
        decay = sum(x * stride for x, stride in zip((batch, token, head), strides, strict=True))
        start = batch * -(-T // 16) + span * span_tokens // 16
        expected.append([row, own, tile * N * N, decay, start])
    assert offsets.tolist() == expected
    assert offsets[-1, :4].min() > 2**31

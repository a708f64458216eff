"""The tests of the CUDA WKV op find faults: every order of threads gives the same bits, every output is written,
faults planted in the kernels' sources are caught, sanitizers find nothing, and offsets do not overflow."""

import functools
import itertools
import re
import shutil

import pytest
import torch

from infctx.cuda.wkv7_cuda import wkv7_cuda
from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.ops.wkv_reference import wkv7_reference, wkv_reference

from emulator.emulator import ORDERS, EmulatorError, build
from wkv_emulated import (
    DTYPES,
    FP32_BAR,
    SOURCES,
    emulated,
    make_inputs,
    names_of,
    same_bits,
    values_and_gradients,
)
from wkv_inputs import relative_rms

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles with g++")

OPS = {"wkv": (wkv_cuda, wkv_reference), "wkv7": (wkv7_cuda, wkv7_reference)}

# ---- every order, every element ----


@pytest.mark.parametrize(
    "op, channels, dtype",
    [
        *(("wkv", channels, dtype) for channels in (32, 64) for dtype in DTYPES),
        ("wkv7", 64, torch.bfloat16),
        pytest.param("wkv7", 32, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_every_order_gives_the_same_bits(op, channels, dtype):
    inputs, starts, cotangents = make_inputs(
        1, dtype, (2, 150, 2, channels) if op == "wkv" else (1, 150, 1, channels), op=op
    )
    for processors in (1, 24):
        results = []
        for order in (*ORDERS, "forward"):
            with emulated(processors, order) as launched:
                results.append(values_and_gradients(OPS[op][0], inputs, starts, cotangents))
        assert len(launched) == (2 if processors == 1 else 6)
        assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(
    "op, shape, dtype",
    [
        *(("wkv", shape, dtype) for shape in ((2, 77, 2, 32), (1, 150, 1, 60), (1, 20, 1, 80)) for dtype in DTYPES),
        ("wkv7", (2, 77, 1, 20), torch.float32),
        ("wkv7", (1, 150, 1, 60), torch.bfloat16),
    ],
)
def test_every_element_of_the_outputs_is_written(op, shape, dtype, monkeypatch):
    inputs, starts, cotangents = make_inputs(2, dtype, shape, op=op)
    calls = [(inputs, starts), ({name: inputs[name] for name in names_of(inputs)}, None)]

    def run_all():
        results = []
        for processors in (1, 24):
            with emulated(processors):
                results += [values_and_gradients(OPS[op][0], given, begins, cotangents) for given, begins in calls]
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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_sanitizers_find_nothing(dtype, op):
    inputs, starts, cotangents = make_inputs(3, dtype, (1, 117, 1, 32), op=op)
    with emulated(processors=24):
        expected = values_and_gradients(OPS[op][0], inputs, starts, cotangents)
    with emulated(processors=24, sanitize=True) as launched:
        assert same_bits(values_and_gradients(OPS[op][0], inputs, starts, cotangents), expected)
    assert len(launched) == 6


# ---- planted faults ----

# By name: text in one of the files => its replacement; line breaks may differ.
FORWARD_FAULTS = {
    "no barrier at the end of a chunk": [
        "cp_async_wait<2>(); sync_roles(); => cp_async_wait<2>();",
        "place.end_token, results); } sync_roles(); => place.end_token, results); }",
    ],
    "values are not waited for": "cp_async_wait<2>(); => cp_async_wait<3>();",
    "too few buffers of staged chunks": "staged_chunks = 3; => staged_chunks = 2;",
    "too few buffers of values": "value_stages = 4; => value_stages = 3;",
    "one buffer of scores": "scores_start() + chunk % 2 * chunk_scores => scores_start()",
    "starts are passed over": "if (begins.at(chunk)) { => if (false) {",
    "initial of the first head": "input.initial_batch + place.head) => input.initial_batch)",
    "a kept state is late": "place.span * input.state_step => place.span * input.state_step / 2",
    "no barrier in sums": "<span_stages - 2>(); sync_block(); => <span_stages - 2>();",
    "sums do not wait for values": "wait<span_stages - 2> => wait<span_stages - 1>",
    "decays of spans pass over starts": "cut ? 0.0f : => false ? 0.0f :",
    "another span's beginning": "ends[(backward ? span + 1 : span) => ends[(backward ? span : span + 1)",
    "reads tokens after the end": "const bool inside = places.inside(group, which); => const bool inside = true;",
    "copies tokens after the end": "const bool inside = token < end; => const bool inside = true;",
    "writes tokens after the end": "if (token < end) { => if (true) {",
    "half a decay": "exp2_approximate(decays.log2_whole[channel]) => exp2_approximate(decays.eight[channel][0])",
    "decay before a token twice": "return which == 0 ? since : since * => return since *",
    "no decay of the first group": "group == 0 ? since : since * eight[channel][0] => since",
}
BACKWARD_FAULTS = {
    "v is copied too late": "v_ahead = walks_ahead ? tile_chunks + 2 : tile_chunks => v_ahead = tile_chunks - 1",
    "copies are not waited for": "cp_async_wait<0>(); sync_roles(); => cp_async_wait<1>(); sync_roles();",
    "one buffer of dy": "dy + place_of(chunk, 2) * chunk_values => dy",
    "values miss a barrier": "cp_async_wait<0>(); sync_roles(); } => cp_async_wait<0>(); }",
    "one buffer of what comes from outside": "outside + place_of(chunk, 2) * outside_floats => outside",
    "no barrier before scores": "sync_role<span_threads>(stage_barrier); =>",
    "one buffer of scores": "return scores + place_of(chunk, 2) * chunk_scores => return scores",
    "one buffer of dscores": "dscores + place_of(chunk, 2) * chunk_scores => dscores",
    "one buffer of staged chunks": "find_staged(staged + place_of(chunk, 2) * staged_floats) => find_staged(staged)",
    "half of G is taken back late": (
        "take_columns<parked>(gradient, own); put_own(own, read); => "
        "put_own(own, read); take_columns<parked>(gradient, own);"
    ),
    "the walk loads another chunk": "walk.load(chunk - 2); => walk.load(chunk - 1);",
    "keys lose dS_T": "gradient.load(span.entering(), span.slab) => gradient.clear()",
    "values lose dS_T": "reader.load(span.entering(), span.slab) => reader.clear()",
    "keys pass over starts": "gradient.clear(); =>",
    "values pass over starts": "reader.clear(); } => }",
    "the walk passes over starts": "if (!span.begins_at(chunk)) return; => return;",
    "sums pass over starts": "state.clear(); } cut => } cut",
    "decays of spans pass over starts": "cut ? 0.0f : => false ? 0.0f :",
    "dinitial of one start alone": "bits_float(sum.x[0]) + x[0] => x[0]",
    "decay of the wrong side": "*= decays.until( => *= decays.since(",
    "paths do not decay": "through[channel] * decays.whole[channel] => through[channel]",
    "a level is left out": "meet_halves<2>(d, dscores, r, k, decays); =>",
    "writes tokens after the end": "pair, places.inside(group, which)); => pair, true);",
}


FORWARD_FAULTS_7 = {
    "no barrier before scores": "sync_block(); find_all_scores<false> => find_all_scores<false>",
    "no barrier before the solution": "sync_block(); solve<false> => solve<false>",
    "no barrier after the solution": "cp_async_wait<1>(); sync_block(); => cp_async_wait<1>();",
    "no barrier at the end of a chunk": "reader.advance<true>(staged); sync_block(); => reader.advance<true>(staged);",
    "values are not waited for": "cp_async_wait<1>(); => cp_async_wait<2>();",
    "starts are passed over": "if (begins.at(chunk)) { => if (false) {",
    "spans pass over starts": "if (begins && !backward) { => if (false) {",
    "transitions pass over starts": "sum.clear(); transition.clear(); } => sum.clear(); }",
    "a transition that is transposed": "store_by_values(find_matrix(transitions, index), slab, transition) => "
    "transition.store(find_matrix(transitions, index), slab)",
    "another span's beginning": "(backward ? span + 1 : span) => (backward ? span : span + 1)",
    "one buffer of joined states": "matrix + step % 2 * size => matrix",
    "no barrier in the join": "+ key; sync_block(); => + key;",
    "r reads before its token's decay": "Own late = late_of(x.r, decays); stage => Own late = x.r; stage",
    "r does not read its own token's b": "stage_bonus(bonuses + bonus_floats, slab, x.r, x.b) => "
    "stage_bonus(bonuses + bonus_floats, slab, x.r, x.k)",
    "the solution forgets a token": "if (before < step) => if (before + 1 < step)",
    "inner values are not written": "multiply(sum, inner_values[i], right); =>",
}
BACKWARD_FAULTS_7 = {
    "a tile is not waited for": "cp_async_wait<0>(); sync_block(); } => cp_async_wait<1>(); sync_block(); }",
    "no barrier before scores": "sync_block(); find_all_scores<true> => find_all_scores<true>",
    "no barrier before the solution": "sync_block(); solve<true> => solve<true>",
    "no barrier after the solution": "gradient); sync_block(); SumFragment => gradient); SumFragment",
    "no barrier before a state is parked": "sync_block(); park( => park(",
    "no barrier at the end of a chunk": "span.slab())); sync_block(); } => span.slab())); }",
    "no barrier after the scores' gradients": "} sync_block(); const Vectors => } const Vectors",
    "dS_T is lost": "gradient.load(find_matrix(gradients, span.place().row * num_spans + span.place().span), "
    "span.slab()) => gradient.clear()",
    "starts are passed over": "gradient.clear(); =>",
    "the walk passes over starts": "if (span.begins_at(passed)) { => if (false) {",
    "spans pass over starts": "if (begins && backward) sum.clear(), transition.clear(); =>",
    "transitions pass over starts": "sum.clear(), transition.clear(); => sum.clear();",
    "dinitial of one start alone": "sum.state[n].x[i] += gradient => sum.state[n].x[i] = gradient",
    "a pair of scores' gradients is exchanged": "pair / 2, writer = pair % 2; => pair % 2, writer = pair / 2;",
    "a level is left out": "meet_halves7<2>(d, dscores, x, decays); =>",
    "the decay of r's own token": "+= r * late; => += 0;",
    "paths of the inner vectors": "+ inner_sum * of_inner.x[channel][group][which]; => ;",
    "decay of the wrong side": "d.b.x[channel][group][which] *= until => d.b.x[channel][group][which] *= since",
    "writes tokens after the end": "pair, places.inside(group, which)); => pair, true);",
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


@pytest.fixture(scope="module", params=OPS)
def problem(request):
    return make_problem(request.param)


@functools.cache
def make_problem(op):
    """Returns a call of each op with three spans, and its results in float64."""
    lanes, heads = (2, 2) if op == "wkv" else (2, 1)
    inputs, starts, cotangents = make_inputs(
        4, torch.float32, (lanes, 149, heads, 32), "slow", op
    )  # leaks show far away
    starts = torch.zeros_like(starts)
    starts[0, [1, 2, 6]] = True  # two documents begin in the first span, one in the second
    starts[1, 9] = True
    precise = {name: x.double() for name, x in inputs.items()}
    truth = values_and_gradients(OPS[op][1], precise, starts, [x.double() for x in cotangents])
    names = names_of(inputs)
    tokens = tuple(inputs[name] for name in names[:-1])
    forward, backward = (getattr(torch.ops.infctx, f"{op}_{way}") for way in ("forward", "backward"))
    with emulated(processors=24):
        saved = forward(*tokens, inputs["state"], starts, inputs["initial"], True)[2:]
    return (
        (forward, (*tokens, inputs["state"], starts, inputs["initial"], True), [truth["y"], truth["S_T"]]),
        (
            backward,
            (*tokens, starts, inputs["initial"], *saved, *cotangents, True),
            [truth[f"d{name}"] for name in (*names, "initial")],
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
    assert not how_caught(*forward)
    assert not how_caught(*backward)


def one_of(count, **by_op):
    """Lists all faults by op, and marks all but one in several slow."""
    return [
        pytest.param(op, fault, marks=[pytest.mark.slow] if number % count[op] else [])
        for op, faults in by_op.items()
        for number, fault in enumerate(faults)
    ]


ONE_OF = {"wkv": 6, "wkv7": 20}


@pytest.mark.parametrize("op, fault", one_of(ONE_OF, wkv=FORWARD_FAULTS, wkv7=FORWARD_FAULTS_7))
def test_fault_in_the_forward_is_caught(op, fault, planted):
    faults = FORWARD_FAULTS if op == "wkv" else FORWARD_FAULTS_7
    assert how_caught(*make_problem(op)[0], **planted(faults[fault]))


@pytest.mark.parametrize("op, fault", one_of(ONE_OF, wkv=BACKWARD_FAULTS, wkv7=BACKWARD_FAULTS_7))
def test_fault_in_the_backward_is_caught(op, fault, planted):
    faults = BACKWARD_FAULTS if op == "wkv" else BACKWARD_FAULTS_7
    assert how_caught(*make_problem(op)[1], **planted(faults[fault]))


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
    const OwnPlaces own = own_places(rows, 3, token, place.end_token);
    to[1] = own.at(base + own.first, 1, 1) - base;
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

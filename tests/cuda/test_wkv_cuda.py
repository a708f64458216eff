"""The CUDA WKV op on the emulator, judged in float64: accuracy, shapes, document starts, cuts, strides, torch.compile.

test_wkv_cuda_faults.py shows that faults in the kernels are found.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F

from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.errors import InputError
from infctx.ops.wkv_chunked import wkv_chunked
from infctx.ops.wkv_reference import wkv_reference

from wkv_emulated import DTYPES, FP32_BAR, NAMES, emulated, make_inputs, same_bits, values_and_gradients
from wkv_inputs import relative_rms

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles with g++")

ROUNDED = ("y", "dr", "dk", "dv")  # to bf16, if the inputs are
BF16_BARS = {"y": 2.4e-3, "S_T": 1.4e-3, "dr": 1.7e-3, "dk": 1.7e-3, "dv": 1.7e-3, "dw": 1.8e-3, "du": 1.9e-3}
BF16_BARS |= {"dstate": 2.0e-3, "dinitial": 2.0e-3}  # the best peer's errors with bf16 inputs


def without_initial(inputs):
    return {name: inputs[name] for name in NAMES}


def in_float64(inputs, starts, cotangents, judge=wkv_reference):
    inputs = {name: x.double() for name, x in inputs.items()}
    return values_and_gradients(judge, inputs, starts, [x.double() for x in cotangents])


def assert_accurate(found, truth, dtype):
    """fp32 outputs are as exact as fp32 arithmetic, whatever the inputs; the others are rounded once."""
    assert found.keys() == truth.keys()
    for name in truth:
        assert found[name].shape == truth[name].shape and found[name].isfinite().all(), name
        error = relative_rms(found[name], truth[name])
        if dtype == torch.bfloat16 and name in ROUNDED:
            assert found[name].dtype == torch.bfloat16
            rounding = relative_rms(truth[name].bfloat16(), truth[name])
            assert error <= max(BF16_BARS[name], 1.05 * rounding), f"{name}: {error}, rounding alone {rounding}"
        else:
            assert found[name].dtype == torch.float32
            assert error <= FP32_BAR, f"{name}: {error}"


# ---- accuracy ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", ["ordinary", "extreme", "slow", -20.0])
def test_accuracy_at_every_decay(decay, dtype):
    inputs, starts, cotangents = make_inputs(1, dtype, (2, 256, 2, 64), decay)
    truth = in_float64(inputs, starts, cotangents)
    peer = values_and_gradients(wkv_chunked, inputs, starts, cotangents)
    numbers_of_launches = set()
    for processors in (1, 16):  # one span, and four
        with emulated(processors) as launched:
            found = values_and_gradients(wkv_cuda, inputs, starts, cotangents)
        assert_accurate(found, truth, dtype)
        numbers_of_launches.add(len(launched))
        if dtype == torch.bfloat16:
            for name in truth:
                error, of_peer = relative_rms(found[name], truth[name]), relative_rms(peer[name], truth[name])
                assert error <= BF16_BARS[name], name
                assert error <= (2 if name in ("y", "S_T") else 3) * of_peer, f"{name}: {error}, chunked {of_peer}"
    assert numbers_of_launches == {2, 6}  # one span, and several


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_decay", [0.0, -1e30, -torch.inf])
def test_no_decay_makes_nan(log_decay, dtype):
    inputs, starts, cotangents = make_inputs(2, dtype, (2, 150, 1, 32))
    inputs["w"][:, ::3] = log_decay
    for with_starts in (None, starts):
        truth = in_float64(inputs, with_starts, cotangents)
        for processors in (1, 24):
            with emulated(processors):
                found = values_and_gradients(wkv_cuda, inputs, with_starts, cotangents)
            assert_accurate(found, truth, dtype)


# ---- shapes ----

# fla's test cases: B, T, H, N, and w = logsigmoid(randn) / g.
FLA_CASES = [(1, 15, 2, 60, 1), (3, 60, 3, 64, 0.1), (3, 64, 2, 64, 1), (4, 1000, 4, 64, 10), (4, 2048, 4, 64, 1)]
LARGE_FLA_CASES = [(4, 500, 3, 256, 1), (4, 2048, 4, 256, 1)]  # one and four minutes on the emulator


def assert_accurate_as_fla(case, dtype, device="cpu"):
    *shape, divisor = case
    inputs, starts, cotangents = make_inputs(3, dtype, shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    inputs["w"] = F.logsigmoid(noise) / divisor
    inputs = {name: x.to(device) for name, x in inputs.items()}
    starts, cotangents = starts.to(device), [x.to(device) for x in cotangents]
    truth = in_float64(inputs, starts, cotangents, judge=wkv_chunked)  # exact to 1e-12 in float64
    assert_accurate(values_and_gradients(wkv_cuda, inputs, starts, cotangents), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*FLA_CASES[:3], pytest.param(FLA_CASES[3], marks=pytest.mark.slow)])
def test_cases_of_fla(case, dtype):
    with emulated(processors=40):
        assert_accurate_as_fla(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", [FLA_CASES[4], (1, 16384, 1, 64, 1)])
def test_long_cases_of_fla_and_longer(case):
    with emulated(processors=40) as launched:
        assert_accurate_as_fla(case, torch.bfloat16)
    assert len(launched) == 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_heads_of_fla_with_one_lane_and_head(dtype):
    _, tokens, _, channels, divisor = LARGE_FLA_CASES[0]
    with emulated(processors=40):
        assert_accurate_as_fla((1, tokens, 1, channels, divisor), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FLA_CASES + LARGE_FLA_CASES)
def test_cases_of_fla_on_a_gpu(case, dtype):
    assert_accurate_as_fla(case, dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "channels", [16, 32, 60, 64, 96, *(pytest.param(each, marks=pytest.mark.slow) for each in (48, 80, 128))]
)
def test_head_sizes(channels, dtype):
    heads = 3 if channels <= 64 else 1
    inputs, starts, cotangents = make_inputs(channels, dtype, (2, 77, heads, channels))
    truth = in_float64(inputs, starts, cotangents)
    with emulated(processors=6):
        assert_accurate(values_and_gradients(wkv_cuda, inputs, starts, cotangents), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (2, 16, 3, 32), (3, 17, 1, 32), (3, 77, 5, 32), (1, 193, 7, 16)])
def test_odd_lengths_and_numbers(shape, dtype):
    inputs, starts, cotangents = make_inputs(4, dtype, shape)
    for with_starts in (None, starts):
        truth = in_float64(inputs, with_starts, cotangents)
        for processors in (1, 200):
            with emulated(processors):
                found = values_and_gradients(wkv_cuda, inputs, with_starts, cotangents)
            assert_accurate(found, truth, dtype)


# ---- documents ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [[0], [20], [4, 8, 12, 16], [5, 6, 7, 8], [0, 1, 3, 11, 19, 20], range(21)])
def test_starts_in_every_place(chunks, dtype):
    """Tries 21 chunks, the last of 13 tokens; spans of 64 tokens begin at every fourth."""
    inputs, starts, cotangents = make_inputs(5, dtype, (2, 333, 2, 32), "slow")  # a leak shows far away
    starts = torch.zeros_like(starts)
    starts[1, list(chunks)] = True
    expanded = inputs | {"initial": inputs["initial"][:1]}
    for given in (without_initial(inputs), inputs, expanded):
        truth = in_float64(given, starts, cotangents, judge=_over_lanes(wkv_chunked))  # exact to 1e-12 in float64
        for processors in (1, 100):
            arguments = {}
            with emulated(processors, arguments=arguments) as launched:
                found = values_and_gradients(_over_lanes(wkv_cuda), given, starts, cotangents)
            assert_accurate(found, truth, dtype)
            assert len(launched) == (2 if processors == 1 else 6)
            if given is expanded:
                assert arguments["wkv_forward"][7].shape[0] == 1  # not copied for each lane


def _over_lanes(op):
    def expanding(*inputs):
        *inputs, initial = inputs
        return op(*inputs, None if initial is None else initial.expand(inputs[0].shape[0], -1, -1, -1))

    return expanding


def test_documents_do_not_see_each_other():
    inputs, starts, cotangents = make_inputs(6, torch.float32, (1, 192, 1, 32))
    starts = torch.zeros_like(starts)
    starts[0, 6] = True
    poisoned = inputs | {name: inputs[name].clone() for name in ("k", "v", "r")}
    for name in ("k", "v"):
        poisoned[name][:, :96] *= 1e15
    for processors in (1, 24):
        with emulated(processors):
            plain = values_and_gradients(wkv_cuda, inputs, starts, cotangents)
            other = values_and_gradients(wkv_cuda, poisoned, starts, cotangents)
        assert torch.equal(plain["S_T"], other["S_T"])
        for name in ("y", "dr", "dk", "dv", "dw"):
            assert torch.equal(plain[name][:, 96:], other[name][:, 96:]), name


@pytest.mark.parametrize(
    "cut, with_starts", [(1, False), (17, False), (63, False), (101, False), (48, True), (144, True)]
)
def test_cut_anywhere(cut, with_starts):
    inputs, starts, cotangents = make_inputs(7, torch.float32, (2, 150, 2, 32), "slow")
    starts = starts if with_starts else None

    def in_two(r, k, v, w, u, state, starts, initial):
        y = []
        for piece, chunks in ((slice(0, cut), slice(0, cut // 16)), (slice(cut, None), slice(cut // 16, None))):
            tokens = (x[:, piece] for x in (r, k, v, w))
            part, state = wkv_cuda(*tokens, u, state, None if starts is None else starts[:, chunks], initial)
            y.append(part)
        return torch.cat(y, 1), state

    for processors in (1, 24):
        with emulated(processors):
            whole = values_and_gradients(wkv_cuda, inputs, starts, cotangents)
            parts = values_and_gradients(in_two, inputs, starts, cotangents)
        for name in whole:
            assert relative_rms(parts[name], whole[name]) <= 1e-6, name


# ---- layouts in memory ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_constant_in_time_is_read_where_it_stands(dtype):
    inputs, starts, cotangents = make_inputs(8, dtype, (2, 150, 2, 32))
    inputs["w"] = inputs["w"][:1, :1]

    def with_decay(w_over_time):
        return lambda r, k, v, w, *others: wkv_cuda(r, k, v, w_over_time(w.expand(r.shape)), *others)

    for processors in (1, 24):
        arguments = {}
        with emulated(processors, arguments=arguments):
            found = values_and_gradients(with_decay(lambda w: w), inputs, starts, cotangents)
        places = {"wkv_forward": 3, "wkv_backward": 3}
        places |= {"wkv_sum_spans": 2, "wkv_sum_span_gradients": 2} if processors > 1 else {}
        for kernel, place in places.items():
            w = arguments[kernel][place]
            assert w.stride()[:2] == (0, 0) and w.data_ptr() == inputs["w"].data_ptr(), kernel
        with emulated(processors):
            materialised = values_and_gradients(with_decay(torch.Tensor.contiguous), inputs, starts, cotangents)
        assert same_bits(found, materialised)


def _beside(x):
    """Returns the same numbers in a storage where they begin one element later."""
    return F.pad(x.flatten(), (1, 0))[1:].view(x.shape)


STRIDES = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.mT.contiguous().mT,
    "one element later": _beside,
    "rows of odd length": lambda x: F.pad(x, (0, 1))[..., :-1],
    "every second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", STRIDES)
def test_tensors_may_lie_as_they_like(strides, dtype):
    inputs, starts, cotangents = make_inputs(9, dtype, (2, 77, 2, 32))
    with emulated(processors=24):
        expected = values_and_gradients(wkv_cuda, inputs, starts, cotangents)
        inputs = {name: (_beside if name == "u" else STRIDES[strides])(x) for name, x in inputs.items()}
        cotangents = [STRIDES[strides](x) for x in cotangents]
        starts = starts.mT.contiguous().mT
        assert same_bits(values_and_gradients(wkv_cuda, inputs, starts, cotangents), expected)


def test_cotangents_without_memory():
    inputs, starts, _ = make_inputs(10, torch.float32, (2, 77, 2, 32))
    ones = torch.ones(inputs["r"].shape), torch.ones(inputs["state"].shape)
    with emulated():
        expected = values_and_gradients(wkv_cuda, inputs, starts, ones)
        one = [torch.ones(()).expand(x.shape) for x in ones]
        assert same_bits(values_and_gradients(wkv_cuda, inputs, starts, one), expected)


# ---- gradients that are wanted ----


def test_no_states_are_kept_where_nothing_learns():
    inputs, starts, _ = make_inputs(11, torch.float32, (2, 150, 2, 32))
    call = [*(inputs[name] for name in NAMES), starts, inputs["initial"]]
    learning = [x.requires_grad_() if x.is_floating_point() else x for x in (x.clone() for x in call)]
    results = {}
    for processors in (1, 24):
        for mode, given in ((torch.no_grad, learning), (torch.inference_mode, call), (torch.enable_grad, call)):
            arguments = {}
            with emulated(processors, arguments=arguments) as launched, mode():
                y, state = wkv_cuda(*given)
            assert launched[-1] == "wkv_forward" and arguments["wkv_forward"][10] is None
            assert not y.requires_grad and not state.requires_grad
            results[processors, mode] = {"y": y, "S_T": state}
        with emulated(processors, arguments=arguments):
            y, state = wkv_cuda(*learning)
        assert arguments["wkv_forward"][10].numel() == 2 * 2 * 5 * 32 * 32  # a state for each tile of 32 tokens
        kept = {"y": y.detach(), "S_T": state.detach()}
        assert all(same_bits(results[processors, mode], kept) for mode in (torch.no_grad, torch.inference_mode))


@pytest.mark.parametrize("wanted", [("k",), ("u", "state"), ("r", "v", "w"), ("initial",)])
def test_gradients_that_are_not_asked_for_are_none(wanted):
    inputs, starts, cotangents = make_inputs(12, torch.float32, (2, 77, 2, 32))
    arguments = {}
    with emulated(arguments=arguments):
        expected = values_and_gradients(wkv_cuda, inputs, starts, cotangents)
        leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
        outputs = wkv_cuda(*(leaves[name] for name in NAMES), starts, leaves["initial"])
        found = {}
        inputs_of_op = (*NAMES, "starts", "initial")
        outputs[0].grad_fn.register_hook(lambda given, _: found.update(zip(inputs_of_op, given, strict=True)))
        torch.autograd.backward(outputs, cotangents)
    assert {name for name, x in found.items() if x is not None} == set(wanted)
    assert all(torch.equal(found[name], expected[f"d{name}"]) for name in wanted)
    assert (arguments["wkv_backward"][16] is not None) == ("initial" in wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", ["y", "S_T"])
def test_one_output_alone_has_a_gradient(output, dtype):
    inputs, starts, cotangents = make_inputs(13, dtype, (2, 150, 2, 32))
    starts[:, 6:] = False  # else only the end would have a gradient from the final state
    starts[0, 5] = True
    which = ["y", "S_T"].index(output)
    silent = [x if which == i else torch.zeros_like(x) for i, x in enumerate(cotangents)]
    truth = in_float64(inputs, starts, silent)
    for processors in (1, 24):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        with emulated(processors):
            results = wkv_cuda(*(leaves[name] for name in NAMES), starts, leaves["initial"])
            results[which].backward(cotangents[which])
        found = {f"d{name}": x.grad for name, x in leaves.items()}
        assert_accurate(found, {name: truth[name] for name in found}, dtype)
    if output == "S_T":
        assert truth["dw"][0, -1].any() and not truth["du"].any()


def test_bonus_in_bf16():
    inputs, starts, cotangents = make_inputs(14, torch.bfloat16, (2, 77, 2, 32))
    rounded = inputs["u"].bfloat16()
    with emulated():
        expected = values_and_gradients(wkv_cuda, inputs | {"u": rounded.float()}, starts, cotangents)
        found = values_and_gradients(wkv_cuda, inputs | {"u": rounded}, starts, cotangents)
    assert found["du"].dtype == torch.bfloat16
    assert same_bits(found, expected | {"du": expected["du"].bfloat16()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_refused(dtype):
    inputs, starts, _ = make_inputs(15, dtype, (1, 16, 1, 16))
    with pytest.raises(InputError, match=f"backend 'cuda' takes bf16 and fp32, not {dtype}"):
        wkv_cuda(*(inputs[name] for name in NAMES), starts)


# ---- torch.compile ----


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_as_one_graph_gives_the_same_bits(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(wkv_cuda, fullgraph=True, backend="aot_eager")
    with emulated(processors=24):
        for tokens in (77, 150, 193):  # the second makes T dynamic, or compiles again
            inputs, starts, cotangents = make_inputs(tokens, dtype, (2, tokens, 2, 32))
            for given, documents in ((inputs, starts), (without_initial(inputs), None)):
                expected = values_and_gradients(wkv_cuda, given, documents, cotangents)
                assert same_bits(values_and_gradients(compiled, given, documents, cotangents), expected)


@pytest.mark.parametrize("channels, dtype", [(32, torch.float32), (60, torch.bfloat16)])
@pytest.mark.parametrize("with_starts", [False, True])
def test_ops_keep_the_rules_of_torch(with_starts, channels, dtype):
    inputs, starts, cotangents = make_inputs(16, dtype, (2, 77, 2, channels))
    tokens, state = [inputs[name] for name in NAMES[:5]], inputs["state"].mT
    cotangents = [cotangents[0], cotangents[1].mT]
    tokens[3] = tokens[3][:1, :1].expand(tokens[0].shape)
    documents = (starts, inputs["initial"]) if with_starts else (None, None)
    with emulated(processors=24):
        for keep in (False, True):
            call = (*tokens, state, *documents, keep)
            torch.library.opcheck(torch.ops.infctx.wkv_forward.default, call)
        kept = torch.ops.infctx.wkv_forward(*call)[2]
        for learns in (False, True):
            call = (*tokens, *documents, kept, *cotangents, learns)
            torch.library.opcheck(torch.ops.infctx.wkv_backward.default, call)

"""The CUDA op of RWKV-7 on the emulator, judged in float64: accuracy, shapes, document starts, cuts, torch.compile.

test_wkv_cuda_faults.py shows that faults in the kernels are found.
"""

import shutil

import pytest
import torch

from infctx import wkv7
from infctx.cuda.wkv7_cuda import wkv7_cuda
from infctx.errors import InputError
from infctx.ops.wkv_chunked import wkv7_chunked
from infctx.ops.wkv_reference import wkv7_reference

from wkv_emulated import NAMES_7, emulated, make_inputs, same_bits, values_and_gradients
from wkv_inputs import relative_rms

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles with g++")

FP32, BF16 = torch.float32, torch.bfloat16
FP32_BAR = 2e-6  # relative RMS of fp32 arithmetic; ours is 4e-7
ROUNDED = ("y", "dr", "dk", "dv", "da", "db")  # to bf16, if the inputs are
# Two kernels of each direction are built for the quick tests, 5 seconds each where the cache has none of them.
SIZES = [(32, FP32), (64, BF16)]
ALL_SIZES = [
    *SIZES,
    *(
        pytest.param(size, dtype, marks=pytest.mark.slow)
        for size, dtype in ((16, FP32), (16, BF16), (32, BF16), (64, FP32))
    ),
]


def make(seed, dtype, shape, decay="ordinary"):
    return make_inputs(seed, dtype, shape, decay, op="wkv7")


def without_initial(inputs):
    return {name: inputs[name] for name in NAMES_7}


def in_float64(inputs, starts, cotangents, judge=wkv7_reference):
    inputs = {name: x.double() for name, x in inputs.items()}
    return values_and_gradients(judge, inputs, starts, [x.double() for x in cotangents])


def assert_accurate(found, truth, dtype, bar=FP32_BAR):
    """fp32 outputs are as exact as fp32 arithmetic, whatever the inputs; the others are rounded once."""
    assert found.keys() == truth.keys()
    for name in truth:
        assert found[name].shape == truth[name].shape and found[name].isfinite().all(), name
        error = relative_rms(found[name], truth[name])
        rounded = dtype == BF16 and name in ROUNDED
        assert found[name].dtype == (BF16 if rounded else FP32)
        allowed = 1.15 * relative_rms(truth[name].bfloat16(), truth[name]) + 1e-4 if rounded else bar
        assert error <= allowed, f"{name}: {error}, allowed {allowed}"


# ---- accuracy ----


@pytest.mark.parametrize("channels, dtype", ALL_SIZES)
@pytest.mark.parametrize("decay", ["ordinary", "extreme", "slow", -20.0])
def test_accuracy_at_every_decay(decay, channels, dtype):
    inputs, starts, cotangents = make(2 if decay == "slow" else 1, dtype, (1, 150, 2, channels), decay)
    truth = in_float64(inputs, starts, cotangents)
    plain = values_and_gradients(wkv7_chunked, inputs, starts, cotangents)
    for processors in (1, 16):  # one span, and several
        with emulated(processors) as launched:
            found = values_and_gradients(wkv7_cuda, inputs, starts, cotangents)
        assert len(launched) == (2 if processors == 1 else 6)
        assert_accurate(found, truth, dtype)
        for name in ROUNDED if dtype == BF16 else ():
            error, of_plain = relative_rms(found[name], truth[name]), relative_rms(plain[name], truth[name])
            assert error <= (2 if name == "y" else 3) * of_plain, f"{name}: {error}, chunked {of_plain}"


@pytest.mark.parametrize("channels, dtype", SIZES)
@pytest.mark.parametrize("log_decay", [0.0, -1e30, -torch.inf])
def test_no_decay_makes_nan(log_decay, channels, dtype):
    inputs, starts, cotangents = make(2, dtype, (1, 70, 1, channels))
    inputs["w"][:, ::3] = log_decay
    for given, begins in ((without_initial(inputs), None), (inputs, starts)):
        truth = in_float64(given, begins, cotangents)
        for processors in (1, 24):
            with emulated(processors):
                found = values_and_gradients(wkv7_cuda, given, begins, cotangents)
            assert_accurate(found, truth, dtype)


@pytest.mark.parametrize("channels, dtype", SIZES)
@pytest.mark.parametrize("removes", ["nothing", "a hundred-millionth", "one key again and again", "half of it"])
def test_what_is_removed(removes, channels, dtype):
    """The same key again and again removes what the token before it wrote: powers of the scores would grow to
    thousands and cancel out, where a solution token by token stays exact."""
    inputs, starts, cotangents = make(4, dtype, (1, 100, 1, channels), "slow")
    size = {"nothing": 0.0, "a hundred-millionth": 1e-8}.get(removes, 1.0)
    rate = 0.5 if removes == "half of it" else 1.0
    direction = torch.nn.functional.normalize(torch.randn(channels, generator=torch.Generator().manual_seed(1)), dim=0)
    inputs["a"] = (-size * direction).expand(inputs["a"].shape).to(dtype).contiguous()
    inputs["b"] = (rate * direction).expand(inputs["a"].shape).to(dtype).contiguous()
    truth = in_float64(inputs, starts, cotangents)
    for processors in (1, 16):
        with emulated(processors):
            found = values_and_gradients(wkv7_cuda, inputs, starts, cotangents)
        if removes == "nothing":  # then b learns nothing
            assert not found["db"].any() and not truth["db"].any()
            found, all_truth = ({name: x for name, x in each.items() if name != "db"} for each in (found, truth))
            assert_accurate(found, all_truth, dtype, bar=1e-5)
        else:
            assert_accurate(found, truth, dtype, bar=1e-5)


# ---- shapes and documents ----


@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (3, 16, 1, 24), (2, 17, 3, 32), (1, 65, 2, 20), (1, 131, 1, 32)])
def test_odd_shapes(shape):
    inputs, starts, cotangents = make(shape[1], FP32, shape)
    truth = in_float64(inputs, starts, cotangents)
    with emulated(processors=60):
        assert_accurate(values_and_gradients(wkv7_cuda, inputs, starts, cotangents), truth, FP32)


@pytest.mark.parametrize("chunks", [[0], [13], [4, 8, 12], [1, 2, 3, 7, 13], range(14)])
def test_starts_in_every_place(chunks):
    """Tries 14 chunks, the last of 5 tokens; spans of 64 tokens begin at every fourth."""
    inputs, starts, cotangents = make(5, FP32, (2, 213, 1, 32), "slow")  # a leak shows far away
    starts = torch.zeros_like(starts)
    starts[1, list(chunks)] = True
    expanded = inputs | {"initial": inputs["initial"][:1]}
    for given in (without_initial(inputs), inputs, expanded):
        truth = in_float64(given, starts, cotangents, judge=_over_lanes(wkv7_chunked))  # exact to 1e-12 in float64
        arguments = {}
        with emulated(8 if given is expanded else 2, arguments=arguments):
            found = values_and_gradients(_over_lanes(wkv7_cuda), given, starts, cotangents)
        assert_accurate(found, truth, FP32)
        if given is expanded:
            assert arguments["wkv7_forward"][8].shape[0] == 1  # not copied for each lane


def _over_lanes(op):
    def expanding(*inputs):
        *inputs, initial = inputs
        return op(*inputs, None if initial is None else initial.expand(inputs[0].shape[0], -1, -1, -1))

    return expanding


@pytest.mark.parametrize("cut, with_starts", [(1, False), (63, False), (101, False), (48, True), (144, True)])
def test_cut_anywhere(cut, with_starts):
    inputs, starts, cotangents = make(7, FP32, (1, 150, 2, 32), "slow")
    starts = starts if with_starts else None

    def in_two(*given):
        *tokens, state, starts, initial = given
        y = []
        for piece, chunks in ((slice(0, cut), slice(0, cut // 16)), (slice(cut, None), slice(cut // 16, None))):
            begins = None if starts is None else starts[:, chunks]
            part, state = wkv7_cuda(*(x[:, piece] for x in tokens), state, begins, initial)
            y.append(part)
        return torch.cat(y, 1), state

    for processors in (1, 24):
        with emulated(processors):
            whole = values_and_gradients(wkv7_cuda, inputs, starts, cotangents)
            parts = values_and_gradients(in_two, inputs, starts, cotangents)
        for name in whole:
            assert relative_rms(parts[name], whole[name]) <= 1e-6, name


# ---- gradients that are wanted ----


def test_nothing_is_kept_where_nothing_learns():
    inputs, starts, _ = make(11, FP32, (2, 150, 2, 32))
    call = [*(inputs[name] for name in NAMES_7), starts, inputs["initial"]]
    learning = [x.clone().requires_grad_() if x.is_floating_point() else x for x in call]
    for processors in (1, 24):
        arguments = {}
        with emulated(processors, arguments=arguments), torch.no_grad():
            y, state = wkv7_cuda(*learning)
        assert arguments["wkv7_forward"][11] is None and arguments["wkv7_forward"][12] is None
        with emulated(processors, arguments=arguments):
            again = wkv7_cuda(*learning)
        assert arguments["wkv7_forward"][11].numel() == 2 * 2 * 5 * 32 * 32  # a state for each tile of 32 tokens
        assert arguments["wkv7_forward"][12].shape == inputs["r"].shape
        assert torch.equal(y, again[0]) and torch.equal(state, again[1])


@pytest.mark.parametrize("wanted", [("k",), ("a", "state"), ("initial",)])
def test_gradients_that_are_not_asked_for_are_none(wanted):
    inputs, starts, cotangents = make(12, FP32, (2, 77, 2, 32))
    arguments = {}
    with emulated(arguments=arguments):
        expected = values_and_gradients(wkv7_cuda, inputs, starts, cotangents)
        leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
        outputs = wkv7_cuda(*(leaves[name] for name in NAMES_7), starts, leaves["initial"])
        torch.autograd.backward(outputs, cotangents)
    assert {name for name, x in leaves.items() if x.grad is not None} == set(wanted)
    assert all(torch.equal(leaves[name].grad, expected[f"d{name}"]) for name in wanted)
    assert (arguments["wkv7_backward"][19] is not None) == ("initial" in wanted)


def test_decays_expanded_over_time_and_other_strides():
    inputs, starts, cotangents = make(9, FP32, (2, 77, 2, 32))
    inputs["w"] = inputs["w"][:1, :1].expand(inputs["r"].shape)
    with emulated(processors=24):
        expected = values_and_gradients(wkv7_cuda, inputs | {"w": inputs["w"].contiguous()}, starts, cotangents)
        by_head = {
            name: x if name == "w" else x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()
        }
        assert same_bits(values_and_gradients(wkv7_cuda, by_head, starts, cotangents), expected)


# ---- the public op, and torch.compile ----


def test_the_public_op_takes_the_backend():
    inputs, starts, cotangents = make(3, BF16, (1, 77, 1, 64))
    with emulated(processors=24) as launched:
        found = values_and_gradients(lambda *given: wkv7(*given, backend="cuda"), inputs, starts, cotangents)
        expected = values_and_gradients(wkv7_cuda, inputs, starts, cotangents)
    assert same_bits(found, expected) and len(launched) == 12
    with pytest.raises(InputError, match="backend 'cuda' runs on cuda, not on cpu; choose auto or chunked"):
        wkv7(*(inputs[name] for name in NAMES_7), backend="cuda")


def test_what_the_kernels_cannot_do_is_one_line():
    for dtype, channels, message in (
        (torch.float64, 16, "wkv7: backend 'cuda' takes bf16 and fp32, not torch.float64; choose chunked"),
        (FP32, 80, "wkv7: backend 'cuda' takes heads of at most 64 channels, not 80; choose chunked"),
    ):
        inputs, starts, _ = make(15, dtype, (1, 16, 1, channels))
        with pytest.raises(InputError, match=message):
            wkv7_cuda(*(inputs[name] for name in NAMES_7), starts)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does it
def test_compiled_as_one_graph_gives_the_same_bits():
    torch._dynamo.reset()
    compiled = torch.compile(wkv7_cuda, fullgraph=True, backend="aot_eager")
    with emulated(processors=24):
        for tokens in (77, 150):  # the second makes T dynamic, or compiles again
            inputs, starts, cotangents = make(tokens, FP32, (2, tokens, 2, 32))
            expected = values_and_gradients(wkv7_cuda, inputs, starts, cotangents)
            assert same_bits(values_and_gradients(compiled, inputs, starts, cotangents), expected)


@pytest.mark.parametrize("with_starts", [False, True])
def test_ops_keep_the_rules_of_torch(with_starts):
    inputs, starts, cotangents = make(16, FP32, (2, 77, 2, 20))
    tokens, state = [inputs[name] for name in NAMES_7[:6]], inputs["state"].mT
    documents = (starts, inputs["initial"]) if with_starts else (None, None)
    with emulated(processors=24):
        for keep in (False, True):
            call = (*tokens, state, *documents, keep)
            torch.library.opcheck(torch.ops.infctx.wkv7_forward.default, call)
        saved = torch.ops.infctx.wkv7_forward(*call)[2:]
        call = (*tokens, *documents, *saved, cotangents[0], cotangents[1].mT, with_starts)
        torch.library.opcheck(torch.ops.infctx.wkv7_backward.default, call)

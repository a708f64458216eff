"""The WKV ops: every backend against the definition, in float64, over random shapes, decays and document starts."""

import itertools
import shutil

import pytest
import torch

import infctx
from infctx.cuda.compile import KernelsUnavailable
from infctx.cuda.driver import DriverError
from infctx.errors import InputError
from infctx.ops import wkv as wkv_module
from infctx.ops.wkv import BACKENDS, BACKENDS_7, choose_backend, pick_backend

from wkv_emulated import emulated
from wkv_inputs import random_inputs, relative_rms

CPU_BACKENDS = [
    (op, name)
    for op, backends in (("wkv", BACKENDS), ("wkv7", BACKENDS_7))
    for name in backends
    if name != "cuda"  # covered by test_wkv_cuda.py
]
FAST_BACKENDS = [(op, name) for op, name in CPU_BACKENDS if name != "reference"]
every_backend = pytest.mark.parametrize(("op", "backend"), CPU_BACKENDS)
every_fast_backend = pytest.mark.parametrize(("op", "backend"), FAST_BACKENDS)


def run_op(inputs, starts=None, backend="auto"):
    return (infctx.wkv7 if "a" in inputs else infctx.wkv)(**inputs, starts=starts, backend=backend)


def without(name, inputs):
    return {other: x for other, x in inputs.items() if other != name}


def outputs_and_gradients(backend, inputs, starts, cotangents):
    """Returns y, S_T and the gradients of all inputs under both outputs' cotangents."""
    leaves = {name: (x[:1, :1] if name == "w" and x.stride(1) == 0 else x) for name, x in inputs.items()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    full = {name: x.expand(inputs[name].shape) for name, x in leaves.items()}
    y, state = run_op(full, starts, backend)
    (torch.sum(y * cotangents[0]) + torch.sum(state * cotangents[1])).backward()
    gradients = {f"d{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return {"y": y.detach(), "S_T": state.detach()} | gradients


def worst(found, truth):
    return max((relative_rms(found[name], truth[name]), name) for name in truth if truth[name].any())


@every_fast_backend
@pytest.mark.parametrize("decay", ["ordinary", "extreme", "mixed", "constant"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_definition_in_float64(op, backend, decay, seed):
    inputs, starts, cotangents = random_inputs(seed, decay, op=op)
    truth = outputs_and_gradients("reference", inputs, starts, cotangents)
    found = outputs_and_gradients(backend, inputs, starts, cotangents)
    for name in truth:
        scale = truth[name].abs().max().clamp_min(1e-300)
        assert ((found[name] - truth[name]).abs().max() / scale).item() <= 1e-11, name


@every_fast_backend
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 63, 64, 65, 129])
def test_every_length_without_starts_and_without_initial(op, backend, num_tokens):
    inputs, _, cotangents = random_inputs(num_tokens, "mixed", shape=(2, num_tokens, 2, 16), op=op)
    inputs = without("initial", inputs)
    truth = outputs_and_gradients("reference", inputs, None, cotangents)
    assert worst(outputs_and_gradients(backend, inputs, None, cotangents), truth)[0] <= 1e-12


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles with g++")
@pytest.mark.parametrize("channels", [16, 60, 80])
@pytest.mark.parametrize("shape", [(0, 33, 2), (2, 33, 0)])
def test_no_lanes_or_no_heads_give_empty_results(shape, channels):
    with emulated(processors=100):
        for op, backend in [*FAST_BACKENDS, ("wkv", "cuda")]:
            inputs, starts, cotangents = random_inputs(1, dtype=torch.float32, shape=(*shape, channels), op=op)
            truth = outputs_and_gradients("reference", inputs, starts, cotangents)
            found = outputs_and_gradients(backend, inputs, starts, cotangents)
            assert all(torch.equal(found[name], truth[name]) for name in truth), (op, backend)


@every_fast_backend
def test_starts_without_initial_mean_zeros(op, backend):
    inputs, starts, cotangents = random_inputs(3, "ordinary", shape=(3, 150, 2, 16), op=op)
    truth = outputs_and_gradients("reference", inputs | {"initial": inputs["initial"] * 0}, starts, cotangents)
    found = outputs_and_gradients(backend, without("initial", inputs), starts, cotangents)
    assert worst(found, {n: truth[n] for n in found})[0] <= 1e-12


@every_fast_backend
@pytest.mark.parametrize(("decay", "bar"), [("ordinary", 1e-5), ("constant", 1e-5), ("extreme", 1e-3), ("mixed", 1e-3)])
@pytest.mark.parametrize("seed", range(3))
def test_float32_keeps_its_precision(op, backend, decay, bar, seed):
    inputs, starts, cotangents = random_inputs(seed, decay, torch.float32, shape=(2, 190, 2, 64), op=op)
    precise = {name: x.double() for name, x in inputs.items()}
    if decay == "constant":
        precise["w"] = precise["w"][:1, :1].expand(inputs["w"].shape)
    truth = outputs_and_gradients("reference", precise, starts, [x.double() for x in cotangents])
    error, name = worst(outputs_and_gradients(backend, inputs, starts, cotangents), truth)
    assert error <= bar, name


@every_backend
@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -60.0, -1e4])
def test_no_decay_makes_nan(op, backend, log_decay):
    inputs, starts, cotangents = random_inputs(0, dtype=torch.float32, shape=(1, 100, 1, 16), op=op)
    inputs["w"] = torch.full_like(inputs["w"], log_decay)
    inputs["w"][:, 50:] = -1e-4
    found = outputs_and_gradients(backend, inputs, starts, cotangents)
    assert all(torch.isfinite(x).all() for x in found.values())


@every_backend
def test_cut_anywhere(op, backend):
    inputs, _, _ = random_inputs(5, "ordinary", shape=(2, 90, 2, 16), op=op)
    inputs = without("initial", inputs)
    whole, last = run_op(inputs, backend=backend)
    for cut in (1, 16, 33, 64, 89):
        parts, state = [], inputs["state"]
        for piece in (slice(0, cut), slice(cut, None)):
            tokens = {name: x[:, piece] for name, x in inputs.items() if name not in ("u", "state")}
            y, state = run_op(inputs | tokens | {"state": state}, backend=backend)
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
        assert torch.allclose(state, last, rtol=0, atol=1e-12)


@every_fast_backend
def test_bfloat16_in_and_out(op, backend):
    inputs, starts, _ = random_inputs(1, dtype=torch.float32, shape=(2, 77, 3, 32), op=op)
    for name in inputs.keys() - {"w", "state", "initial"}:
        inputs[name] = inputs[name].bfloat16()
    y, state = run_op(inputs, starts, backend)
    truth_y, truth_state = run_op({name: x.double() for name, x in inputs.items()}, starts, "reference")
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_rms(y, truth_y) < 3e-3  # one rounding of y to bf16 is 1.7e-3
    assert relative_rms(state, truth_state) < 1e-5


@every_backend
def test_documents_do_not_see_each_other(op, backend):
    inputs, _, _ = random_inputs(2, shape=(1, 64, 1, 16), op=op)
    starts = torch.tensor([[False, False, True, False]])
    poisoned = inputs | {name: inputs[name].clone() for name in ("k", "v")}
    poisoned["k"][:, :32] *= 1e100
    y, state = run_op(inputs, starts, backend)
    other_y, other_state = run_op(poisoned, starts, backend)
    assert torch.equal(y[:, 32:], other_y[:, 32:])
    assert torch.equal(state, other_state)


@every_backend
def test_gradcheck(op, backend):
    inputs, starts, _ = random_inputs(4, shape=(1, 19, 1, 3), op=op)

    def run(*leaves):
        return run_op(dict(zip(inputs, leaves, strict=True)), starts, backend)

    assert torch.autograd.gradcheck(
        run, [x.requires_grad_() for x in inputs.values()], atol=1e-6, fast_mode=op == "wkv7"
    )


@every_backend
def test_inputs_stay_as_they_are(op, backend):
    inputs, starts, cotangents = random_inputs(6, shape=(2, 70, 2, 16), op=op)
    before = {name: x.clone() for name, x in inputs.items()}
    outputs_and_gradients(backend, inputs, starts, cotangents)
    assert all(torch.equal(before[name], inputs[name]) for name in inputs)


def test_inputs_that_do_not_fit_are_named():
    inputs, starts, _ = random_inputs(0, shape=(2, 20, 2, 16))
    for name, bad, match in [
        ("k", inputs["k"][:, :19], "k must be"),
        ("u", inputs["u"][:1], "u must be"),
        ("state", inputs["state"].float(), "state must be torch.float64"),
        ("r", inputs["r"][0], "r must be"),
    ]:
        with pytest.raises(InputError, match=match):
            infctx.wkv(**(inputs | {name: bad}), starts=starts)
    with pytest.raises(InputError, match="starts must be"):
        infctx.wkv(**inputs, starts=starts[:, :1])
    with pytest.raises(InputError, match="^wkv: there is no backend 'cuda12'"):
        infctx.wkv(**inputs, backend="cuda12")
    inputs, starts, _ = random_inputs(0, shape=(2, 20, 2, 16), op="wkv7")
    with pytest.raises(InputError, match="^wkv7: b must be"):
        infctx.wkv7(**(inputs | {"b": inputs["b"][..., :3]}), starts=starts)
    with pytest.raises(InputError, match="^wkv7: a is torch.float32 and r is torch.float64"):
        infctx.wkv7(**(inputs | {"a": inputs["a"].float()}), starts=starts)


def test_the_choice_is_logged_once(caplog):
    pick_backend.cache_clear()
    with caplog.at_level("INFO", logger="infctx"):
        for _, device in itertools.product(range(3), ["cpu"]):
            assert pick_backend("auto", device) == "compiled"
    assert [record.message for record in caplog.records] == ["wkv backend on cpu: compiled"]


def test_the_cuda_kernels_are_for_gpus():
    inputs, _, _ = random_inputs(0, dtype=torch.float32, shape=(1, 20, 1, 16))
    with pytest.raises(InputError, match="^wkv: backend 'cuda' runs on cuda, not on cpu; choose auto or chunked$"):
        infctx.wkv(**inputs, backend="cuda")
    assert pick_backend("cuda", "cuda") == "cuda"


@pytest.fixture
def compilations(monkeypatch):
    """Records what the kernels are compiled for, instead of a GPU; with a reason in `refuse` they are unavailable."""
    for function in (pick_backend, wkv_module._cuda_or_chunked, wkv_module._chunked_because):
        function.cache_clear()

    class Compilations(list):
        refuse = wrong = None

        def compile(self, *what):
            self.append(what)
            if self.refuse:
                raise self.refuse

    asked = Compilations()
    monkeypatch.setattr(wkv_module, "compile_kernels", asked.compile)
    monkeypatch.setattr(wkv_module, "compile_kernels7", asked.compile)
    monkeypatch.setattr(wkv_module, "find_disagreement", lambda *what: asked.wrong)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    yield asked
    for function in (pick_backend, wkv_module._cuda_or_chunked, wkv_module._chunked_because):
        function.cache_clear()


@pytest.mark.parametrize("op", ["wkv", "wkv7"])
def test_a_gpu_runs_the_kernels(op, compilations, caplog):
    with caplog.at_level("INFO", logger="infctx"):
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            assert choose_backend("auto", "cuda", 0, dtype, 64, op) == "cuda"
    assert compilations == [(0, torch.bfloat16, 64), (0, torch.float32, 64)]
    assert [record.message for record in caplog.records] == [f"{op} backend on cuda: cuda"]


@pytest.mark.parametrize("op", ["wkv", "wkv7"])
def test_without_kernels_a_gpu_runs_plain_torch_and_says_so_once(op, compilations, caplog):
    compilations.refuse = KernelsUnavailable("no NVRTC here; install one")
    with caplog.at_level("WARNING", logger="infctx"):
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            assert choose_backend("auto", "cuda", 0, dtype, 64, op) == "chunked"
    said = [record.message for record in caplog.records]
    assert said == [f"{op} runs in plain torch, many times slower: no NVRTC here; install one"]


def test_an_error_of_the_driver_is_a_reason_like_any_other(compilations, caplog):
    compilations.refuse = DriverError("cuLaunchKernel (wkv_forward): CUDA_ERROR_INVALID_VALUE (1): invalid", "INVALID")
    with caplog.at_level("WARNING", logger="infctx"):
        for dtype in (torch.bfloat16, torch.float32):
            assert choose_backend("auto", "cuda", 0, dtype, 64) == "chunked"
    said = [record.message for record in caplog.records]
    assert said == [
        "wkv runs in plain torch, many times slower: cuLaunchKernel (wkv_forward): CUDA_ERROR_INVALID_VALUE (1): "
        "invalid; update the GPU's driver, or report this with what tools/gpu/gpu_check.py says"
    ]


def test_kernels_that_are_wrong_are_not_used(compilations, caplog):
    compilations.wrong = "the gradient of w differs by 3.0e-01 of its size, and 1e-04 is allowed"
    with caplog.at_level("WARNING", logger="infctx"):
        assert choose_backend("auto", "cuda", 1, torch.bfloat16, 64) == "chunked"
    said = [record.message for record in caplog.records]
    assert said == [
        "wkv runs in plain torch, many times slower: on GPU 1 the CUDA kernels are wrong for 64 channels in "
        "torch.bfloat16: the gradient of w differs by 3.0e-01 of its size, and 1e-04 is allowed; please report this "
        "with what tools/gpu/gpu_check.py says"
    ]
    assert choose_backend("cuda", "cuda", 1, torch.bfloat16, 64) == "cuda"  # an explicit choice gets them


def test_what_the_kernels_do_not_take_runs_in_plain_torch(compilations):
    assert choose_backend("auto", "cuda", 0, torch.float64, 64) == "chunked"
    assert choose_backend("chunked", "cuda", 0, torch.bfloat16, 64) == "chunked"
    assert not compilations


def test_a_forced_backend_does_not_fall_back(compilations):
    assert choose_backend("cuda", "cuda", 0, torch.float64, 64) == "cuda"  # and refuses fp64 by name
    inputs, _, _ = random_inputs(0, shape=(1, 20, 1, 16))
    with pytest.raises(
        InputError, match="^wkv: backend 'cuda' takes bf16 and fp32, not torch.float64; choose chunked$"
    ):
        BACKENDS["cuda"](*without("initial", inputs).values())

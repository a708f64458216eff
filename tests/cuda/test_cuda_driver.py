"""Launches against a stand-in for the driver's library, which records its calls; and on a GPU, if there is one."""

import ctypes
import dataclasses
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infctx.cuda import driver as driver_module
from infctx.cuda.compile import Compiled, KernelsUnavailable
from infctx.cuda.driver import Driver, DriverError, Kernel, launch, load_kernels
from infctx.errors import InputError

# The device of CPU tensors is -1, so the stand-in's kernels are on that device.
DEVICE = -1
STREAM = 0x51
# The stand-in's context and handles.
CONTEXT = 0xC000 + DEVICE
STAND_IN = Path(__file__).with_name("cuda_driver_stand_in.cpp")
LOG = "".join(f"Compiling entry function '{name}' for 'sm_90'\nUsed 8 registers\n" for name in ("add", "empty"))
COMPILED = Compiled("add.cu", "sm_90", "NVRTC 13.0", LOG, b"machine code\0\1\2")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Paths of the stand-ins: for a new driver, one without cuKernelGetParamInfo, one without cuLibrary*."""
    if shutil.which("g++") is None:
        pytest.skip("the stand-in for the driver is compiled by g++")
    folder = tmp_path_factory.mktemp("driver")
    for name, options in (("new", []), ("12.0", ["-DBEFORE_12_4"]), ("11", ["-DBEFORE_12_4", "-DBEFORE_12_0"])):
        command = ["g++", "-shared", "-fPIC", "-Wall", "-o", folder / f"{name}.so", STAND_IN, *options]
        subprocess.run(command, check=True)
    return folder


class StandIn:
    """A driver and its calls."""

    def __init__(self, path):
        self.driver = Driver(str(path))
        self.calls()
        self.driver.call("cuCtxSetCurrent", None)

    def calls(self):
        out = ctypes.create_string_buffer(1_000_000)
        self.driver.library.take_calls(out, len(out))
        lines = out.value.decode().splitlines()
        return [line for line in lines if not line.startswith("cuDeviceGet(")]

    def plant(self, function, result):
        self.driver.library.plant(function.encode(), result)

    def load(self):
        kernels = self.driver.load(COMPILED, DEVICE)
        self.calls()
        return kernels


@pytest.fixture
def stand_in(libraries, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + DEVICE - device)
    )
    stand_in = StandIn(libraries / "new.so")
    yield stand_in
    stand_in.plant("", 0)


def expected_launch(values, shared_bytes=0, context=CONTEXT):
    return f"cuLaunchKernel(f20, 5 4 3, 128 2 1, {shared_bytes}, {STREAM:x}, {values}, 0 in {context:x})"


def test_loading_prepares_all_that_a_launch_needs(stand_in):
    kernels = stand_in.driver.load(COMPILED, DEVICE)
    for_each = [
        "cuLibraryGetKernel(a, {1})",
        f"cuKernelGetFunction({{0}}, in {CONTEXT:x})",
        "cuKernelGetAttribute(8, {0}, 99)",
    ]
    assert stand_in.calls() == [
        "cuCtxSetCurrent(0)",
        "cuDevicePrimaryCtxRetain(99)",
        f"cuCtxSetCurrent({CONTEXT:x})",
        "cuLibraryLoadData(machine , 0, 0)",
        *(call.format("20", "add") for call in for_each),
        *(call.format("21", "empty") for call in for_each),
        "cuCtxSetCurrent(0)",
    ]
    assert list(kernels) == ["add", "empty"] and kernels.compiled is COMPILED
    add = kernels["add"]
    assert isinstance(add, Kernel) and add.parameter_bytes == (8, 8, 8, 4) and kernels["empty"].parameter_bytes == ()
    assert add.dynamic_shared_bytes == 48 * 1024 - 256


def test_arguments_are_packed_as_the_kernel_reads_them(stand_in):
    add = stand_in.load()["add"]
    x = torch.zeros(7, dtype=torch.bfloat16)
    for argument in (0, None, -1, 2**62 + 1, -(2**63), True):
        launch(add, (5, 4, 3), (128, 2, 1), 0, [x, x[3:], argument, -0.1])
        values = f" {x.data_ptr()} {x.data_ptr() + 6} {int(argument or 0)} -0.100000001"
        assert stand_in.calls()[1] == expected_launch(values[1:])
    stand_in.load().launch("empty", (6, 5), 32)
    assert stand_in.calls()[1] == f"cuLaunchKernel(f21, 6 5 1, 32 1 1, 0, {STREAM:x},, 0 in {CONTEXT:x})"


def test_arguments_that_do_not_fit_are_refused(stand_in, libraries):
    add, x = stand_in.load()["add"], torch.zeros(3)

    def attempt(arguments, kernel=add, grid=(1, 1, 1), block=(1, 1, 1), shared_bytes=0):
        launch(kernel, grid, block, shared_bytes, arguments)

    with pytest.raises(ValueError, match=re.escape("add: arguments of [8, 8, 8] bytes for parameters of [8, 8, 8, 4]")):
        attempt([x, x, 1])
    with pytest.raises(ValueError, match=r"arguments of \[8, 8, 8, 8\]"):
        attempt([x, x, 1, 1])
    with pytest.raises(TypeError, match="add: argument 2 is neither a tensor nor a number: '1'"):
        attempt([x, x, "1", 1.0])
    with pytest.raises(ValueError, match="add: argument 0 is on cpu, the kernel on cuda:0"):
        attempt([x, x, 1, 1.0], dataclasses.replace(add, device=0))
    for grid, block, shared_bytes in (
        ((2**32 + 1, 1, 1), (1, 1, 1), 0),
        ((1, -1, 1), (1, 1, 1), 0),
        ((1, 1, 1), (1, 1, 2**31), 0),
        ((1, 1, 1), (1, 1, 1), -1),
    ):
        with pytest.raises(ValueError, match="out of range"):
            attempt([x, x, 1, 1.0], add, grid, block, shared_bytes)
    assert stand_in.calls() == []
    # an older driver does not report the parameters; arguments still work
    old = Driver(str(libraries / "12.0.so")).load(COMPILED, DEVICE)["add"]
    assert old.parameter_bytes is None
    attempt([x, x, 1, 1.0], old)


def test_the_context_is_set_only_where_it_is_another(stand_in):
    add, x = stand_in.load()["add"], torch.zeros(1)

    def attempt():
        launch(add, (5, 4, 3), (128, 2, 1), 0, [x, x, 1, 0.5])
        return stand_in.calls()

    here = expected_launch(f"{x.data_ptr()} {x.data_ptr()} 1 0.5")
    for other in (None, 0xC001):  # a thread that has not used the GPU yet; another device's context
        stand_in.driver.call("cuCtxSetCurrent", other)
        stand_in.calls()
        assert attempt() == [f"cuCtxSetCurrent({CONTEXT:x})", here, f"cuCtxSetCurrent({other or 0:x})"]
        assert stand_in.driver.current_context() == other
    stand_in.driver.call("cuCtxSetCurrent", CONTEXT)
    stand_in.calls()
    assert attempt() == [here] and attempt() == [here]


def test_threads_do_not_share_their_arguments(stand_in):
    add, x = stand_in.load()["add"], torch.zeros(1)
    problems = []

    def work(number):
        try:
            for step in range(200):
                launch(add, (5, 4, 3), (128, 2, 1), 0, [x, x, 1000 * number + step, float(number)])
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    pairs = [(number, 1000 * number + step) for number in range(4) for step in range(200)]
    expected = {expected_launch(f"{x.data_ptr()} {x.data_ptr()} {count} {number}") for number, count in pairs}
    launches = [call for call in stand_in.calls() if call.startswith("cuLaunchKernel")]
    assert len(launches) == 800 and set(launches) == expected


def test_shared_memory_is_requested_once_and_only_upward(stand_in):
    """For the kernel and for its function: the stand-in's does not take over the limit."""
    add, x, asked = stand_in.load()["add"], torch.zeros(1), []
    for shared_bytes in (48 * 1024 - 256, 48 * 1024, 99 * 1024, 64 * 1024, 99 * 1024):
        launch(add, (5, 4, 3), (128, 2, 1), shared_bytes, [x, x, 1, 0.5])
        calls = stand_in.calls()
        asked += [call for call in calls if "SetAttribute" in call]
        assert expected_launch(f"{x.data_ptr()} {x.data_ptr()} 1 0.5", shared_bytes) in calls
    limit = "cuKernelSetAttribute(8, {0}, 20, 99)", f"cuFuncSetAttribute(f20, 8, {{0}} in {CONTEXT:x})"
    requests = *limit, "cuKernelSetAttribute(9, 100, 20, 99)", f"cuFuncSetAttribute(f20, 9, 100 in {CONTEXT:x})"
    assert asked == [request.format(size) for size in (48 * 1024, 99 * 1024) for request in requests]
    for number, function in enumerate(("cuKernelSetAttribute", "cuFuncSetAttribute")):
        stand_in.plant(function, 1)
        for _ in range(2):  # no launch, and the next one tries again
            with pytest.raises(DriverError, match=rf"{function} \(add, 300000 bytes of dynamic shared memory\): "):
                launch(add, (5, 4, 3), (128, 2, 1), 300_000, [x, x, 1, 0.5])
            assert stand_in.calls()[1:-1] == [request.format(300_000) for request in requests[: number + 1]]
            assert stand_in.driver.current_context() is None
    assert add.dynamic_shared_bytes == 99 * 1024


def test_errors_are_one_line_with_name_and_description(stand_in):
    add, x = stand_in.load()["add"], torch.zeros(1)
    stand_in.plant("cuLaunchKernel", 700)
    with pytest.raises(DriverError) as caught:
        launch(add, (5, 4, 3), (128, 2, 1), 64, [x, x, 1, 0.5])
    assert str(caught.value) == (
        "cuLaunchKernel (add, grid (5, 4, 3), block (128, 2, 1), 64 bytes of dynamic shared memory): "
        "CUDA_ERROR_PLANTED (700): this was planted"
    )
    assert caught.value.name == "CUDA_ERROR_PLANTED" and not isinstance(caught.value, InputError)
    assert stand_in.driver.current_context() is None  # restored anyway
    stand_in.plant("cuLaunchKernel", 999)
    with pytest.raises(DriverError, match=r"CUresult \(999\): unknown to this driver"):
        launch(add, (5, 4, 3), (128, 2, 1), 64, [x, x, 1, 0.5])
    stand_in.plant("cuKernelGetFunction", 2)
    with pytest.raises(DriverError, match=r"^cuKernelGetFunction \(add\): CUDA_ERROR_PLANTED \(2\)"):
        stand_in.load()
    assert stand_in.driver.current_context() is None


def test_code_that_the_driver_cannot_load(stand_in):
    stand_in.plant("cuLibraryLoadData", 209)
    with pytest.raises(KernelsUnavailable) as caught:
        stand_in.load()
    assert str(caught.value) == (
        "cuLibraryLoadData (add.cu): CUDA_ERROR_PLANTED (209): this was planted; the driver is of CUDA 12.4, and the "
        "code was made for sm_90 by NVRTC 13.0; update the driver, or install an NVRTC that is no newer"
    )


def test_drivers_that_are_missing_or_too_old(libraries):
    with pytest.raises(KernelsUnavailable, match="^CUDA kernels need NVIDIA's driver, .*no_such_library.*; install"):
        Driver("no_such_library.so.1")
    with pytest.raises(KernelsUnavailable, match="need a driver of CUDA 12.0 .* has no cuLibraryLoadData$"):
        Driver(str(libraries / "11.so"))


@pytest.fixture
def pretended_gpu(stand_in, tmp_path, monkeypatch):
    """torch reports a GPU; the driver is the stand-in; the cache belongs to the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device < 2 else (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(driver_module, "load_driver", lambda: stand_in.driver)
    yield stand_in
    driver_module._load.cache_clear()


def write_sources(folder):
    (folder / "add.cuh").write_text("__device__ inline float plus(float x, float y) { return x + SCALE * y; }\n")
    (folder / "add.cu").write_text("""
#include "add.cuh"
extern "C" __global__ void add(const float* x, float* y, long long size, float scale) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < size) y[i] = plus(y[i], scale * x[i]);
}
// Turns x around, through shared memory; one block.
extern "C" __global__ void turn(const float* x, float* y, long long size) {
  extern __shared__ float room[];
  for (int i = threadIdx.x; i < size; i += blockDim.x) room[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) y[i] = room[size - 1 - i];
}
""")
    return folder


def test_kernels_are_loaded_once_a_device_and_options(pretended_gpu, tmp_path):
    folder = write_sources(tmp_path)
    kernels = load_kernels("add.cu", torch.device("cuda", 0), ["-DSCALE=1"], folder)
    assert set(kernels) == {"add", "turn"} and kernels["add"].device == 0 and kernels.compiled.arch == "sm_90"
    assert load_kernels("add.cu", 0, ("-DSCALE=1",), folder) is kernels
    assert load_kernels("add.cu", 0, ("-DSCALE=2",), folder) is not kernels
    elsewhere = load_kernels("add.cu", torch.device("cuda"), ("-DSCALE=1",), folder)
    assert elsewhere["add"].device == 1 and elsewhere["add"].context != kernels["add"].context
    assert len(list((tmp_path / "cache" / "infctx").iterdir())) == 2  # the two devices share the machine code


def test_devices_without_the_instructions(pretended_gpu, tmp_path):
    with pytest.raises(KernelsUnavailable, match="compute capability 8.0 or newer .*; Tesla T4 has 7.5$"):
        load_kernels("add.cu", 2, (), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", [0, torch.device("cuda")])
def test_without_a_gpu_one_line_says_so(device):
    with pytest.raises(
        KernelsUnavailable, match=r"^CUDA kernels need an NVIDIA GPU, .*; torch \S+ finds no such device"
    ):
        load_kernels("add.cu", device)


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    """Kernels of the sources above on the current GPU, compiled for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_sources(tmp_path)
    return lambda device=0: load_kernels("add.cu", device, ("-DSCALE=2",), tmp_path)


def add_on_gpu(kernels, x, y, scale=0.5):
    """Replaces y with y + 2 * scale * x: with the default, y + x."""
    kernels.launch("add", -(-x.numel() // 96), 96, 0, [x, y, x.numel(), scale])


def turn_on_gpu(kernels, x):
    y = torch.full_like(x, torch.nan)
    kernels.launch("turn", 1, 256, 4 * x.numel(), [x, y, x.numel()])
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 96, 1000, 1_000_003])
def test_a_launch(on_gpu, size):
    x, y = torch.randn(2, size, device="cuda")
    expected = x + y
    add_on_gpu(on_gpu(), x, y)
    torch.testing.assert_close(y, expected)
    assert on_gpu()["add"].parameter_bytes in ((8, 8, 8, 4), None)


@pytest.mark.gpu
def test_a_launch_goes_to_the_current_stream(on_gpu):
    kernels, stream = on_gpu(), torch.cuda.Stream()
    x, y = torch.zeros(2, 1000, device="cuda")
    a = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(50):
            a = a @ a
        x.fill_(3)  # late, so that a launch on any other stream reads zeros
        add_on_gpu(kernels, x, y)
    stream.synchronize()
    assert (y == 3).all()


@pytest.mark.gpu
def test_launches_are_captured_in_a_graph(on_gpu):
    kernels, graph = on_gpu(), torch.cuda.CUDAGraph()
    x, y = torch.zeros(2, 20_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        add_on_gpu(kernels, x, y)
        turned = turn_on_gpu(kernels, x)  # 80 KB, requested while capturing
    assert (y == 0).all()
    for step in range(1, 4):
        x.copy_(torch.arange(20_000, device="cuda") + step)
        graph.replay()
        assert torch.equal(turned, x.flip(0))
    torch.testing.assert_close(y, 3 * torch.arange(20_000, device="cuda") + 6.0)


@pytest.mark.gpu
def test_shared_memory_above_48_kb(on_gpu):
    kernels = on_gpu()
    for size in (12_288, 15_000, 25_000, 13_000, 100):
        x = torch.randn(size, device="cuda")
        assert torch.equal(turn_on_gpu(kernels, x), x.flip(0))
    with pytest.raises(DriverError, match=r"cuKernelSetAttribute \(turn, 4000000 bytes .*CUDA_ERROR_INVALID_VALUE"):
        turn_on_gpu(kernels, torch.zeros(1_000_000, device="cuda"))


@pytest.mark.gpu
def test_launches_from_other_threads(on_gpu):
    kernels = on_gpu()
    x, y = torch.ones(2, 1000, device="cuda")
    thread = threading.Thread(target=add_on_gpu, args=(kernels, x, y))
    thread.start()
    thread.join()
    assert (y == 2).all()

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + x

        @staticmethod
        def backward(ctx, gradient):
            add_on_gpu(kernels, gradient, result)  # its thread's first work on the GPU
            return result

    result = torch.ones(1000, device="cuda")
    leaf = torch.zeros(1000, device="cuda", requires_grad=True)
    Doubled.apply(leaf).backward(torch.ones(1000, device="cuda"))
    assert (leaf.grad == 2).all()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_launch_on_a_device_that_is_not_the_current_one(on_gpu):
    x, y = torch.ones(2, 1000, device="cuda:1")
    add_on_gpu(on_gpu(1), x, y)
    assert (y == 2).all() and torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="argument 0 is on cuda:1, the kernel on cuda:0"):
        add_on_gpu(on_gpu(0), x, y)

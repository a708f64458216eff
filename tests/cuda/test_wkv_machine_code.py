"""The machine code of the WKV kernels, made without a GPU for each architecture: nothing spills, every launch fits on
the smallest device, and tensor cores, ldmatrix and asynchronous copies do the work."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

from infctx.cuda import compile as compiler
from infctx.cuda import wkv7_cuda, wkv_cuda
from infctx.cuda.compile import Compiled, Resources, compile_source, cubin
from infctx.cuda.wkv_layout import compiler_options, cut

from places import ROOT

FOLDER = Path(wkv_cuda.__file__).parent
KERNELS = {
    "wkv_forward.cu": {"wkv_sum_spans", "wkv_join_spans", "wkv_forward"},
    "wkv_backward.cu": {"wkv_sum_span_gradients", "wkv_join_span_gradients", "wkv_backward"},
    "wkv7_forward.cu": {"wkv7_sum_spans", "wkv7_join_spans", "wkv7_forward"},
    "wkv7_backward.cu": {"wkv7_sum_span_gradients", "wkv7_join_span_gradients", "wkv7_backward"},
}
# They add up or multiply matrices, a few elements a thread, without tensor cores.
JOINS = {name for names in KERNELS.values() for name in names if "_join_" in name}

# Per multiprocessor and per block, on every architecture from sm_80 up.
BLOCK_REGISTERS = 65_536
THREAD_REGISTERS = 255
# Limit of a block on sm_86, sm_89 and sm_120, the smallest of all; sm_80, sm_90 and sm_100 have more.
BLOCK_SHARED_BYTES = 99 * 1024

# Instructions that no kernel should have, by their names in machine code.
UNWANTED = {
    "memory of the thread's own, which is that of spills": r"(LDL|STL)\b",
    # but not a byte, a document's start flag: that pointer may be null, and then its memory is unknown
    "memory of a kind that the compiler did not find out": r"LD\b(?!\.E\.U8)|ST\b",
    "an order of additions that changes from run to run": r"(ATOM|RED\b|REDG|REDAS)",
    "fp64, which has a 64th of the speed": r"D(ADD|MUL|FMA|MMA|SETP|MNMX)\b|.*\.F64|.*64H",
}
# Functions that the compiler may call: code outside the loop for shuffles where it cannot see that all lanes of a warp
# meet; and 64-bit division, once per thread.
SHUFFLES = {"__cuda_sm70_shflsync_bfly"}
DIVISIONS = {"__cuda_sm20_div_s64", "__cuda_sm20_div_u64"}


@dataclass(frozen=True)
class Build:
    """One compilation, with the caller's number of channels."""

    arch: str
    source: str
    channels: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.arch}-{Path(self.source).stem}-{self.channels}-{str(self.dtype).removeprefix('torch.')}"


def builds(archs: Sequence[str], sizes: Sequence[int]) -> list[Build]:
    return [
        Build(arch, source, size, dtype)
        for arch in archs
        for source in KERNELS
        for size in sizes
        for dtype in wkv_cuda.DTYPES
    ]


MAIN_BUILDS = builds(("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"), (64,))
OTHER_BUILDS = builds(("sm_80", "sm_90", "sm_120"), (16, 32))


def quick_first(builds: Sequence[Build]) -> list[ParameterSet]:
    """Marks the builds of RWKV-7 slow, 5 to 10 seconds each, except those of one architecture."""
    kept = [build for build in MAIN_BUILDS if (build.arch, build.dtype) == ("sm_80", torch.bfloat16)]
    slow = [build.source.startswith("wkv7") and build not in kept for build in builds]
    return [
        pytest.param(build, id=str(build), marks=[pytest.mark.slow] if is_slow else [])
        for build, is_slow in zip(builds, slow, strict=True)
    ]


@dataclass(frozen=True)
class Launch:
    threads: int
    shared_bytes: int


@dataclass
class Recorder:
    """Records launches of one source's kernels, and runs nothing."""

    options: tuple[str, ...] = ()
    launches: dict[str, Launch] = field(default_factory=dict)

    def launch(self, name, grid, block, shared_bytes=0, arguments=()):
        self.launches[name] = Launch(block, shared_bytes)


@functools.cache
def launches_of(channels: int, dtype: torch.dtype) -> dict[str, Recorder]:
    """Returns both directions' launches over several spans, and each source's options."""
    recorders = {source: Recorder() for source in KERNELS}

    def load(source, options):
        recorders[source].options = options
        return recorders[source]

    machine = wkv_cuda.Machine(load, lambda shape, dtype, direction: cut(shape, dtype, spans=4))
    r, k, v, dy = torch.zeros(4, 1, 256, 1, channels, dtype=dtype)
    w = torch.zeros(1, 256, 1, channels)
    u, state = torch.zeros(1, channels), torch.zeros(1, 1, channels, channels)
    starts = torch.zeros(1, 16, dtype=torch.bool)
    _, _, kept = wkv_cuda.forward(machine, r, k, v, w, u, state, starts, state, True)
    wkv_cuda.backward(machine, r, k, v, w, u, starts, state, kept, dy, state, True)
    tokens = (r, w, k, v, dy, dy)
    _, _, *saved = wkv7_cuda.forward7(machine, *tokens, state, starts, state, True)
    wkv7_cuda.backward7(machine, *tokens, starts, state, *saved, dy, state, True)
    return recorders


@functools.cache
def compiled(build: Build) -> Compiled:
    recorder = launches_of(build.channels, build.dtype)[build.source]
    return cubin((FOLDER / build.source).read_text(), build.source, build.arch, recorder.options, headers())


def headers() -> dict[str, str]:
    return {path.name: path.read_text() for path in FOLDER.glob("*.cuh")}


def resource_problems(used: Resources, launch: Launch) -> list[str]:
    """Returns reasons why a kernel cannot be launched this way, or not at full speed."""
    problems = [
        f"{count} bytes of {what}"
        for what, count in [
            ("stack", used.stack_bytes),
            ("spill stores", used.spill_store_bytes),
            ("spill loads", used.spill_load_bytes),
        ]
        if count
    ]
    # A warp's registers are given out 256 at a time, so 8 for each lane.
    registers = -(-used.registers // 8) * 8 * launch.threads
    if registers > BLOCK_REGISTERS or used.registers > THREAD_REGISTERS:
        problems.append(f"{used.registers} registers for each of {launch.threads} threads")
    shared_bytes = used.static_shared_bytes + launch.shared_bytes
    if shared_bytes > BLOCK_SHARED_BYTES:
        problems.append(f"{shared_bytes} bytes of shared memory")
    return problems


def find_disassembler() -> Path:
    if sys.platform != "linux":
        pytest.skip("nvidia-cuda-nvdisasm, the disassembler, is installed on Linux only")
    (program,) = (file for file in metadata.files("nvidia-cuda-nvdisasm") if file.name == "nvdisasm")
    return Path(program.locate())


def disassemble(code: bytes) -> dict[str, list[tuple[str, str]]]:
    """Returns each kernel's instructions: name, such as LDG.E.128, and operands."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [find_disassembler(), "--print-code", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
    return {name: line.findall(body) for name, body in zip(sections[1::2], sections[2::2], strict=True)}


def code_problems(instructions: Sequence[tuple[str, str]], wanted: set[str], may_call: set[str]) -> list[str]:
    """Returns instructions that should not be there, and missing ones that should."""
    found = {name.split(".")[0] for name, _ in instructions}
    problems = [f"no {name}" for name in sorted(wanted - found)]
    for reason, pattern in UNWANTED.items():
        names = sorted({name for name, _ in instructions if re.match(pattern, name)})
        problems += [f"{name}: {reason}" for name in names]
    # A call of a label is a jump.
    calls = {operands for name, operands in instructions if name.startswith("CALL") and "`(.L_x_" not in operands}
    called = {re.sub(r"^`\((\$__internal_\d+_\$)?(.*)\)$", r"\2", operands) for operands in calls}
    return problems + [f"calls {name}" for name in sorted(called - may_call)]


@pytest.mark.parametrize("build", quick_first(MAIN_BUILDS + OTHER_BUILDS))
def test_nothing_spills_and_every_launch_fits(build):
    launches = launches_of(build.channels, build.dtype)[build.source].launches
    resources = compiled(build).resources
    assert set(resources) == set(launches) == KERNELS[build.source]
    for name, used in resources.items():
        print(f"{name}: {used.registers} registers, {launches[name].threads} threads, {launches[name].shared_bytes} B")
        assert resource_problems(used, launches[name]) == [], name


@pytest.mark.parametrize("build", quick_first(MAIN_BUILDS))
def test_the_right_instructions_do_the_work(build):
    kernels = disassemble(compiled(build).cubin)
    assert set(kernels) == KERNELS[build.source]
    for name, instructions in kernels.items():
        wanted = set() if name in JOINS else {"HMMA", "LDGSTS"}  # tensor cores, asynchronous copies
        if wanted and build.dtype == torch.bfloat16:
            wanted.add("LDSM")  # ldmatrix, for elements of two bytes
        assert len(instructions) > 100
        assert code_problems(instructions, wanted, DIVISIONS if name in JOINS else SHUFFLES) == [], name


def test_the_launches_here_are_the_real_ones():
    options = {
        (channels, dtype): launches_of(channels, dtype) for channels in (16, 32, 64) for dtype in wkv_cuda.DTYPES
    }
    for (channels, dtype), recorders in options.items():
        expected = compiler_options(channels, dtype)
        assert {recorder.options for recorder in recorders.values()} == {expected}
    assert len({recorders["wkv_forward.cu"].options for recorders in options.values()}) == len(options)


# One bad kernel for each check above.
WRONG = """
extern "C" __global__ void spills(float* x, const int* which) {
  float kept[500];
  for (int i = 0; i < 500; ++i) kept[i] = x[which[i]];
  for (int i = 0; i < 500; ++i) x[i] = kept[which[i] % 500];
}
extern "C" __global__ void takes_registers(const float* x, float* y) {
  float kept[150];
#pragma unroll
  for (int i = 0; i < 150; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 150; ++i) y[i * 1024 + threadIdx.x] = kept[149 - i];
}
extern "C" __global__ void confuses(float* x, int where) {
  __shared__ float kept[32];
  kept[threadIdx.x] = 1.0f;
  *(where > 0 ? x + where : kept - where) = 2.0f;
  x[threadIdx.x] = kept[threadIdx.x];
}
extern "C" __global__ void computes_in_fp64(double* x) { x[0] = x[1] * x[2] + x[3]; }
extern "C" __global__ void adds_in_any_order(float* x) { atomicAdd(x, x[threadIdx.x]); }
__device__ __noinline__ float called(float x, int n) { for (int i = 0; i < n; ++i) x = x * x + 1.0f; return x; }
extern "C" __global__ void calls(float* x, int n) { x[0] = called(x[1], n) + called(x[2], n - 1); }
extern "C" __global__ void divides(long long* x) { x[0] = x[1] / x[2]; }
extern "C" __global__ void is_right(float* x) { x[threadIdx.x] += 1.0f; }
"""
FOUND = {
    "takes_registers": [],
    "confuses": ["memory of a kind"],
    "computes_in_fp64": ["fp64"],
    "adds_in_any_order": ["an order of additions"],
    "calls": ["calls $calls$"],
    "divides": ["calls __cuda_sm20_div_s64"],
    "is_right": [],
}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_what_is_wrong_is_found(arch):
    wrong = compile_source(WRONG, "wrong.cu", arch)
    launch = Launch(threads=512, shared_bytes=BLOCK_SHARED_BYTES)
    spills = resource_problems(wrong.resources["spills"], launch)
    assert spills and spills[0].endswith(" bytes of stack")
    (registers,) = resource_problems(wrong.resources["takes_registers"], launch)
    assert registers.endswith(" registers for each of 512 threads")
    assert resource_problems(wrong.resources["confuses"], launch) == [
        f"{BLOCK_SHARED_BYTES + 128} bytes of shared memory"
    ]
    assert resource_problems(wrong.resources["is_right"], launch) == []

    kernels = disassemble(wrong.cubin)
    problems = code_problems(kernels.pop("spills"), {"HMMA"}, set())
    assert problems[0] == "no HMMA" and {problem[:3] for problem in problems[1:]} == {"LDL", "STL"}
    assert set(kernels) == set(FOUND)
    for name, instructions in kernels.items():
        problems = code_problems(
            instructions, {"LDG", "STG"} - ({"STG"} if name == "adds_in_any_order" else set()), SHUFFLES
        )
        assert bool(problems) == bool(FOUND[name]), (name, problems)
        for expected in FOUND[name]:
            assert any(expected in problem for problem in problems), (name, problems)


def test_spills_without_enough_registers_are_found():
    options = launches_of(64, torch.bfloat16)["wkv_backward.cu"].options
    source = (FOLDER / "wkv_backward.cu").read_text()
    for_two_blocks = source.replace("__launch_bounds__(backward_threads)", "__launch_bounds__(backward_threads, 2)")
    squeezed = compile_source(for_two_blocks, "wkv_backward.cu", "sm_80", options, headers())
    problems = resource_problems(squeezed.resources["wkv_backward"], Launch(256, 0))
    assert any("spill stores" in problem for problem in problems)


@pytest.mark.parametrize("source", ["wkv_forward.cu", "wkv7_forward.cu"])
def test_the_second_time_nothing_is_compiled(source, tmp_path, monkeypatch):
    arguments = ((FOLDER / source).read_text(), source, "sm_90", ("-DHEAD_SIZE=16",), headers(), tmp_path)
    first = cubin(*arguments)
    monkeypatch.setattr(compiler, "compile_source", None)
    monkeypatch.setattr(compiler, "_load_nvrtc", None)
    assert cubin(*arguments) == first


def test_all_sources_are_packaged_and_stand_on_their_own():
    (listed,) = re.findall(r'^"infctx\.cuda" = (\[.*\])$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    others = [path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"]
    unpackaged = [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in json.loads(listed))]
    assert unpackaged == []
    assert {path.name for path in FOLDER.glob("*.cu")} == set(KERNELS)
    for path in sorted(FOLDER.glob("*.cu*")):
        included = re.findall(r"^\s*#\s*include\s*(.*?)\s*$", path.read_text(), re.MULTILINE)
        assert {name.strip('"') for name in included} <= set(headers()), path.name
        exported = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\))?\s*(\w+)\(', path.read_text())
        assert set(exported) == KERNELS.get(path.name, set()), path.name

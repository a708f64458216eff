"""CUDA sources compile for every architecture without a toolkit; the cache survives damage, races and bad folders."""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import pytest

from infctx.cuda import compile as compiler
from infctx.cuda.compile import CompileError, KernelsUnavailable, compile_source, cubin, parse_resources
from infctx.errors import InputError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HEADERS = {"shift.cuh": "#pragma once\n__device__ inline float shifted(float x) { return x + OFFSET; }\n"}
SOURCE = """
#include "shift.cuh"
extern "C" __global__ void shift(float* x) {
  __shared__ float turned[96];
  turned[95 - threadIdx.x] = shifted(x[threadIdx.x]);
  __syncthreads();
  x[threadIdx.x] = turned[threadIdx.x];
}
extern "C" __global__ void keep(const float* x, float* y) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = kept[63 - i];
}
"""
OPTIONS = ("-DOFFSET=1.0f",)
# Another process: the cache's folder is an argument, results are printed.
PROGRAM = f"""
import logging, sys, time
from pathlib import Path
from infctx.cuda.compile import cubin
logging.basicConfig(level=logging.INFO)
started = time.perf_counter()
compiled = cubin({SOURCE!r}, "shift.cu", "sm_90", {OPTIONS!r}, {HEADERS!r}, Path(sys.argv[1]))
milliseconds = 1000 * (time.perf_counter() - started)
print(milliseconds, "cuda.pathfinder" in sys.modules, "libnvrtc" in Path("/proc/self/maps").read_text())
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Compiles the source above through this test's cache; `build.compilations` counts the misses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    compiler._warn_once.cache_clear()

    def counted(*arguments):
        run.compilations += 1
        return compile_source(*arguments)

    def run(folder=tmp_path / "cache", source=SOURCE, options=OPTIONS, headers=HEADERS, arch="sm_90"):
        return cubin(source, "shift.cu", arch, options, headers, folder)

    run.compilations = 0
    monkeypatch.setattr(compiler, "compile_source", counted)
    return run


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(arch):
    started = time.perf_counter()
    compiled = compile_source(SOURCE, "shift.cu", arch, OPTIONS, HEADERS)
    print(f"{arch}: {time.perf_counter() - started:.2f} s, {len(compiled.cubin)} bytes")
    assert compiled.cubin.startswith(b"\x7fELF") and b".target" not in compiled.cubin  # machine code, and no PTX
    assert set(compiled.resources) == {"shift", "keep"}
    shift, keep = compiled.resources["shift"], compiled.resources["keep"]
    assert shift.static_shared_bytes == 96 * 4 and keep.static_shared_bytes == 0
    assert keep.registers > 64 > shift.registers > 0
    assert all(used.stack_bytes == used.spill_store_bytes == used.spill_load_bytes == 0 for used in (shift, keep))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_spills_are_reported(arch):
    compiled = compile_source(SOURCE, "shift.cu", arch, (*OPTIONS, "--maxrregcount=32"), HEADERS)
    shift, keep = compiled.resources["shift"], compiled.resources["keep"]
    assert keep.registers == 32
    assert min(keep.stack_bytes, keep.spill_store_bytes, keep.spill_load_bytes) >= 100
    assert shift.spill_store_bytes == shift.spill_load_bytes == 0


def test_a_called_function_counts_as_its_kernels():
    log = """
    ptxas info    : Compiling entry function 'first' for 'sm_80'
    ptxas info    : Function properties for first
        16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
    ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]
    ptxas info    : Function properties for helper
        32 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
    ptxas info    : Compiling entry function 'second' for 'sm_80'
    ptxas info    : Function properties for second
        0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
    ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
    """
    assert parse_resources(log) == {
        "first": compiler.Resources(40, 48, 16, 28, 256),
        "second": compiler.Resources(8, 0, 0, 0, 0),
    }


def test_the_cache_hits(build):
    first = build()
    started = time.perf_counter()
    again = build()
    print(f"a cache hit: {1000 * (time.perf_counter() - started):.2f} ms")
    assert again == first and again.resources == first.resources and build.compilations == 1


def test_everything_that_makes_the_kernels_is_in_the_key(build, monkeypatch):
    build()
    changes = [
        {"source": SOURCE + "\n"},
        {"options": ("-DOFFSET=2.0f",)},
        {"headers": {**HEADERS, "shift.cuh": HEADERS["shift.cuh"] + "\n"}},
        {"headers": {**HEADERS, "other.cuh": ""}},
        {"arch": "sm_80"},
    ]
    for expected, change in enumerate(changes, start=2):
        build(**change)
        build(**change)
        assert build.compilations == expected, change
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version(name) + ".1" if "nvrtc" in name else version(name))
    build()
    assert build.compilations == len(changes) + 2


def test_a_compiler_from_elsewhere_counts_while_its_library_is_unchanged(build, tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    library = tmp_path / "libnvrtc.so.13"
    library.write_bytes(b"one")
    status = library.stat()
    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(compiler, "_library_mark", lambda: [str(library), status.st_size, status.st_mtime_ns])
    build()
    build()
    assert build.compilations == 1
    os.utime(library, ns=(0, status.st_mtime_ns + 1))
    build()
    assert build.compilations == 2
    library.unlink()
    build()
    assert build.compilations == 3
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    build()
    assert build.compilations == 4


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-9] + b"x" + b[-8:], lambda b: b""])
def test_damaged_files_are_built_again(build, tmp_path, caplog, damage):
    first = build()
    (file,) = (tmp_path / "cache").iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    again = build()
    assert again.cubin == first.cubin and build.compilations == 2
    warnings = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings == [f"{file} is damaged; its kernels are compiled again"]
    content = file.read_bytes()
    assert content[:64] == hashlib.sha256(content[65:]).hexdigest().encode()
    build()
    assert build.compilations == 2


def test_a_folder_that_cannot_be_written_falls_back_and_says_so_once(build, tmp_path, caplog):
    (tmp_path / "file").touch()
    folder, fallback = tmp_path / "file" / "cache", tmp_path / "temporary" / f"infctx-{os.getuid()}"
    for options in (OPTIONS, OPTIONS, ("-DOFFSET=2.0f",), ("-DOFFSET=2.0f",)):
        build(folder, options=options)
    assert build.compilations == 2 and len(list(fallback.iterdir())) == 2
    (warning,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning == f"compiled kernels are kept in {fallback}, because {folder} cannot be used: Not a directory"
    assert fallback.stat().st_mode & 0o077 == 0


def test_a_temporary_folder_that_others_can_write_is_not_trusted(build, tmp_path, caplog):
    (tmp_path / "file").touch()
    fallback = tmp_path / "temporary" / f"infctx-{os.getuid()}"
    fallback.mkdir()
    fallback.chmod(0o777)
    assert build(tmp_path / "file").cubin == build(tmp_path / "file").cubin
    assert build.compilations == 2 and not list(fallback.iterdir())
    (warning,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith(f"compiled kernels cannot be kept in {tmp_path / 'file'}")


def test_where_the_users_cache_is(build, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build(None)
    assert len(list((tmp_path / "xdg" / "infctx").iterdir())) == 1
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert compiler._user_folder() == tmp_path / "home" / ".cache" / "infctx"


def test_processes_that_build_the_same_at_once_then_a_hit_without_nvrtc(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        said, problems = process.communicate(timeout=300)
        assert process.returncode == 0 and "damaged" not in problems, problems
        assert said.split()[1:] in (["True", "True"], ["False", "False"])
    assert len(list(tmp_path.iterdir())) == 1  # and no temporary file is left
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    milliseconds, searched, loaded = done.stdout.split()
    print(f"a cache hit, the first in its process: {float(milliseconds):.1f} ms")
    assert (searched, loaded) == ("False", "False") and not done.stderr


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (("x + OFFSET", "x + OFFSETS"), OPTIONS, 'shift.cuh(2): error: identifier "OFFSETS" is undefined'),
        (("shift.cuh", "none.cuh"), OPTIONS, 'shift.cu(2): catastrophic error: cannot open source file "none.cuh"'),
        (("float turned[96]", "float turned[99999]"), OPTIONS, "ptxas error   : Entry function 'shift' uses too much"),
        (("", ""), (*OPTIONS, "--nonsense"), "nvrtc: error: unrecognized option --nonsense found"),
    ],
)
def test_an_error_is_one_line(change, options, reason):
    headers = {"shift.cuh": HEADERS["shift.cuh"].replace(*change)}
    with pytest.raises(CompileError) as caught:
        compile_source(SOURCE.replace(*change), "shift.cu", "sm_90", options, headers)
    message = str(caught.value)
    beginning, _, rest = message.partition(": ")
    assert beginning.startswith("shift.cu does not compile for sm_90 with NVRTC ") and rest.startswith(reason)
    assert "\n" not in message and reason in caught.value.log
    assert isinstance(caught.value, KernelsUnavailable) and isinstance(caught.value, InputError)


def test_what_reports_no_kernels_is_refused_and_not_kept(build, tmp_path, monkeypatch):
    """NVRTC's cache does this: it keeps machine code without its log.  We also turn it off."""
    fetch = compiler._fetch
    monkeypatch.setattr(compiler, "_fetch", lambda nvrtc, what, program: fetch(nvrtc, what, program)[: what == "CUBIN"])
    with pytest.raises(CompileError, match=r"^shift.cu: NVRTC .* reports no kernels in it$"):
        build()
    assert not list(tmp_path.rglob("shift-*"))


def test_the_cache_of_nvrtc_is_off(build, monkeypatch):
    nvrtc, words = compiler._load_nvrtc(), []

    class Listening:
        def __getattr__(self, name):
            return getattr(nvrtc, name)

        def nvrtcCompileProgram(self, program, count, options):
            words.append([option.decode() for option in options])
            return nvrtc.nvrtcCompileProgram(program, count, options)

    monkeypatch.setattr(compiler, "_load_nvrtc", Listening)
    compile_source(SOURCE, "shift.cu", "sm_90", OPTIONS, HEADERS)
    monkeypatch.setattr(compiler, "_version", lambda nvrtc: (12, 8))  # an older NVRTC does not know the option
    compile_source(SOURCE, "shift.cu", "sm_90", OPTIONS, HEADERS)
    assert ["--no-cache" in each for each in words] == [True, False]


def test_an_architecture_that_nvrtc_does_not_know():
    with pytest.raises(
        KernelsUnavailable, match=r"^NVRTC .* cannot compile for sm_999, only for sm_\d+ to sm_\d+; .*pip"
    ):
        compile_source(SOURCE, "shift.cu", "sm_999", OPTIONS, HEADERS)


def test_without_nvrtc_one_line_says_what_to_install(build, monkeypatch):
    from cuda import pathfinder

    def missing(name):
        raise pathfinder.DynamicLibNotFoundError(f"no {name} in\n a, b or c")

    build()
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", missing)
    compiler._load_nvrtc.cache_clear()
    try:
        build()  # a hit in the cache needs no compiler
        with pytest.raises(KernelsUnavailable) as caught:
            build(arch="sm_80")
    finally:
        compiler._load_nvrtc.cache_clear()
    assert "\n" not in str(caught.value) and str(caught.value).endswith("or: pip install nvidia-cuda-nvrtc")


def test_importing_loads_no_compiler_and_no_driver():
    program = """
import sys
import infctx, infctx.cuda, infctx.cuda.compile
assert "torch" not in sys.modules
maps = open("/proc/self/maps").read()
assert "libnvrtc" not in maps and "libcuda" not in maps
import infctx.cuda.driver, infctx.ops.wkv, torch
assert "cuda.pathfinder" not in sys.modules and not torch.cuda.is_initialized()
for load in (infctx.cuda.compile._load_nvrtc, infctx.cuda.driver.load_driver):
    assert load.cache_info().misses == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True)

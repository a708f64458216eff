"""Checks launches of the WKV kernels on a GPU: streams, graphs, torch.compile, threads, devices; and compile times.

`checks()` are the checks of `tools/gpu/gpu_check.py` that need CUDA itself.  As a program, this file is the small run
for compute-sanitizer to watch:

    compute-sanitizer --tool racecheck python tools/gpu/gpu_launches.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

# A bare machine has torch, but infctx only as this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from infctx.cuda.wkv_cuda import processors_of, wkv_cuda
from infctx.cuda.wkv_layout import HEAD_SIZES, backward_shared_bytes, compiler_options, cut, forward_shared_bytes

from gpu_correctness import BF16, FP32, Case, Check, Subject, Verdict, accuracy, draw, given, outputs, same

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("wkv_forward.cu", "wkv_backward.cu")
SOURCES_7 = ("wkv7_forward.cu", "wkv7_backward.cu")
COLD_SECONDS_BAR = 5.0
WARM_SECONDS_BAR = 0.010
SANITIZER_SECONDS = 60
SMALL = Case((2, 300, 3, 64), BF16, documents=True)

# Without torch, so that many processes start quickly.
COMPILE = """
import sys
from pathlib import Path
from infctx.cuda import compile
folder = Path(compile.__file__).parent
headers = {path.name: path.read_text() for path in folder.glob("*.cuh")}
source, arch, *options = sys.argv[1:]
compile.cubin((folder / source).read_text(), source, arch, tuple(options), headers)
"""

TIME_FIRST_USE = """
import json, sys, time
from dataclasses import asdict
import torch
from infctx.cuda import driver
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
cubin = driver.cubin
def timed(*arguments):
    global compiling
    began = time.perf_counter()
    compiled = cubin(*arguments)
    compiling = time.perf_counter() - began
    return compiled
driver.cubin = timed
for source in sys.argv[1].split(","):
    began = time.perf_counter()
    kernels = driver.load_kernels(source, 0, tuple(sys.argv[2:]))
    seconds = time.perf_counter() - began
    used = {name: asdict(resources) for name, resources in kernels.compiled.resources.items()}
    print(json.dumps([compiling, seconds, used]))
"""

# In the environment as users have it: TF32 may be allowed, as containers do it.
CHOOSE = """
import logging, sys
import torch
from infctx.ops.wkv import choose_backend
logging.basicConfig(format="%(message)s", stream=sys.stdout)
for op in ("wkv", "wkv7"):
    for dtype in (torch.bfloat16, torch.float32):
        print(choose_backend("auto", "cuda", int(sys.argv[1]), dtype, 64, op))
"""


def compile_checks() -> list[Check]:
    """Returns the checks to run first: later ones find all kernels in the cache."""
    first_use = [Check(f"first use {name}", partial(first_use_of, dtype)) for name, dtype in _DTYPES.items()]
    choice = Check("auto trusts the kernels in this environment", auto_trusts)
    return [Check("all kernels compile", compile_all), choice, *first_use]


_DTYPES = {"bf16": BF16, "fp32": FP32}


def checks() -> list[Check]:
    found = []
    for case in (SMALL, replace(SMALL, dtype=FP32)):
        found.append(Check(f"side stream {case.name}", partial(side_stream, case)))
        found.append(Check(f"graph, forward {case.name}", partial(graph, case, False)))
        found.append(Check(f"graph, forward and backward {case.name}", partial(graph, case, True)))
        found.append(Check(f"threads {case.name}", partial(threads, case)))
        found.append(Check(f"torch.compile {case.name}", partial(compiled, case)))
    found.append(Check("shared memory of several sizes", shared_memory))
    found.append(Check("every device", every_device))
    return found


def sanitizer_checks() -> list[Check]:
    """Returns the checks to run last: they are slow."""
    return [Check(f"compute-sanitizer {tool}", partial(sanitized, tool)) for tool in ("memcheck", "racecheck")]


# ---- compilation ----


def compile_all(subject: Subject) -> Verdict:
    """Compiles into the user's cache, in parallel processes: the compiler does one source at a time."""
    major, minor = torch.cuda.get_device_capability(subject.device)
    variants = {compiler_options(size, dtype) for size in HEAD_SIZES for dtype in (BF16, FP32)}
    programs = [
        (source, f"sm_{major}{minor}", *options) for source in reversed(SOURCES + SOURCES_7) for options in variants
    ]

    def compile_one(arguments: Sequence[str]) -> tuple[int, str]:
        done = _run_python(["-c", COMPILE, *arguments], seconds=90)
        return done.returncode, done.stderr.strip().rpartition("\n")[2]

    began = time.perf_counter()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        results = list(pool.map(compile_one, programs))
    failed = [line for code, line in results if code]
    text = f"{len(programs)} sources and variants in {time.perf_counter() - began:.1f} s"
    return Verdict(not failed, f"{text}; {len(failed)} failed: {failed[0]}" if failed else text)


def auto_trusts(subject: Subject) -> Verdict:
    """Runs the check that every user's process makes before it trusts the kernels; this process allows no TF32."""
    done = _run_python(["-c", CHOOSE, str(subject.device.index or 0)], seconds=90)
    said = done.stdout.splitlines()
    if done.returncode:
        return Verdict(False, done.stderr.strip().rpartition("\n")[2])
    return Verdict(said == ["cuda"] * 4, "for bf16 and fp32, then for version 7: " + ", ".join(said))


def first_use_of(dtype: torch.dtype, subject: Subject) -> Verdict:
    """Times first use in new processes, with an empty cache, then with the cache of the first one; heads of 64."""
    options = compiler_options(64, dtype)
    with tempfile.TemporaryDirectory() as cache:
        lines = []
        for _ in range(2):
            arguments = ["-c", TIME_FIRST_USE, ",".join(SOURCES), *options]
            done = _run_python(arguments, seconds=90, variables={"XDG_CACHE_HOME": cache})
            if done.returncode:
                return Verdict(False, done.stderr.strip().rpartition("\n")[2])
            lines.append([json.loads(line) for line in done.stdout.splitlines()])
    return judge_first_use(*lines)


def judge_first_use(cold: Sequence[tuple], warm: Sequence[tuple]) -> Verdict:
    """Judges times of first use.

    cold, warm: by source, seconds until the machine code is ready, until it can be launched, resources by kernel
    """

    def listed(rows: Sequence[tuple], scale: float, digits: int) -> str:
        return " + ".join(f"{row[0] * scale:.{digits}f}" for row in rows)

    kernels = {name: used for row in cold for name, used in row[2].items()}
    spilling = [name for name, used in kernels.items() if used["spill_store_bytes"] or used["spill_load_bytes"]]
    slow = max(row[0] for row in cold) > COLD_SECONDS_BAR or max(row[0] for row in warm) > WARM_SECONDS_BAR
    text = f"forward + backward: empty cache {listed(cold, 1, 2)} s, bar {COLD_SECONDS_BAR:g} s each; "
    text += f"warm {listed(warm, 1e3, 1)} ms, bar {1e3 * WARM_SECONDS_BAR:g} ms each, "
    text += f"ready to launch after {' + '.join(f'{1e3 * row[1]:.1f}' for row in warm)} ms; "
    text += "registers (spilled bytes): "
    text += ", ".join(f"{name} {used['registers']} ({used['spill_store_bytes']})" for name, used in kernels.items())
    return Verdict(not slow and not spilling, text)


def _run_python(
    arguments: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **(variables or {})}
    command = [*prefix, sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, errors="replace", timeout=seconds, env=environment)


# ---- launches ----


def side_stream(case: Case, subject: Subject) -> Verdict:
    """Checks a side stream whose inputs arrive late: a launch on any other stream would read zeros."""
    inputs, cotangents = draw(case, subject.device)
    expected = outputs(subject.op, inputs, cotangents)
    late = {name: x if x is None or not x.is_floating_point() else torch.zeros_like(x) for name, x in inputs.items()}
    busy = torch.randn(4096, 4096, device=subject.device)
    stream, main = torch.cuda.Stream(subject.device), torch.cuda.current_stream(subject.device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        _copy_into(late, inputs)
        found = outputs(subject.op, late, cotangents)
    main.wait_stream(stream)
    verdict = same(found, expected)
    torch.cuda.synchronize(subject.device)  # before memory of the other stream is freed
    return verdict


def graph(case: Case, gradients: bool, subject: Subject) -> Verdict:
    """Checks a graph captured once and replayed with other inputs in the same places."""
    inputs, cotangents = draw(case, subject.device)
    inputs = {name: None if x is None else x.clone() for name, x in inputs.items()}

    def work(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        if gradients:
            return outputs(subject.op, inputs, cotangents)
        with torch.no_grad():
            return dict(zip(("y", "S_T"), subject.op(**inputs), strict=True))

    stream = torch.cuda.Stream(subject.device)
    stream.wait_stream(torch.cuda.current_stream(subject.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            work(inputs)
    torch.cuda.current_stream(subject.device).wait_stream(stream)
    torch.cuda.synchronize(subject.device)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = work(inputs)
    for seed in (1, 2, 3):
        others, _ = draw(case, subject.device, seed)
        _copy_into(inputs, others)
        captured.replay()
        torch.cuda.synchronize(subject.device)
        verdict = same(found, work(others))
        if not verdict.passed:
            return Verdict(False, f"replay {seed}: {verdict.text}")
    return Verdict(True, "the same bits in 3 replays")


def _copy_into(places: Mapping[str, Tensor | None], values: Mapping[str, Tensor | None]) -> None:
    with torch.no_grad():
        for name, place in places.items():
            if place is not None:
                place.copy_(given(values, name))


def threads(case: Case, subject: Subject) -> Verdict:
    """Checks four threads, each with its own inputs and, on a GPU, its own stream."""
    drawn = [draw(case, subject.device, seed) for seed in range(4)]
    expected = [outputs(subject.op, *each) for each in drawn]
    found: dict[int, list[dict[str, Tensor]]] = {number: [] for number in range(4)}
    problems: list[Exception] = []
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)

    def work(number: int) -> None:
        try:
            if subject.device.type != "cuda":
                found[number] += [outputs(subject.op, *drawn[number]) for _ in range(3)]
                return
            stream = torch.cuda.Stream(subject.device)
            with torch.cuda.stream(stream):
                found[number] += [outputs(subject.op, *drawn[number]) for _ in range(3)]
            stream.synchronize()
        except Exception as problem:
            problems.append(problem)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if problems:
        raise problems[0]
    verdicts = [same(each, expected[number]) for number, several in found.items() for each in several]
    return next((verdict for verdict in verdicts if not verdict.passed), Verdict(True, "the same bits in 4 threads"))


def compiled(case: Case, subject: Subject) -> Verdict:
    """Checks torch.compile as a full graph with operations around the op: inductor, or aot_eager without it."""
    # One process compiles; a pool starts slowly and ends noisily.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    inputs, cotangents = draw(case, subject.device)

    op = subject.op

    # Powers of two are exact in any dtype, so fusion changes nothing.
    def step(r, k, v, w, u, state, starts, initial):
        y, final = op(2 * r, k, 0.5 * v, w, u, state, starts, initial)
        return 4 * y, 2 * final

    backend = "inductor" if _inductor_works(subject.device) else "aot_eager"
    whole = torch.compile(step, fullgraph=True, backend=backend)
    verdict = same(outputs(whole, inputs, cotangents), outputs(step, inputs, cotangents))
    return replace(verdict, text=f"{backend}: {verdict.text}")


def _inductor_works(device: torch.device) -> bool:
    """Returns whether inductor works: it needs Triton and a C compiler on a GPU; on a CPU we do not wait for it."""
    if device.type != "cuda":
        return False
    x = torch.randn(1000, device=device)
    try:
        return torch.allclose(torch.compile(lambda x: torch.sin(x) + 1)(x), torch.sin(x) + 1)
    except Exception as problem:
        print(f"inductor does not work here: {str(problem).splitlines()[0]}", flush=True)
        return False


def shared_memory(subject: Subject) -> Verdict:
    """Checks heads of 64, which need more than a kernel's default 48 KB, in turn with heads of 32."""
    texts, passed = [], True
    for size in (64, 32, 64):
        for dtype in (BF16, FP32):
            case = Case((2, 130, 3, size), dtype, documents=True)
            inputs, _ = draw(case, subject.device)
            layout = cut(given(inputs, "r").shape, dtype, spans=1)
            verdict = accuracy(case, subject)
            passed = passed and bool(verdict.passed)
            kilobytes = [count(layout) / 1024 for count in (forward_shared_bytes, backward_shared_bytes)]
            texts.append(f"{case.name}: {kilobytes[0]:.1f} and {kilobytes[1]:.1f} KB, {verdict.text.split(';')[0]}")
    return Verdict(passed, "; ".join(texts[:4]))


def every_device(subject: Subject) -> Verdict:
    """Checks each device from a thread whose current device is another one."""
    count = torch.cuda.device_count()
    if count < 2:
        return Verdict(None, "there is only one device")
    verdicts = {}
    for index in range(count):
        device = torch.device("cuda", index)
        verdicts[index] = accuracy(SMALL, replace(subject, device=device, processors=processors_of(device)))
    failed = [index for index, verdict in verdicts.items() if not verdict.passed]
    return Verdict(not failed, f"{count} devices; wrong on {failed or 'none'}")


def has_sanitizer() -> bool:
    return shutil.which("compute-sanitizer") is not None


def sanitized(tool: str, subject: Subject) -> Verdict:
    """Runs this file's small run under compute-sanitizer."""
    if not has_sanitizer():
        return Verdict(None, "compute-sanitizer is not on PATH")
    prefix = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=wkv"]
    if tool == "memcheck":
        prefix += ["--report-api-errors", "no"]  # torch calls the driver for features that may be missing
    # Each tensor gets separate memory; else an access out of bounds could still be inside a block of torch's allocator.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = _run_python([str(Path(__file__).resolve())], SANITIZER_SECONDS, variables, prefix)
    except subprocess.TimeoutExpired:
        return Verdict(None, f"did not end within {SANITIZER_SECONDS} s")
    return judge_sanitizer(done.stdout + done.stderr)


def judge_sanitizer(said: str) -> Verdict:
    summaries = [line.strip("= ") for line in said.splitlines() if "SUMMARY" in line]
    if not summaries or "small run: done" not in said:
        lines = [line.strip("= ") for line in said.splitlines() if line.strip("= ")]
        ours = [line for line in lines if "Error" in line or "rror:" in line] or lines
        return Verdict(False if summaries else None, f"did not finish: {ours[-1] if ours else 'it printed nothing'}")
    clean = all(re.search("SUMMARY: 0 (errors|hazards)", line) for line in summaries)
    return Verdict(clean, "; ".join(summaries))


def small_run(op: Callable = wkv_cuda, device: str = "cuda") -> None:
    """Runs forward and backward in both dtypes, with several spans, and with a split head."""
    for dtype in (BF16, FP32):
        for shape in ((2, 150, 2, 64), (1, 70, 1, 128)):
            outputs(op, *draw(Case(shape, dtype, documents=True), torch.device(device)))
    if device == "cuda":
        torch.cuda.synchronize()
    print("small run: done")


if __name__ == "__main__":
    small_run()

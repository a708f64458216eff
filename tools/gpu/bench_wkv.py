"""Speed of the WKV kernels on a GPU, next to torch, fla and the speed of memory.  Writes Markdown.

    python tools/gpu/bench_wkv.py                            docs/benchmarks/wkv-<device>.md
    python tools/gpu/bench_wkv.py --output table.md --all    fla at every size, not only those of its published table

Times are medians by CUDA events.  Several sets of inputs keep data out of the cache, and launches are queued ahead so
that the host's time does not count.  `docs/benchmarks/README.md` explains the table.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

# A bare machine has torch, but infctx only as this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from infctx.cuda.compile import KernelsUnavailable
from infctx.cuda.driver import check_torch
from infctx.cuda.wkv_cuda import processors_of, wkv_cuda
from infctx.files import atomic_file
from infctx.ops.wkv_chunked import wkv_chunked

from gpu_correctness import BF16, Case, draw, in_float64, outputs, relative_rms
from wkv_table import BAR_SHAPE, HEAD_SIZE, MISSING, NOT_RUN, Report, Row, bars, find_facts, markdown, table_row

Result = TypeVar("Result")

REPOSITORY = Path(__file__).resolve().parents[2]
BATCHES = (1, 8)
TOKENS = (1024, 4096, 16384, 65536)
HEADS = (32, 40, 64)
FLA_SHAPES = {(batch, tokens, heads) for batch in BATCHES for tokens in (4096, 16384) for heads in HEADS}
# fla compiles and tunes its kernels at the first call.
FLA_FIRST_SECONDS = 90

# Bytes of device memory per element of r.
SET_BYTES = 12  # r k v dy in bf16, w in fp32
TRAINING_BYTES = 18  # y, the states of 64 tokens, the gradients, sums of u by chunk
# A guess, to save the time of trying; OutOfMemoryError decides.
CHUNKED_BYTES = 180


class Deadline:
    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.end = clock, clock() + seconds

    def left(self) -> float:
        return self.end - self.clock()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/wkv-<device>.md")
    parser.add_argument("--minutes", type=float, default=7, help="no cell starts after this time (default %(default)s)")
    parser.add_argument("--all", action="store_true", help="fla at every size")
    parser.add_argument("--commit", help="commit to name in the heading if there is no git")
    options = parser.parse_args(arguments)
    try:
        check_torch()
    except KernelsUnavailable as error:
        print(f"bench_wkv: {error}", file=sys.stderr)
        return 2
    deadline = Deadline(60 * options.minutes)
    output = options.output or default_output(torch.cuda.get_device_name())
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("highest")
    report = Report(find_facts(options.commit), measure_copy_rate(device), processors_of(device), [])
    bench = Bench(device, deadline, report)
    report.rows += [Row(batch, tokens, heads) for batch in BATCHES for tokens in TOKENS for heads in HEADS]
    # The row with bars comes first; fla last, as it compiles for a while.  The file is written after each row, in case
    # a later one never ends.
    rows = sorted(report.rows, key=lambda row: row.shape != BAR_SHAPE)
    steps = [(bench.fill, row) for row in rows]
    steps += [(bench.fill_fla, row) for row in rows if bench.fla and (options.all or row.shape in FLA_SHAPES)]
    for fill, row in steps:
        fill_or_stop(bench, fill, row)
        print(table_row(row, report), flush=True)
        with atomic_file(output) as temporary:
            temporary.write_text(markdown(report), encoding="utf-8")
    print("\n".join(bars(report)))
    print(f"written to {output}")
    return 0


def default_output(device_name: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return REPOSITORY / "docs" / "benchmarks" / f"wkv-{slug}.md"


def fill_or_stop(bench: Bench, fill: Callable[[Row], None], row: Row) -> None:
    """Fills a row; after an error that the device does not recover from, ends the benchmark."""
    try:
        fill(row)
        bench.timer.synchronize()
    except RuntimeError as problem:
        if bench.deadline.left() > 0:
            where = "B={} T={} H={}".format(*row.shape)
            bench.report.notes.append(f"nothing was run after {where}: {str(problem).splitlines()[0]}")
        bench.deadline.end = bench.deadline.clock()


# ---- measuring ----


class CudaTimer:
    """Measures time on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def wait(self, seconds: float) -> None:
        """Keeps the device idle for this long at 2 GHz, while the host continues."""
        torch.cuda._sleep(int(seconds * 2e9))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def us_between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return 1e3 * begin.elapsed_time(end)


def median_us(
    prepare: Callable[[int], Callable[[], object]], timer: CudaTimer, seconds: float = 0.25, least: int = 3
) -> float:
    """Returns the median time of a call; repeats for about `seconds`.

    prepare: prepare(number) does the untimed part and returns the function to time
    """
    prepare(0)()
    timer.synchronize()
    began = time.perf_counter()
    prepare(1)()
    host_seconds = time.perf_counter() - began
    timer.synchronize()
    repeats = max(least, min(50, int(seconds / (time.perf_counter() - began))))
    times: list[float] = []
    while len(times) < repeats:
        count = min(16, repeats - len(times))  # the device's queue holds about a thousand launches
        # While the device waits, the host gets ahead of it.  That does not help slow launches, such as torch's alone.
        timer.wait(min(2 * host_seconds * count, 0.05))
        marks = []
        for number in range(len(times), len(times) + count):
            work = prepare(number)
            begin = timer.mark()
            work()
            marks.append((begin, timer.mark()))
            del work
        timer.synchronize()
        times += [timer.us_between(*pair) for pair in marks]
    return statistics.median(times)


def measure_copy_rate(device: torch.device) -> float:
    """Returns bytes per second, read and written, of a copy much larger than any cache."""
    size = int(min(2**31, torch.cuda.mem_get_info(device)[0] // 4))
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    return 2 * size / (1e-6 * median_us(lambda number: lambda: target.copy_(source), CudaTimer(device)))


class Bench:
    """Fills rows of a report on a device."""

    def __init__(self, device: torch.device, deadline: Deadline, report: Report) -> None:
        self.device, self.deadline, self.report = device, deadline, report
        self.timer = CudaTimer(device)
        self.fla, self.fla_was_called = find_fla(report.notes), False

    def fill(self, row: Row) -> None:
        """Measures every cell except fla's that fits and has time; a failure leaves a word in the cell and a note."""
        row.fla = MISSING
        sets = self.attempt(row, "inputs", lambda: self.draw_sets(row))
        if isinstance(sets, str):
            row.forward = row.training = row.backward = row.chunked = sets
            row.y_error = row.dr_error = sets if row.tokens <= 4096 else MISSING
            return
        trains = self.fits(row, TRAINING_BYTES)
        attempt = self.attempt
        row.forward = attempt(row, "forward", lambda: self.time_forward(sets))
        row.training = attempt(row, "training", lambda: self.time_training(wkv_cuda, sets)) if trains else MISSING
        row.backward = attempt(row, "backward", lambda: self.time_backward(wkv_cuda, sets)) if trains else MISSING
        row.y_error = row.dr_error = MISSING
        if row.tokens <= 4096:
            errors = attempt(row, "errors", lambda: find_errors(sets[0]))
            row.y_error, row.dr_error = (errors, errors) if isinstance(errors, str) else errors
        row.chunked = MISSING
        if self.fits(row, CHUNKED_BYTES):
            row.chunked = attempt(row, "chunked", lambda: self.time_both(wkv_chunked, sets[:2]))

    def fill_fla(self, row: Row) -> None:
        row.fla = NOT_RUN
        if self.fla_was_called or self.deadline.left() > FLA_FIRST_SECONDS:
            self.fla_was_called = True
            row.fla = self.attempt(row, "fla", lambda: self.time_fla(self.draw_sets(row)))

    def attempt(self, row: Row, what: str, work: Callable[[], Result]) -> Result | str:
        if self.deadline.left() <= 0:
            return NOT_RUN
        try:
            return work()
        except torch.OutOfMemoryError:
            return MISSING
        except Exception as problem:
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            self.report.notes.append(f"{what} at B={row.batch} T={row.tokens} H={row.heads} failed: {reason}")
            return "failed"
        finally:
            with contextlib.suppress(RuntimeError):  # after an error on the device, every call is one
                torch.cuda.empty_cache()

    def fits(self, row: Row, bytes_by_element: float) -> bool:
        """Returns whether this fits in free memory, keeping 5 % back."""
        elements = row.batch * row.tokens * row.heads * HEAD_SIZE
        return elements * bytes_by_element < 0.95 * torch.cuda.mem_get_info(self.device)[0]

    def draw_sets(self, row: Row) -> list[tuple]:
        """Draws at least two sets, and four times the size of the cache if memory allows besides a training run."""
        elements = row.batch * row.tokens * row.heads * HEAD_SIZE
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 50_000_000)
        wanted = max(2, min(16, -(-4 * cache // (SET_BYTES * elements))))
        torch.cuda.empty_cache()
        room = 0.9 * torch.cuda.mem_get_info(self.device)[0] - TRAINING_BYTES * elements
        count = max(1, min(wanted, int(room / (SET_BYTES * elements))))
        # Drawing w takes one more tensor like it for a moment.
        if not self.fits(row, SET_BYTES * count + 4):
            raise torch.OutOfMemoryError(f"{count} sets of inputs")
        case = Case((row.batch, row.tokens, row.heads, HEAD_SIZE), BF16)
        return [draw(case, self.device, seed) for seed in range(count)]

    def time_forward(self, sets: Sequence[tuple]) -> float:
        def prepare(number: int) -> Callable[[], object]:
            inputs = sets[number % len(sets)][0]
            return lambda: wkv_cuda(**inputs)

        with torch.no_grad():
            return median_us(prepare, self.timer)

    def time_training(self, op: Callable, sets: Sequence[tuple], **options: Any) -> float:
        """Times a forward pass that keeps tensors for the backward pass."""

        def prepare(number: int) -> Callable[[], object]:
            leaves = _leaves(sets[number % len(sets)][0])
            return lambda: op(**leaves)

        return median_us(prepare, self.timer, **options)

    def time_backward(self, op: Callable, sets: Sequence[tuple], **options: Any) -> float:
        def prepare(number: int) -> Callable[[], object]:
            inputs, cotangents = sets[number % len(sets)]
            leaves = _leaves(inputs)
            results = op(**leaves)
            wanted = [x for x in leaves.values() if x is not None]
            return lambda: torch.autograd.grad(results, wanted, cotangents)

        return median_us(prepare, self.timer, **options)

    def time_both(self, op: Callable, sets: Sequence[tuple]) -> float:
        return sum(time(op, sets, seconds=0.1, least=2) for time in (self.time_training, self.time_backward))

    def time_fla(self, sets: Sequence[tuple]) -> float:
        fla = self.fla
        assert fla is not None  # else nobody would look
        ours, theirs = (outputs(op, *sets[0]) for op in (wkv_cuda, fla))
        error = max(relative_rms(theirs[name], ours[name]) for name in ("y", "dr"))
        if not error < 0.05:
            raise ValueError(f"its results differ from ours by {error:.2g}")
        del ours, theirs
        return self.time_both(fla, sets)


def _leaves(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: x if x is None else x.detach().requires_grad_() for name, x in inputs.items()}


def find_errors(inputs_and_cotangents: tuple) -> tuple[float, float]:
    """Returns errors of y and dr against float64, in two heads of the first lane, though all heads run."""
    inputs, cotangents = inputs_and_cotangents
    found = outputs(wkv_cuda, inputs, cotangents)
    by_token, state = {name: inputs[name][:1, :, :2] for name in ("r", "k", "v", "w")}, inputs["state"][:1, :2]
    part = in_float64(by_token | {"u": inputs["u"][:2], "state": state, "starts": None, "initial": None})
    dy, dfinal = cotangents
    truth = outputs(wkv_chunked, part, (dy[:1, :, :2].double(), dfinal[:1, :2].double()))
    y_error, dr_error = (relative_rms(found[name][:1, :, :2], truth[name]) for name in ("y", "dr"))
    return y_error, dr_error


def find_fla(notes: list[str]) -> Callable | None:
    """Returns fla's op with our signature; None if it is not installed."""
    try:
        import triton
        from fla import __version__
        from fla.ops.rwkv6 import chunk_rwkv6
    except Exception as problem:
        notes.append(f"fla is not available: {(str(problem).splitlines() or [type(problem).__name__])[0]}")
        return None
    notes.append(
        f"fla {__version__}, Triton {triton.__version__} (3.4 to 3.7.0 miscompile some of fla's backward kernels)"
    )

    def op(r, k, v, w, u, state, starts=None, initial=None):
        return chunk_rwkv6(r, k, v, w, u, scale=1.0, initial_state=state, output_final_state=True)

    return op


if __name__ == "__main__":
    sys.exit(main())

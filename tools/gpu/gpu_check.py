"""Checks and times the WKV kernels on this machine's GPU, in minutes; needs only torch.

    make gpu-check                                        docs/benchmarks/wkv-<device>.md
    python tools/gpu/gpu_check.py --output table.md --only accuracy

One line per check: PASS, FAIL, or SKIP if it cannot be made.  Exit code 0: none failed; 1: some did; 2: no GPU.
Checks run in separate processes: if one crashes or hangs, that is a FAIL, and the next check continues in a new one.
It ends with `infctx bench`, four minutes of whole windows, where infctx's packages are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# A bare machine has torch, but infctx only as this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from infctx.cuda.compile import KernelsUnavailable
from infctx.cuda.driver import check_torch
from infctx.cuda.wkv_cuda import processors_of
from infctx.files import atomic_file

import gpu_correctness
import gpu_goose
import gpu_launches
from bench_wkv import default_output
from gpu_correctness import Check, Subject, Verdict
from wkv_table import find_facts

LONGEST_CHECK_SECONDS = 120
LONGEST_ROW_SECONDS = 240
"""Longest silence of the benchmark; fla's first call compiles it."""
CHECKS_SHARE = 0.6
"""Share of the time for the checks before the benchmark."""
SANITIZER_SHARE = 0.2
"""Share of the time kept for compute-sanitizer after it."""
TRAINING_MINUTES = 4
"""For `infctx bench`, after all else, where infctx's packages are installed."""
WORDS = {True: "PASS", False: "FAIL", None: "SKIP"}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
"""A bare machine has infctx only as this folder."""
DEVICE_LOST = 3
"""Exit code of a process in which CUDA no longer works."""


@dataclass(frozen=True)
class Result:
    word: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.word} {self.name}: {self.text}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        check_torch()
    except KernelsUnavailable as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    if options.checks is not None:
        return run_checks([all_checks()[int(number)] for number in options.checks.split(",")], subject())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end too
    began = time.monotonic()
    seconds = 60 * options.minutes
    checks = all_checks()
    names = [check.name for check in checks]
    wanted = [number for number, name in enumerate(names) if re.search(options.only, name)]
    late = [number for number in wanted if name_is_late(names[number])]
    early = [number for number in wanted if number not in late]

    def run(numbers: Sequence[int], until: float) -> list[Result]:
        return run_in_processes(numbers, names, command_of, seconds_left=lambda: until - (time.monotonic() - began))

    results = run(early, CHECKS_SHARE * seconds)
    speed = ""
    if not options.no_speed:
        kept = SANITIZER_SHARE * seconds if late and gpu_launches.has_sanitizer() else 10
        speed = run_benchmark(seconds - kept - (time.monotonic() - began), options)
    results += run(late, seconds)
    if not options.no_speed:
        speed += run_training(min(TRAINING_MINUTES, options.minutes))
    output = options.output or default_output(torch.cuda.get_device_name())
    with atomic_file(output) as temporary:
        temporary.write_text(report(results, speed, options.commit), encoding="utf-8")
    print(f"{summary(results)}; {time.monotonic() - began:.0f} s; written to {output}")
    return exit_code(results)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/wkv-<device>.md")
    parser.add_argument(
        "--minutes", type=float, default=7, help="for everything; nothing starts after this time (default %(default)s)"
    )
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="only checks whose name matches this regular expression"
    )
    parser.add_argument("--no-speed", action="store_true", help="no benchmark")
    parser.add_argument("--all", action="store_true", help="benchmark: fla at every size")
    parser.add_argument("--commit", help="commit to name in the heading if there is no git")
    parser.add_argument("--checks", help=argparse.SUPPRESS)  # numbers of those that this process runs itself
    return parser.parse_args(arguments)


def all_checks() -> list[Check]:
    return [
        *gpu_launches.compile_checks(),
        *gpu_correctness.checks(),
        *gpu_goose.checks(),
        *gpu_launches.checks(),
        *gpu_launches.sanitizer_checks(),
    ]


def name_is_late(name: str) -> bool:
    return name in {check.name for check in gpu_launches.sanitizer_checks()}


def subject() -> Subject:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("highest")
    return Subject(device, processors_of(device))


# ---- in the process that does the work ----


def run_checks(checks: Sequence[Check], subject: Subject) -> int:
    """Prints one line per check; returns DEVICE_LOST once CUDA no longer works."""
    for check in checks:
        result, lost = run_check(check, subject), False
        if subject.device.type == "cuda":
            try:
                torch.cuda.synchronize(subject.device)
                torch.cuda.empty_cache()
            except RuntimeError as problem:
                lost = True
                if result.word != "FAIL":
                    result = Result("FAIL", check.name, f"after it CUDA no longer worked: {problem}")
        print(one_line(result), flush=True)
        if lost:
            return DEVICE_LOST
    return 0


def run_check(check: Check, subject: Subject) -> Result:
    try:
        verdict = check.run(subject)
    except Exception as problem:
        verdict = Verdict(False, f"{type(problem).__name__}: {problem}")
    return Result(WORDS[verdict.passed], check.name, verdict.text)


def one_line(result: Result) -> str:
    return " ".join(str(result).split())


# ---- in the user's process ----


def run_in_processes(
    numbers: Sequence[int],
    names: Sequence[str],
    command: Callable[[Sequence[int]], list[str]],
    seconds_left: Callable[[], float],
) -> list[Result]:
    """Runs the checks with these numbers in one process; if it breaks off, continues in another."""
    results: list[Result] = []

    def add(result: Result) -> None:
        results.append(result)
        print(result, flush=True)

    while len(results) < len(numbers):
        rest = numbers[len(results) :]
        if seconds_left() <= 0:
            for number in rest:
                add(Result("SKIP", names[number], "no time was left"))
            break
        before = len(results)
        ending = ""
        for line in lines_of(command(rest), seconds_left):
            word, _, others = line.partition(" ")
            current = names[numbers[len(results)]] if len(results) < len(numbers) else None
            if isinstance(line, Ending):
                ending = str(line)
            elif current is not None and word in WORDS.values() and others.startswith(f"{current}: "):
                results.append(Result(word, current, others.removeprefix(f"{current}: ")))
                print(line, flush=True)
            else:
                print(line, flush=True)
        if len(results) < len(numbers) and (ending != f"exit code {DEVICE_LOST}" or len(results) == before):
            word = "SKIP" if ending == OUT_OF_TIME else "FAIL"
            add(Result(word, names[numbers[len(results)]], f"its process ended: {ending}"))
    return results


class Ending(str):
    """How a process ended: the last item from `lines_of`."""


OUT_OF_TIME = "no time was left"


def lines_of(
    command: list[str], seconds_left: Callable[[], float], longest: float = LONGEST_CHECK_SECONDS
) -> Iterator[str]:
    """Yields a process's output, line by line, and an Ending; kills the process if it prints nothing for too long."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, errors="replace", text=True, start_new_session=True, env=ENVIRONMENT
    )
    output = process.stdout
    assert output is not None  # it is a pipe
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in output:
            said.put(line.rstrip("\n"))
        said.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    ending, ended = "", False
    try:
        while not (ended or ending):
            left = seconds_left()
            try:
                line = said.get(timeout=max(0.0, min(longest, left)))
            except queue.Empty:
                ending = f"it printed nothing for {longest:g} s" if left > longest else OUT_OF_TIME
                continue
            if line is None:
                ended = True
            else:
                yield line
    finally:  # also if the reader of the lines was interrupted
        stop(process, kill=not ended)
        reader.join(timeout=5)
        if not reader.is_alive():  # children of the process may hold its output open
            output.close()
    code = process.returncode
    yield Ending(ending or (f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"))


def stop(process: subprocess.Popen, kill: bool) -> None:
    """Waits for a process to end, or kills it; also kills the processes that it started."""
    if kill:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command_of(numbers: Sequence[int]) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--checks", ",".join(map(str, numbers))]


def run_benchmark(seconds: float, options: argparse.Namespace) -> str:
    """Returns the Markdown of `bench_wkv.py`, as far as it got."""
    command = [sys.executable, str(Path(__file__).with_name("bench_wkv.py").resolve())]
    command += ["--minutes", f"{max(0.0, seconds) / 60:.2f}", *["--all"] * options.all]
    command += ["--commit", options.commit] if options.commit else []
    # It ends by itself, except that a last row may take any time.
    return markdown_of("the benchmark", command, seconds + 30, LONGEST_ROW_SECONDS)


def run_training(minutes: float) -> str:
    """Returns the Markdown of `infctx bench`: whole windows of published sizes; or why there is none."""
    missing = [name for name in ("numpy", "psutil", "pydantic", "tqdm", "yaml") if find_spec(name) is None]
    if missing:
        return f"\n## Training\n\nNot measured: it needs {', '.join(missing)} too.\n"
    command = [sys.executable, "-m", "infctx", "bench", "--device", "cuda", "--minutes", f"{minutes:g}"]
    # A last window may take longer than the minutes.
    table = markdown_of("infctx bench", command, 60 * minutes + LONGEST_ROW_SECONDS, longest=600, shows=False)
    return f"\n## Training\n\n{table}" if table else ""


def markdown_of(name: str, command: Sequence[str], seconds: float, longest: float, shows: bool = True) -> str:
    """Returns what a command writes into its `--output`, empty if nothing; shows: also prints its lines."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.md"
        for line in lines_of([*command, "--output", str(output)], lambda: end - time.monotonic(), longest):
            if isinstance(line, Ending):
                if line != "exit code 0":
                    print(f"{name} ended: {line}", flush=True)
            elif shows:
                print(line, flush=True)
        return output.read_text(encoding="utf-8") if output.exists() else ""


# ---- output ----


def exit_code(results: Sequence[Result]) -> int:
    return int(any(result.word == "FAIL" for result in results))


def summary(results: Sequence[Result]) -> str:
    counts = {word: sum(result.word == word for result in results) for word in WORDS.values()}
    return "{PASS} checks passed, {FAIL} failed, {SKIP} were not made".format(**counts)


def report(results: Sequence[Result], speed: str, commit: str | None) -> str:
    """Returns the benchmark's Markdown followed by the checks."""
    if not speed:
        facts = find_facts(commit)
        lines = [f"# WKV kernels on {facts['device']}", "", "| | |", "|---|---|"]
        speed = "\n".join(lines + [f"| {name} | {value} |" for name, value in facts.items()]) + "\n"
    rows = [f"| {result.word} | {result.name} | {result.text.replace('|', '/')} |" for result in results]
    table = ["## Checks", "", f"{summary(results)}.", "", "| | check | found |", "|---|---|---|", *rows]
    return "\n".join([speed, *table]) + "\n"


if __name__ == "__main__":
    sys.exit(main())

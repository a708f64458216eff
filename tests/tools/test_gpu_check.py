"""The tool that checks the kernels on a GPU, as far as possible without one: with the emulator."""

import contextlib
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.cuda.wkv_time import Processors, find_layout
from infctx.ops.wkv_chunked import wkv_chunked

import gpu_check
import gpu_correctness
import gpu_goose
import gpu_launches
from gpu_correctness import BF16, FP32, Case, Check, Subject, Verdict
from places import ROOT
from wkv_emulated import emulated

TINY = Case((2, 166, 2, 16), FP32, documents=True)
TINY_7 = Case((1, 150, 1, 32), FP32, documents=True)


@pytest.fixture
def subject():
    """The emulator, with enough processors for several spans."""
    with emulated(40):
        yield Subject(torch.device("cpu"), Processors(40))


def broken(subject, which, change):
    """The same, but `change` is applied to one of the outputs or, with a hook, to the gradient of an input."""

    def op(r, k, v, w, u, state, starts=None, initial=None):
        inputs = {"r": r, "k": k, "v": v, "w": w, "u": u, "state": state, "starts": starts, "initial": initial}
        if which in inputs:
            inputs[which] = Changed.apply(inputs[which], change)
        y, final = wkv_cuda(**inputs)
        return (change(y), final) if which == "y" else (y, final)

    return dataclasses.replace(subject, op=op)


class Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


# ---- the checks, on the emulator ----


@pytest.mark.parametrize("decay", ["ordinary", "extreme", "slow", "constant", "gate 0.1"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_accuracy(subject, dtype, decay):
    case = Case((2, 166, 2, 16), dtype, decay, documents=decay != "slow")
    verdict = gpu_correctness.accuracy(case, subject)
    assert verdict.passed, verdict.text
    assert re.match(r"worst \S.* \d\.\de-\d\d, bar \d\.\de-\d\d; spans 3 and 3; times chunked: y ", verdict.text)


def test_heads_that_are_cut_up_are_judged_too(subject):
    verdict = gpu_correctness.accuracy(Case((1, 40, 1, 80), FP32), subject)
    assert verdict.passed and "; spans of pieces; " in verdict.text


def test_every_variant_is_compiled(subject, monkeypatch):
    asked = []

    def run(arguments, seconds):
        asked.append(arguments[2:])
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_launches, "_run_python", run)
    assert gpu_launches.compile_all(subject).passed
    assert sorted(map(tuple, asked)) == sorted({tuple(each) for each in asked}) and len(asked) == 24


@pytest.mark.parametrize("which", ["y", *gpu_correctness.GRADIENTS])
def test_accuracy_finds_what_is_wrong(subject, which):
    for dtype, off in ((FP32, 1.0001), (BF16, 1.01)):
        wrong = broken(subject, which, lambda x, off=off: x * off)
        assert gpu_correctness.accuracy(dataclasses.replace(TINY, dtype=dtype), wrong).passed is False
    verdict = gpu_correctness.accuracy(TINY, broken(subject, which, lambda x: x * torch.nan))
    assert verdict.passed is False and "nan" in verdict.text


def test_a_single_token_is_judged_by_what_rounding_it_costs(subject):
    for seed in range(5):
        case = Case((1, 1, 1 + seed, 16), BF16)
        assert gpu_correctness.accuracy(case, subject).passed
        assert not gpu_correctness.accuracy(case, broken(subject, "k", lambda x: x * 1.01)).passed


def test_the_judge_and_the_other_checks(subject):
    for run in (
        gpu_correctness.judge,
        lambda subject: gpu_correctness.same_bits(TINY, subject),
        lambda subject: gpu_correctness.memory_of_nan(TINY, subject),
        lambda subject: gpu_correctness.any_strides(TINY, subject),
        lambda subject: gpu_correctness.expanded_decay(TINY, subject),
        lambda subject: gpu_correctness.cut_anywhere(dataclasses.replace(TINY, documents=False), subject),
        lambda subject: gpu_correctness.two_halves(dataclasses.replace(TINY, dtype=BF16), False, subject),
        lambda subject: gpu_correctness.two_halves(dataclasses.replace(TINY, dtype=BF16), True, subject),
        gpu_goose.judge,
        lambda subject: gpu_goose.accuracy(TINY_7, subject),
        lambda subject: gpu_goose.same_bits(TINY_7, subject),
        lambda subject: gpu_goose.memory_of_nan(TINY_7, subject),
    ):
        verdict = run(subject)
        assert verdict.passed, verdict.text


def test_the_other_checks_find_what_is_wrong(subject):
    noisy = broken(subject, "y", lambda y: y + 1e-3 * torch.randn_like(y))
    assert not gpu_correctness.same_bits(TINY, noisy).passed
    # An output that is never written.
    unwritten = broken(
        subject, "k", lambda gradient: torch.cat([gradient[:, :-1], torch.empty_like(gradient[:, -1:])], 1)
    )
    assert not gpu_correctness.memory_of_nan(TINY, unwritten).passed
    assert not torch.are_deterministic_algorithms_enabled()
    # Results that depend on the length of the parts.
    whole = dataclasses.replace(TINY, documents=False)
    for which in ("k", "y"):
        wrong = broken(subject, which, lambda x: x * (1 + 1e-5 * x.shape[1]))
        assert not gpu_correctness.cut_anywhere(whole, wrong).passed
    lost = broken(subject, "state", torch.zeros_like)
    assert not gpu_correctness.cut_anywhere(whole, lost).passed
    assert not gpu_correctness.two_halves(dataclasses.replace(TINY, dtype=BF16), True, lost).passed
    ragged = broken(subject, "y", lambda y: y * (1 + 1e-2 * y.shape[1]))
    assert not gpu_correctness.two_halves(dataclasses.replace(TINY, dtype=BF16), False, ragged).passed
    by_stride = dataclasses.replace(subject, op=lambda r, *others, **named: wkv_cuda(r * r.stride(1), *others, **named))
    assert not gpu_correctness.any_strides(TINY, by_stride).passed


# torch's own, while it traces an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_compile(subject):
    assert gpu_launches.compiled(TINY, subject) == Verdict(True, "aot_eager: the same bits")


def test_threads():
    """Uses plain torch: the emulator runs one kernel at a time."""
    subject = Subject(torch.device("cpu"), Processors(40), wkv_chunked)
    assert gpu_launches.threads(TINY, subject).passed
    calls = itertools.count()

    def wrong_at_times(**inputs):
        y, final = wkv_chunked(**inputs)
        return (y, final) if next(calls) != 9 else (y + 1, final)

    assert not gpu_launches.threads(TINY, dataclasses.replace(subject, op=wrong_at_times)).passed

    def raises_later(**inputs):
        assert next(calls) < 30, "planted"
        return wkv_chunked(**inputs)

    with pytest.raises(AssertionError, match="planted"):
        gpu_launches.threads(TINY, dataclasses.replace(subject, op=raises_later))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_kernels_auto_does_not_trust_them(subject):
    verdict = gpu_launches.auto_trusts(subject)
    assert verdict.passed is False and "many times slower: CUDA kernels need an NVIDIA GPU" in verdict.text
    assert verdict.text.endswith("chunked, chunked")


def test_the_list_of_checks():
    checks = gpu_check.all_checks()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) and all("\n" not in name for name in names)
    text = "\n".join(names)
    for word in ("bf16", "fp32", "extreme", "slow", "constant", "gate 0.1", "T16384", "T1 ", "N16", "N256", "N60"):
        assert word in text
    assert names[0] == "all kernels compile" and names[-1] == "compute-sanitizer racecheck"


# ---- one process per check ----

CHILD = """
import os, signal, sys, time
for number in sys.argv[2].split(","):
    what = {"0": "pass", "1": "crash", "2": "lose", "3": "hang", "4": "fail", "5": "skip"}[number]
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(100)
    word = {"fail": "FAIL", "lose": "FAIL", "skip": "SKIP"}.get(what, "PASS")
    print("a warning\\n" * (what == "fail") + f"{word} {what}: text", flush=True)
    if what == "lose":
        sys.exit(3)
"""
CHILD_NAMES = ["pass", "crash", "lose", "hang", "fail", "skip"]


def run_children(numbers, seconds=60.0):
    end = time.monotonic() + seconds

    def command(numbers):
        return [sys.executable, "-c", CHILD, "--checks", ",".join(map(str, numbers))]

    return gpu_check.run_in_processes(numbers, CHILD_NAMES, command, lambda: end - time.monotonic())


def test_a_check_that_crashes_or_hangs_fails_alone(monkeypatch, capfd):
    monkeypatch.setattr(gpu_check.lines_of, "__defaults__", (1.5,))
    results = run_children(range(6))
    assert [str(result) for result in results] == [
        "PASS pass: text",
        "FAIL crash: its process ended: signal SIGSEGV",
        "FAIL lose: text",
        "FAIL hang: its process ended: it printed nothing for 1.5 s",
        "FAIL fail: text",
        "SKIP skip: text",
    ]
    assert capfd.readouterr().out.splitlines() == [*map(str, results[:4]), "a warning", *map(str, results[4:])]
    assert gpu_check.exit_code(results) == 1 and gpu_check.exit_code([results[0], results[5]]) == 0
    assert gpu_check.summary(results) == "1 checks passed, 4 failed, 1 were not made"


def test_checks_end_with_the_time(capfd):
    began = time.monotonic()
    results = run_children([0, 3, 4, 5], seconds=1.5)
    assert time.monotonic() - began < 10
    assert [result.word for result in results] == ["PASS", "SKIP", "SKIP", "SKIP"]
    assert {result.text for result in results[2:]} == {"no time was left"}
    assert [result.word for result in run_children([0, 4], seconds=-1.0)] == ["SKIP", "SKIP"]


def test_the_whole_command(monkeypatch, capfd, tmp_path):
    """Pretends to be a machine that reports a GPU, but the benchmark then finds none."""
    monkeypatch.setattr(gpu_check, "check_torch", lambda: None)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_check, "find_facts", lambda commit: {"device": "Some GPU", "commit": commit})
    monkeypatch.setattr(gpu_check, "all_checks", lambda: [Check(name, None) for name in CHILD_NAMES])
    monkeypatch.setattr(gpu_check, "name_is_late", lambda name: name == "pass")
    monkeypatch.setattr(
        gpu_check, "command_of", lambda numbers: [sys.executable, "-c", CHILD, "", ",".join(map(str, numbers))]
    )
    output = tmp_path / "new" / "table.md"
    arguments = ["--output", str(output), "--only", "pass|fail|skip", "--commit", "0123abc"]
    assert gpu_check.main(arguments) == 1
    said = capfd.readouterr().out.splitlines()
    assert said[:3] == ["a warning", "FAIL fail: text", "SKIP skip: text"]
    assert said[3:5] == ["the benchmark ended: exit code 2", "PASS pass: text"]
    assert said[5] == "infctx bench ended: exit code 2"
    assert said[6].startswith("1 checks passed, 1 failed, 1 were not made; ")
    text = output.read_text()
    assert text.startswith("# WKV kernels on Some GPU\n") and "| commit | 0123abc |" in text
    assert text.endswith("| FAIL | fail | text |\n| SKIP | skip | text |\n| PASS | pass | text |\n")
    assert gpu_check.main([*arguments, "--no-speed", "--only", "pass"]) == 0


def test_run_checks_in_this_process(subject, capsys):
    def oops(subject):
        raise ValueError("two\nlines")

    checks = [
        Check("good", lambda subject: Verdict(True, "fine")),
        Check("bad", oops),
        Check("absent", lambda subject: Verdict(None, "not here")),
        Check("wrong", lambda subject: gpu_correctness.accuracy(TINY, broken(subject, "w", lambda x: 2 * x))),
    ]
    assert gpu_check.run_checks(checks, subject) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["PASS good: fine", "FAIL bad: ValueError: two lines", "SKIP absent: not here"]
    assert lines[3].startswith("FAIL wrong: worst dw ") and len(lines) == 4


# ---- results of compiling and of the sanitizer ----


def test_first_use_is_judged():
    used = {"registers": 255, "spill_store_bytes": 0, "spill_load_bytes": 0}
    cold = [[1.9, 2.0, {"wkv_forward": used}], [4.9, 5.5, {"wkv_backward": used}]]
    warm = [[0.0004, 0.005, {}], [0.0003, 0.004, {}]]
    verdict = gpu_launches.judge_first_use(cold, warm)
    assert verdict == Verdict(
        True,
        "forward + backward: empty cache 1.90 + 4.90 s, bar 5 s each; warm 0.4 + 0.3 ms, bar 10 ms each, ready to "
        "launch after 5.0 + 4.0 ms; registers (spilled bytes): wkv_forward 255 (0), wkv_backward 255 (0)",
    )
    assert not gpu_launches.judge_first_use([[5.1, 6, {}]], warm).passed
    assert not gpu_launches.judge_first_use(cold, [[0.011, 1, {}]]).passed
    assert not gpu_launches.judge_first_use([[1, 1, {"a": used | {"spill_load_bytes": 4}}]], warm).passed


def test_the_sanitizer_is_read():
    done = "small run: done\n"
    for clean in ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"):
        assert gpu_launches.judge_sanitizer(f"{done}========= {clean}\n") == Verdict(True, clean)
    for wrong in ("ERROR SUMMARY: 10 errors", "RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)"):
        assert gpu_launches.judge_sanitizer(f"{done}========= {wrong}\n").passed is False
    assert gpu_launches.judge_sanitizer("========= ERROR SUMMARY: 0 errors").passed is False
    assert gpu_launches.judge_sanitizer("========= Error: Device not supported\n") == Verdict(
        None, "did not finish: Error: Device not supported"
    )


def test_the_small_run(capsys):
    gpu_launches.small_run(wkv_chunked, "cpu")
    assert capsys.readouterr().out == "small run: done\n"
    assert find_layout((2, 150, 2, 64), BF16, Processors(108), "backward").spans > 1


# ---- the commands ----


MAKE = ["make", "--silent", "gpu-check"]


@pytest.mark.parametrize(
    "command", [[*MAKE, "VENV=none", f"PYTHON={sys.executable}"], [sys.executable, "tools/gpu/bench_wkv.py"]]
)
def test_without_a_gpu_one_line_says_so(command):
    code, line = refused(command)
    assert code == 2 and "need an NVIDIA GPU" in line


def test_without_torch_one_line_says_so():
    code, line = refused([*MAKE, "VENV=none", f"PYTHON={sys.executable} -S"])
    assert code == 2 and line.startswith("gpu-check needs torch")


def refused(command):
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS"))
    }  # of `make test` above us
    environment = outside | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.stdout == "" and len(lines) == 1, done.stderr
    return done.returncode, lines[0]


def test_torch_is_all_that_is_needed():
    """Hides this project's other dependencies; a machine with a GPU may not have them."""
    others = "numpy numba pydantic yaml lightning deepspeed safetensors tensorboard tqdm psutil pytest zstandard rwkv"
    program = f"""
import sys
import torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others.split()} and name not in sys.modules:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, "tools/gpu")
import gpu_check
assert gpu_check.main([]) == 2
"""
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS"))
    }  # of `make test` above us
    environment = outside | {"CUDA_VISIBLE_DEVICES": ""}
    with contextlib.suppress(KeyError):
        del environment["PYTHONPATH"]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr

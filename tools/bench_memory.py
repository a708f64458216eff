"""Memory and speed of one step by the tokens in its window; each window runs in a separate process.

    python tools/bench_memory.py                               windows of 8k, 64k and 512k tokens
    python tools/bench_memory.py --windows 8192 1048576        others
    python tools/bench_memory.py --tune --windows 4096 65536   tuning the initial state, the weights frozen
    python tools/bench_memory.py --tune --frozen-dtype nf4     the same over weights that are read into 4 bits

Four layers of width 256 (tuning: eight of width 512), bytes, segments of 512, one lane, fp32 on the CPU: forward,
backward, AdamW.  Peak memory is the largest resident set of the whole process; the seams are what the exact gradient
has to keep of a longer window.  With --frozen-dtype it is what reading the weights and the step add to the process,
next to what `infctx plan` says; freed memory then goes back to the system at once, so that only what is needed counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import infctx
import infctx.train.window
from infctx.formats.weights import open_weights, read_model
from infctx.machine import M_MMAP_THRESHOLD, peak_memory
from infctx.model.quantized import quantize_layers
from infctx.model.rwkv import Compute
from infctx.plan.memory import rank_memory, state_bytes, weight_bytes
from infctx.settings.config import Config
from infctx.settings.optimizer import OptimizerSettings
from infctx.train.learn import freeze_weights
from infctx.train.optimizer import make_optimizer

SEGMENT_TOKENS = 512
SIZES: dict[str, Any] = {"version": 6, "num_layers": 4, "width": 256, "vocab_size": 257}
TUNED_SIZES = SIZES | {"num_layers": 8, "width": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8192, 65536, 524288], help="tokens of each window")
    parser.add_argument("--truncated", action="store_true", help="cuts the gradient at every segment instead")
    parser.add_argument("--tune", action="store_true", help="the initial state learns, and nothing else")
    parser.add_argument("--frozen-dtype", choices=("bf16", "int8", "nf4"), help="how --tune keeps the weights")
    parser.add_argument("--layers", type=int, default=8, help="of the model with --frozen-dtype (default %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the same (default %(default)s)")
    parser.add_argument("--version", type=int, default=6, help="of the same (default %(default)s)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.frozen_dtype:
        show_frozen(options)
        return
    if options.one:
        print(json.dumps(one_step(options.one, 1 if options.truncated else None, options.tune)))
        return
    print("| tokens in the window | peak memory | of it seams | beyond the first window and its seams | tokens/s |")
    print("|---:|---:|---:|---:|---:|")
    first = None
    for window in options.windows:
        row = run_apart(window, options.truncated, options.threads, options.tune)
        first = first or row
        expected = first["peak"] - first["seams"] + row["seams"]
        print(
            f"| {window:,} | {row['peak'] / 1e6:,.0f} MB | {row['seams'] / 1e6:,.1f} MB "
            f"| {row['peak'] / expected - 1:+.1%} | {window / row['seconds']:,.0f} |",
            flush=True,
        )


def run_apart(
    window_tokens: int, truncated: bool = False, threads: int | None = None, tune: bool = False
) -> dict[str, float]:
    """One step in a fresh process: peak resident bytes, bytes of the seams, seconds."""
    command = [sys.executable, __file__, "--one", str(window_tokens)] + ["--truncated"] * truncated + ["--tune"] * tune
    command += ["--threads", str(threads)] if threads else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def one_step(window_tokens: int, gradient_segments: int | None, tune: bool) -> dict[str, float]:
    model = infctx.build_model(**(TUNED_SIZES if tune else SIZES))
    if tune:
        freeze_weights(model)
    settings = OptimizerSettings(steps=100, peak_lr=1e-3)
    optimizer = make_optimizer(model, settings)
    tokens = torch.randint(257, (1, window_tokens + 1))
    infctx.window_backward(model, tokens[:, :512], tokens[:, 1:513], SEGMENT_TOKENS)  # loads the compiled kernels
    began = time.perf_counter()
    infctx.window_backward(model, tokens[:, :-1], tokens[:, 1:], SEGMENT_TOKENS, gradient_segments)
    optimizer.step()
    seconds = time.perf_counter() - began
    segments = 1 if gradient_segments else -(-window_tokens // SEGMENT_TOKENS)
    return {"peak": peak_memory(torch.device("cpu")), "seams": segments * state_bytes(model.sizes), "seconds": seconds}


def show_frozen(options: argparse.Namespace) -> None:
    """Prints a row for each window, measured in its own process."""
    if options.one:
        print(json.dumps(frozen_step(options)))
        return
    print("| tokens in the window | weights | the plan | measured | of the plan | tokens/s |")
    print("|---:|---:|---:|---:|---:|---:|")
    for tokens in options.windows:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(tokens)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        weights, plan, peak = (f"{row[name] / 1e6:,.1f} MB" for name in ("weights", "plan", "peak"))
        difference, speed = row["peak"] / row["plan"] - 1, tokens / row["seconds"]
        print(
            f"| {tokens:,} | {weights} | {plan} | {peak} | {difference:+.1%} | {speed:,.0f} |",
            flush=True,
        )


def frozen_step(options: argparse.Namespace) -> dict[str, float]:
    """Reads a model from a file and makes one step; returns bytes that this added to the process, and seconds."""
    setattr(infctx.train.window, "keep_freed_memory", lambda: None)  # noqa: B010  (mypy knows its type)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    sizes = {"version": options.version, "num_layers": options.layers, "width": options.width, "vocab_size": 257}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        infctx.save_weights(infctx.build_model(**sizes), path, torch.bfloat16)
        warm_up = infctx.build_model(**(sizes | {"num_layers": 1, "width": 64}))
        quantize_layers(warm_up, "int8")
        tune_step(warm_up, 2 * SEGMENT_TOKENS)  # loads the compiled kernels
        del warm_up
        before = restart_peak()
        model = read_model(open_weights(path), options.frozen_dtype, "cpu", Compute(torch.float32))
        seconds = tune_step(model, options.one)
    content = {
        "model": {"weights": str(path), "learn": "initial_state", "frozen_dtype": options.frozen_dtype},
        "data": {"store": "none"},
        "window": {"segment_tokens": SEGMENT_TOKENS, "window_tokens": options.one, "lanes": 1},
        "optimizer": {"steps": 100, "peak_lr": 0.1},
        "run": {"folder": "none", "device": "cpu"},
        "distributed": {"strategy": "ddp"},
    }
    config = Config.model_validate(content)
    plan = rank_memory(config, model.sizes, "cpu")
    peak = peak_memory(torch.device("cpu")) - before
    return {"weights": weight_bytes(config, model.sizes), "plan": plan.device, "peak": peak, "seconds": seconds}


def tune_step(model: infctx.RWKV, window_tokens: int) -> float:
    """Makes a step of state tuning; returns the seconds that it took."""
    freeze_weights(model)
    optimizer = make_optimizer(model, OptimizerSettings(steps=100, peak_lr=0.1))
    tokens = torch.randint(257, (1, window_tokens + 1))
    starts = torch.zeros(1, window_tokens // 16, dtype=torch.bool)
    starts[:, 0] = True
    began = time.perf_counter()
    infctx.window_backward(model, tokens[:, :-1], tokens[:, 1:], SEGMENT_TOKENS, starts=starts)
    optimizer.step()
    return time.perf_counter() - began


def restart_peak() -> int:
    """Gives freed memory back, and lets the system count the peak from here on; returns the bytes held now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(torch.device("cpu"))


if __name__ == "__main__":
    main()

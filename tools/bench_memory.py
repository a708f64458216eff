"""Memory and speed of one step by the tokens in its window; each window runs in a separate process.

    python tools/bench_memory.py                               windows of 8k, 64k and 512k tokens
    python tools/bench_memory.py --windows 8192 1048576        others
    python tools/bench_memory.py --tune --windows 4096 65536   tuning the initial state, the weights frozen

Four layers of width 256 (tuning: eight of width 512), bytes, segments of 512, one lane, fp32 on the CPU: forward,
backward, AdamW.  Peak memory is the largest resident set of the whole process; the seams are what the exact gradient
has to keep of a longer window.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

import infctx
from infctx.machine import peak_memory
from infctx.plan.memory import state_bytes
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
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
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


if __name__ == "__main__":
    main()

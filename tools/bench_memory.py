"""Memory and speed of one step by the tokens in its window; each window runs in a separate process.

    python tools/bench_memory.py                               windows of 8k, 64k and 512k tokens
    python tools/bench_memory.py --windows 8192 1048576        others
    python tools/bench_memory.py --tune --windows 4096 65536   tuning the initial state, the weights frozen
    python tools/bench_memory.py --plan model.learn=adapter    a run of two steps with these settings, and its plan

Four layers of width 256 (tuning: eight of width 512), bytes, segments of 512, one lane, fp32 on the CPU: forward,
backward, AdamW.  Peak memory is the largest resident set of the whole process; the seams are what the exact gradient
has to keep of a longer window.

With --plan it is what a run adds to the process, from reading the weights to writing the files of the end, next to what
`infctx plan` says; freed memory then goes back to the system at once, so that only what is needed counts.
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

import numpy as np
import torch

import infctx
import infctx.train.window
from infctx.data.store_writer import TokenStoreWriter
from infctx.formats.weights import read_sizes
from infctx.machine import M_MMAP_THRESHOLD, peak_memory
from infctx.plan.memory import held_memory, rank_memory, state_bytes
from infctx.plan.plan import make_plan
from infctx.settings.config import Config
from infctx.settings.load import load_config
from infctx.settings.optimizer import OptimizerSettings
from infctx.train.learn import freeze_weights
from infctx.train.loop import train
from infctx.train.optimizer import make_optimizer

SEGMENT_TOKENS = 512
SIZES: dict[str, Any] = {"version": 6, "num_layers": 4, "width": 256, "vocab_size": 257}
TUNED_SIZES = SIZES | {"num_layers": 8, "width": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[8192, 65536, 524288], help="tokens of each window")
    parser.add_argument("--truncated", action="store_true", help="cuts the gradient at every segment instead")
    parser.add_argument("--tune", action="store_true", help="the initial state learns, and nothing else")
    parser.add_argument("--plan", nargs="*", metavar="section.setting=value", help="compares a run with its plan")
    parser.add_argument("--layers", type=int, default=8, help="of the model with --plan (default %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the same (default %(default)s)")
    parser.add_argument("--version", type=int, default=6, help="of the same (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=257, help="of the same (default %(default)s)")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.plan is not None:
        show_plan(options)
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


def show_plan(options: argparse.Namespace) -> None:
    """Prints a row for each window, measured in its own process."""
    if options.one:
        print(json.dumps(planned_run(options)), file=sys.__stdout__)
        return
    print("| tokens in the window | held | the plan | measured | of the plan |")
    print("|---:|---:|---:|---:|---:|")
    for tokens in options.windows:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(tokens)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(done.splitlines()[-1])
        held, plan, peak = (f"{row[name] / 1e6:,.1f} MB" for name in ("held", "plan", "peak"))
        print(f"| {tokens:,} | {held} | {plan} | {peak} | {row['peak'] / row['plan'] - 1:+.1%} |", flush=True)


def planned_run(options: argparse.Namespace) -> dict[str, float]:
    """Runs two steps, from the weights' file to the files of the end; returns planned bytes, and those that were added
    to the process."""
    setattr(infctx.train.window, "keep_freed_memory", lambda: None)  # noqa: B010  (mypy knows its type)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"version": options.version, "width": options.width, "vocab_size": options.vocab_size}
        small = sizes | {"num_layers": 1}  # of this width, since libraries make code for the sizes of matrices
        train(_config(folder / "warm-up", small, 2 * SEGMENT_TOKENS, options.plan))
        sizes |= {"num_layers": options.layers}
        config = make_plan(_config(folder / "measured", sizes, options.one, options.plan)).config
        before = restart_peak()
        train(config)
        peak = peak_memory(torch.device("cpu")) - before
        plan = rank_memory(config, read_sizes(folder / "measured.pth"), "cpu")
        held = held_memory(config, read_sizes(folder / "measured.pth"))
    return {"held": sum(held), "plan": sum(plan), "peak": peak}


def _config(folder: Path, sizes: dict[str, Any], window_tokens: int, overrides: list[str]) -> Config:
    """Writes weights and a document, and a configuration of two steps over them; returns it with the overrides."""
    weights, store, path = folder.with_suffix(".pth"), folder.with_suffix(""), folder.with_suffix(".yaml")
    infctx.save_weights(infctx.build_model(**sizes), weights, torch.bfloat16)
    with TokenStoreWriter(store) as writer:
        writer.extend(np.random.default_rng(0).integers(1, 257, 3 * window_tokens).astype(np.uint16))
        writer.end_document()
    content = {
        "model": {"weights": str(weights)},
        "data": {"store": str(store)},
        "window": {"segment_tokens": SEGMENT_TOKENS, "window_tokens": window_tokens, "lanes": 1},
        "optimizer": {"steps": 2, "peak_lr": 1e-3},  # in the second, the moments are there
        "run": {"folder": f"{folder}-run", "device": "cpu", "threads": torch.get_num_threads()},
        "distributed": {"strategy": "ddp"},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_config(path, overrides)


def restart_peak() -> int:
    """Gives freed memory back, and lets the system count the peak from here on; returns the bytes held now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(torch.device("cpu"))


if __name__ == "__main__":
    main()

"""infctx bench"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from pathlib import Path

from infctx.arguments import count, number
from infctx.bench.cases import MODES
from infctx.errors import InputError


def describe(parser: argparse.ArgumentParser) -> None:
    """Measure speed and memory of training on this machine."""
    parser.add_argument("--size", nargs="+", metavar="NAME", default=[], help="published sizes, such as finch-3b")
    parser.add_argument(
        "--version", type=int, nargs="+", choices=(5, 6, 7), default=[6, 7], help="of small models (default 6 7)"
    )
    parser.add_argument("--layers", type=count, default=6, help="of small models (default %(default)s)")
    parser.add_argument("--width", type=count, default=384, help="of small models (default %(default)s)")
    parser.add_argument(
        "--vocab", type=count, nargs="+", default=[256, 65536], help="of small models (default 256 65536)"
    )
    parser.add_argument("--window", type=count, nargs="+", help="tokens in a window (default 2048; on a GPU 16k to 1M)")
    parser.add_argument("--segment-tokens", type=count, help="tokens in a segment (default 512; on a GPU 4096)")
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=MODES,
        help="; ".join(f"{name}: {what}" for name, what in MODES.items()) + " (default truncated exact; GPU: exact)",
    )
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), help="of activations (default fp32; on a GPU bf16)"
    )
    parser.add_argument("--threads", type=count, nargs="+", default=[1], help="of the CPU (default 1)")
    parser.add_argument("--rounds", type=count, default=5, help="steps of each case (default %(default)s)")
    parser.add_argument(
        "--minutes", type=number, default=4, help="no further round starts after this time (default %(default)s)"
    )
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit too, in turn")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.md", help="write the table there, and all numbers next to it as .json"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")


def run(options: argparse.Namespace) -> None:
    from infctx.bench.cases import make_groups
    from infctx.bench.measure import Measured, measure_group
    from infctx.bench.table import as_json, check_output, markdown, write
    from infctx.bench.trees import HERE, tree_of
    from infctx.report.starts import commit_of

    if options.output:
        check_output(options.output)
    groups = make_groups(_choices(options))
    deadline = time.monotonic() + 60 * options.minutes
    with contextlib.ExitStack() as stack:
        trees = [HERE] if options.against is None else [HERE, stack.enter_context(tree_of(options.against))]
        measured: list[list[tuple[Measured, ...]]] = []
        for group in groups:
            if measured and time.monotonic() > deadline:
                break
            case = group[0]
            what = f"{case.model}, vocabulary {case.vocab_size:,}, {case.window_tokens:,} tokens, {case.precision}"
            print(f"measuring {what} ...", file=sys.stderr, flush=True)
            measured.append(measure_group(group, trees, options.rounds, deadline))
    if len(measured) < len(groups):
        left = f"{len(groups) - len(measured)} of {len(groups)} combinations are not measured"
        print(f"{options.minutes:g} minutes are over: {left}; allow more with --minutes", file=sys.stderr)
    if not any(results[0].steps for group in measured for results in group):
        raise InputError(f"bench: nothing could be measured: {measured[0][0][0].problem}")
    command, commit = shlex.join(["infctx", *options.arguments]), commit_of(HERE, digits=None)
    table = markdown(measured, command, commit, options.against)
    print(table, end="")
    if options.output:
        write(options.output, table, as_json(measured, command, commit, options.against))


def _choices(options: argparse.Namespace):  # noqa: ANN202  (the type would load torch)
    """Returns the cases that the options name, with the defaults of the device."""
    from infctx.bench.cases import GPU_SIZES, GPU_WINDOWS, Choices
    from infctx.machine import pick_device

    device = pick_device(options.device).type
    gpu = device == "cuda"
    names = options.size or (GPU_SIZES if gpu else ())
    return Choices(
        names,
        options.version,
        options.layers,
        options.width,
        options.vocab,
        options.window or (GPU_WINDOWS if gpu else (2048,)),
        options.segment_tokens or (4096 if gpu else 512),
        options.mode or (["exact"] if gpu else ["truncated", "exact"]),
        options.precision or (["bf16"] if gpu else ["fp32"]),
        options.threads,
        device,
    )

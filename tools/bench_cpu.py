"""Speed on a CPU, in one thread: segments of training and a plain matrix product, in turn, on the same core.

    python tools/bench_cpu.py                    six layers of width 384, segments of 512, one lane, fp32
    python tools/bench_cpu.py --long             adds 16,384 tokens, exact, at vocabulary 4,096

Figures are CPU seconds (time.process_time), medians over rounds.  Ratios are computed round by round, so that they hold
while the machine's speed drifts.  FLOPs of training count 6 per parameter and token, as usual.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

import infctx
from infctx.machine import peak_memory
from infctx.model.rwkv import RWKV

SEGMENT_TOKENS = 512
SEGMENTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, choices=(5, 6, 7), default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="16,384 tokens at vocabulary 4,096: CPU seconds and memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    share_of_matrix_product(options.version, options.rounds)
    if options.long:
        long_document(options.version)


def share_of_matrix_product(version: int, rounds: int) -> None:
    """Prints truncated and exact training next to the matrix product of the channel mix."""
    model = make_model(version, vocab_size=256)
    tokens = torch.randint(256, (1, SEGMENTS * SEGMENT_TOKENS + 1))
    flops = 6 * model.sizes.num_parameters * (tokens.shape[1] - 1)

    def train(gradient_segments: int | None) -> None:
        model.zero_grad()
        infctx.window_backward(model, tokens[:, :-1], tokens[:, 1:], SEGMENT_TOKENS, gradient_segments)

    left, right = torch.randn(SEGMENT_TOKENS, 384), torch.randn(384, 1344)
    repeats = 400
    product_flops = repeats * 2 * SEGMENT_TOKENS * 384 * 1344

    def product() -> None:
        for _ in range(repeats):
            left @ right

    rows = []
    for _ in range(rounds + 1):
        before, truncated, exact, after = (
            cpu_seconds(work) for work in (product, lambda: train(1), lambda: train(None), product)
        )
        rows.append(((before + after) / 2 / product_flops, truncated / flops, exact / flops))
    rows = rows[1:]  # the first round compiles and fills the caches
    plain, truncated, exact = (statistics.median(column) for column in zip(*rows, strict=True))
    per_token = flops / (tokens.shape[1] - 1)
    print(f"RWKV-{version}, 6 layers, width 384, segments of {SEGMENT_TOKENS}, fp32, one thread")
    print(f"plain matrix product      {1e-9 / plain:8.1f} GFLOP/CPU-s")
    for name, seconds in (("truncated at each segment", truncated), (f"exact over {SEGMENTS} segments", exact)):
        print(f"{name:<25} {1e-9 / seconds:8.1f} GFLOP/CPU-s  {1 / seconds / per_token:8,.0f} tokens/CPU-s")
    print(f"truncated / product       {statistics.median(row[0] / row[1] for row in rows):8.3f}")
    print(f"exact / truncated (time)  {statistics.median(row[2] / row[1] for row in rows):8.3f}")


def long_document(version: int, num_tokens: int = 16384) -> None:
    """Prints CPU seconds and the largest resident set of one exact step over a long document."""
    model = make_model(version, vocab_size=4096)
    tokens = torch.randint(4096, (1, num_tokens + 1))
    seconds = cpu_seconds(lambda: infctx.window_backward(model, tokens[:, :-1], tokens[:, 1:], SEGMENT_TOKENS))
    largest = peak_memory(torch.device("cpu"))
    print(f"{num_tokens:,} tokens, exact, vocabulary 4,096: {seconds:.1f} CPU-s, peak memory {largest / 1e9:.2f} GB")


def make_model(version: int, vocab_size: int) -> RWKV:
    """Makes new weights, slightly changed so that no matrix is zero."""
    model = infctx.build_model(version=version, num_layers=6, width=384, vocab_size=vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()

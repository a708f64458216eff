"""Speed on a CPU, in one thread: segments of training and a plain matrix product, in turn, on the same core.

    python tools/bench_cpu.py                    six layers of width 384, segments of 512, one lane, fp32
    python tools/bench_cpu.py --version 6 7      two versions in turn
    python tools/bench_cpu.py --precision fp32 bf16 --vocab 65536    two precisions in turn, with a large vocabulary
    python tools/bench_cpu.py --long             adds 16,384 tokens, exact, at vocabulary 4,096

Figures are CPU seconds (time.process_time), medians over rounds.  Ratios are computed round by round, so that they hold
while the machine's speed drifts; quartiles show how much they do.  FLOPs of training count 6 per parameter and token.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import infctx
from infctx.machine import peak_memory
from infctx.model.rwkv import RWKV, Compute

LAYERS, WIDTH = 6, 384
SEGMENT_TOKENS = 512
SEGMENTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, choices=(5, 6, 7), nargs="+", default=[6])
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    parser.add_argument("--vocab", type=int, default=256, help="ids in the vocabulary")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="16,384 tokens at vocabulary 4,096: CPU seconds and memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kinds = itertools.product(options.version, options.precision)
    shares_of_matrix_product([Subject(*kind, options.vocab) for kind in kinds], options.rounds)
    if options.long:
        for version in options.version:
            long_document(version)


def shares_of_matrix_product(subjects: list[Subject], rounds: int) -> None:
    """Prints truncated and exact training, and the WKV op of all layers, next to the channel mix's product in fp32."""
    left, right = torch.randn(SEGMENT_TOKENS, WIDTH), torch.randn(WIDTH, 1344)
    repeats = 400
    product_flops = repeats * 2 * SEGMENT_TOKENS * WIDTH * 1344

    def product() -> None:
        for _ in range(repeats):
            left @ right

    rows: dict[Subject, list[tuple[float, ...]]] = {subject: [] for subject in subjects}
    for _ in range(rounds + 1):
        before = cpu_seconds(product)
        for subject in subjects:
            works = partial(subject.train, 1), partial(subject.train, None), subject.op
            seconds = [cpu_seconds(work) for work in works]
            after = cpu_seconds(product)
            plain, before = (before + after) / 2 / product_flops, after
            rows[subject].append((plain, *(x / subject.flops for x in seconds)))
    for subject in subjects:
        report(subject, rows[subject][1:])  # the first round compiles and fills the caches


def report(subject: Subject, rows: list[tuple[float, ...]]) -> None:
    plain, truncated, exact, _ = (statistics.median(column) for column in zip(*rows, strict=True))
    per_token = subject.flops / (SEGMENTS * SEGMENT_TOKENS)
    sizes = f"{LAYERS} layers, width {WIDTH}, {subject.model.sizes.vocab_size:,} ids, segments of {SEGMENT_TOKENS}"
    print(f"RWKV-{subject.version}, {sizes}, {subject.precision}, one thread")
    print(f"plain product, in fp32    {1e-9 / plain:8.1f} GFLOP/CPU-s")
    for name, seconds in (("truncated at each segment", truncated), (f"exact over {SEGMENTS} segments", exact)):
        print(f"{name:<25} {1e-9 / seconds:8.1f} GFLOP/CPU-s  {1 / seconds / per_token:8,.0f} tokens/CPU-s")
    for name, one, other in (
        ("truncated / product", 0, 1),
        ("exact / truncated (time)", 2, 1),
        ("op / truncated (time)", 3, 1),
    ):
        ratios = sorted(row[one] / row[other] for row in rows)
        quarter = len(ratios) // 4
        print(f"{name:<25} {statistics.median(ratios):8.3f}  ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})")


class Subject:
    """A model of one version, tokens for it, and inputs of its WKV op."""

    def __init__(self, version: int, precision: str = "fp32", vocab_size: int = 256) -> None:
        self.version, self.precision, self.model = version, precision, make_model(version, vocab_size)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model.compute = Compute(dtype)
        self.tokens = torch.randint(vocab_size, (1, SEGMENTS * SEGMENT_TOKENS + 1))
        self.flops = 6 * self.model.sizes.num_parameters * SEGMENTS * SEGMENT_TOKENS
        heads, size = self.model.sizes.num_heads, self.model.sizes.head_size
        r, k, v, w, direction, self.gradient = torch.randn(6, 1, SEGMENT_TOKENS, heads, size)
        w, kappa = -0.6 * torch.sigmoid(w), torch.nn.functional.normalize(direction, dim=-1)
        self.inputs = [r, w, k, v, -kappa, kappa * torch.sigmoid(r)] if version == 7 else [r, k, v, w, r[0, 0].clone()]
        decay = 1 if version == 7 else 3  # in fp32 either way
        inputs = (x.clone() if n == decay else x.to(dtype, copy=True) for n, x in enumerate(self.inputs))
        self.inputs, self.gradient = [x.requires_grad_() for x in inputs], self.gradient.to(dtype)
        self.state = torch.zeros(1, heads, size, size)

    def train(self, gradient_segments: int | None) -> None:
        self.model.zero_grad()
        tokens, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        infctx.window_backward(self.model, tokens, targets, SEGMENT_TOKENS, gradient_segments)

    def op(self) -> None:
        """Runs the op forward and backward as often as a truncated step does."""
        op: Callable[..., tuple[torch.Tensor, torch.Tensor]] = infctx.wkv7 if self.version == 7 else infctx.wkv
        for _ in range(SEGMENTS * LAYERS):
            torch.autograd.grad(op(*self.inputs, self.state)[0], self.inputs, self.gradient)


def long_document(version: int, num_tokens: int = 16384) -> None:
    """Prints CPU seconds and the largest resident set of one exact step over a long document."""
    model = make_model(version, vocab_size=4096)
    tokens = torch.randint(4096, (1, num_tokens + 1))
    seconds = cpu_seconds(lambda: infctx.window_backward(model, tokens[:, :-1], tokens[:, 1:], SEGMENT_TOKENS))
    largest = peak_memory(torch.device("cpu"))
    print(f"{num_tokens:,} tokens, exact, vocabulary 4,096: {seconds:.1f} CPU-s, peak memory {largest / 1e9:.2f} GB")


def make_model(version: int, vocab_size: int) -> RWKV:
    """Makes new weights, slightly changed so that no matrix is zero."""
    model = infctx.build_model(version=version, num_layers=LAYERS, width=WIDTH, vocab_size=vocab_size)
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

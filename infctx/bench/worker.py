"""A process that measures one case: prepares it, then makes a step whenever it reads a line.

`measure` starts it by its path, with the infctx to measure on PYTHONPATH, which may be that of another commit.  So it
uses what commits have had for long, and nothing of this folder.

In:  the case as JSON, in its one argument; then a line for each step
Out: a line of JSON when it is ready; one for each step; or one with "error", its last
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, where Python put it; its names are not those of modules

import torch

from infctx.errors import InputError
from infctx.ops.wkv import wkv, wkv7
from infctx.train.window import window_backward

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK = 16
PRODUCT_SECONDS = 0.05
"""How long the matrix product next to each step takes at least."""


def main() -> None:
    """Answers until its input ends."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    try:
        subject = Subject(case)
        subject.run_short()  # compiles kernels
        product = Product(case, subject.model.sizes.width)
        answer({"num_parameters": subject.model.sizes.num_parameters, "torch": torch.__version__})
        for _ in sys.stdin:
            before = product.seconds_per_flop()
            seconds, work_seconds = subject.timed()
            after = product.seconds_per_flop()
            step = {"seconds": seconds, "work_seconds": work_seconds, "flops": subject.flops, "peak": subject.peak()}
            answer(step | {"product_seconds_per_flop": (before + after) / 2})
    except (torch.cuda.OutOfMemoryError, MemoryError):
        answer({"error": "out of memory"})
    except (ImportError, AttributeError, TypeError, InputError) as error:
        answer({"error": f"not there in this infctx: {error}".splitlines()[0]})


def answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


class Subject:
    """A model with new weights, and random tokens."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.device = case, torch.device(case["device"])
        torch.manual_seed(0)
        self.model = make_model(case)
        sizes = self.model.sizes
        self.tokens = torch.randint(sizes.vocab_size, (1, case["window_tokens"] + 1)).to(self.device)
        self.op = WkvOp(case, sizes) if case["mode"] == "op" else None
        # 2 FLOPs for each weight and token forward, 2 for the gradient of the inputs, 2 for that of the weights.  What
        # the exact gradient computes twice does not count, nor do the op and the embedding, a mere lookup.
        weights = sizes.num_parameters - sizes.vocab_size * sizes.width
        self.flops = {"op": 0, "tune": 4, "adapter": 4}.get(case["mode"], 6) * weights * case["window_tokens"]

    def run_short(self) -> None:
        self._train(2 * self.case["segment_tokens"])

    def timed(self) -> tuple[float, float]:
        """Makes a step; returns the seconds of the clock, and those of the processor: a GPU's clock, a CPU's cores."""
        synchronize(self.device)
        began, began_work = time.perf_counter(), work_clock(self.device)
        self._train(self.case["window_tokens"])
        synchronize(self.device)
        return time.perf_counter() - began, work_clock(self.device) - began_work

    def peak(self) -> int:
        from infctx.machine import peak_memory

        return peak_memory(self.device)

    def _train(self, num_tokens: int) -> None:
        if self.op:
            self.op.run(num_tokens)
            return
        self.model.zero_grad()
        tokens = self.tokens[:, : num_tokens + 1]
        reach = 1 if self.case["mode"] == "truncated" else None
        window_backward(self.model, tokens[:, :-1], tokens[:, 1:], self.case["segment_tokens"], reach)


class WkvOp:
    """The inputs of the WKV op for a segment, of one layer; decays are fp32, the rest is of the case's precision."""

    def __init__(self, case: dict[str, Any], sizes: Any) -> None:
        heads, size, segment_tokens = sizes.num_heads, sizes.head_size, case["segment_tokens"]
        self.segment_tokens, self.layers = segment_tokens, sizes.num_layers
        self.run_op: Callable[..., Any] = wkv7 if sizes.version == 7 else wkv
        r, k, v, w, direction, self.gradient = torch.randn(6, 1, segment_tokens, heads, size)
        w, kappa = -0.6 * torch.sigmoid(w), torch.nn.functional.normalize(direction, dim=-1)
        inputs = [r, w, k, v, -kappa, kappa * torch.sigmoid(r)] if sizes.version == 7 else [r, k, v, w, r[0, 0].clone()]
        dtypes = [torch.float32 if x is w else DTYPES[case["precision"]] for x in inputs]
        self.inputs = [
            x.to(case["device"], dtype, copy=True).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)
        ]
        self.gradient = self.gradient.to(self.inputs[0])
        self.state = torch.zeros(1, heads, size, size, device=case["device"])

    def run(self, num_tokens: int) -> None:
        """Runs it forward and backward as often as a truncated step over these tokens does."""
        for _ in range(self.layers * -(-num_tokens // self.segment_tokens)):
            torch.autograd.grad(self.run_op(*self.inputs, self.state)[0], self.inputs, self.gradient)


class Product:
    """A plain matrix product, as large as those of a segment's channel mix."""

    def __init__(self, case: dict[str, Any], width: int) -> None:
        self.device, dtype = torch.device(case["device"]), DTYPES[case["precision"]]
        self.left = torch.randn(case["segment_tokens"], width).to(self.device, dtype)
        self.right = torch.randn(width, 4 * width).to(self.device, dtype)
        self.repeats = 1
        while self._seconds() < PRODUCT_SECONDS:
            self.repeats *= 2

    def seconds_per_flop(self) -> float:
        rows, width = self.left.shape
        return self._seconds() / (2 * rows * width * self.right.shape[1] * self.repeats)

    def _seconds(self) -> float:
        synchronize(self.device)
        began = work_clock(self.device)
        for _ in range(self.repeats):
            self.left @ self.right
        synchronize(self.device)
        return work_clock(self.device) - began


def work_clock(device: torch.device) -> float:
    """Returns seconds: of the processor's cores, which other programs do not disturb; for a GPU, of the clock."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_model(case: dict[str, Any]) -> Any:
    """Makes new weights, slightly changed so that no matrix is zero, and sets what learns."""
    from infctx.model.build import new_model
    from infctx.model.rwkv import Compute
    from infctx.model.sizes import make_sizes, published_sizes

    name = case["sizes"].get("name")
    sizes = published_sizes(name) if name else make_sizes(**case["sizes"])
    dtype, frozen = DTYPES[case["precision"]], case["mode"] in ("tune", "adapter")
    compute = Compute(dtype=dtype, recompute_blocks=case["recompute_blocks"])
    model = new_model(sizes, case["device"], dtype if frozen else torch.float32, 0, compute)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    if case["mode"] == "tune":
        from infctx.train.learn import freeze_weights

        freeze_weights(model)
    elif case["mode"] == "adapter":
        from infctx.adapters.install import add_adapters
        from infctx.settings.adapter import AdapterSettings

        add_adapters(model, AdapterSettings(rank=RANK), seed=0)
    return model


if __name__ == "__main__":
    main()

"""The CUDA kernels of WKV on the CPU: within `emulated(...)`, `wkv_cuda` runs its ops on the emulator."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infctx.cuda import wkv7_cuda, wkv_cuda
from infctx.cuda.wkv_layout import Layout, cut
from infctx.ops import wkv

from emulator.emulator import Argument, Emulation, build
from wkv_inputs import random_inputs

NAMES = ("r", "k", "v", "w", "u", "state")
NAMES_7 = ("r", "w", "k", "v", "a", "b", "state")
DTYPES = [torch.float32, torch.bfloat16]
FP32_BAR = 2e-6  # relative RMS of fp32 arithmetic; ours is 3e-7
SOURCES = Path(wkv_cuda.__file__).parent

_machine: list[wkv_cuda.Machine] = []
_library = torch.library.Library("infctx", "IMPL")
_library.impl("wkv_forward", lambda *inputs: wkv_cuda.forward(_machine[-1], *inputs), "CPU")
_library.impl("wkv_backward", lambda *inputs: wkv_cuda.backward(_machine[-1], *inputs), "CPU")
_library.impl("wkv7_forward", lambda *inputs: wkv7_cuda.forward7(_machine[-1], *inputs), "CPU")
_library.impl("wkv7_backward", lambda *inputs: wkv7_cuda.backward7(_machine[-1], *inputs), "CPU")


@contextlib.contextmanager
def emulated(
    processors: int = 1,
    order: str = "forward",
    sanitize: bool = False,
    source_folder: Path = SOURCES,
    cache: Path | None = None,
    arguments: dict[str, Sequence[Argument]] | None = None,
    tf32: str = "cut off",
) -> Iterator[list[str]]:
    """A context in which `wkv_cuda` runs on the emulator; yields the names of the kernels that were launched.

    Time is cut into as many spans as give each of the `processors` a block of threads; `order` is the emulator's order
    of threads, `tf32` its model of an operand.  Kernels may come from another folder, with another cache.  `arguments`
    collects each kernel's last arguments.  `infctx.wkv` accepts the backend cuda on a CPU inside."""
    launched: list[str] = []

    def load(file_name: str, options: tuple[str, ...]) -> _Launcher:
        defines = [option.removeprefix("-D") for option in options]
        emulation = build(source_folder / file_name, defines, (source_folder,), sanitize, cache)
        return _Launcher(emulation, order, tf32, launched, {} if arguments is None else arguments)

    def layout(shape: tuple[int, ...], dtype: torch.dtype, direction: str) -> Layout:
        return cut(shape, dtype, max(1, processors // max(1, shape[0] * shape[2])))

    _machine.append(wkv_cuda.Machine(load, layout))
    wkv.ONLY_ON["cuda"] = "cpu"
    try:
        yield launched
    finally:
        _machine.pop()
        wkv.ONLY_ON["cuda"] = "cpu" if _machine else "cuda"
        wkv.pick_backend.cache_clear()


@dataclass
class _Launcher:
    emulation: Emulation
    order: str
    tf32: str
    launched: list[str]
    arguments: dict[str, Sequence[Argument]]

    def launch(self, name, grid, block, shared_bytes=0, arguments=()):
        self.launched.append(name)
        self.arguments[name] = arguments
        self.emulation.launch(name, grid, block, shared_bytes, arguments, self.order, tf32=self.tf32)


def values_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    starts: Tensor | None,
    cotangents: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Returns y, S_T, and the gradients of all inputs under both outputs' cotangents; `initial` may be left out.

    Inputs with an a are those of RWKV-7."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    initial = leaves.get("initial")
    y, state = op(*(leaves[name] for name in names_of(inputs)), starts, initial)
    torch.autograd.backward((y, state), (cotangents[0].to(y.dtype), cotangents[1].to(state.dtype)))
    zeros = {name: torch.zeros_like(x) for name, x in leaves.items() if x.grad is None}
    gradients = {f"d{name}": zeros.get(name, x.grad) for name, x in leaves.items()}
    return {"y": y.detach(), "S_T": state.detach()} | gradients


def names_of(inputs: dict[str, Tensor]) -> tuple[str, ...]:
    return NAMES_7 if "a" in inputs else NAMES


def make_inputs(
    seed: int, dtype: torch.dtype, shape: Sequence[int], decay: str | float = "ordinary", op: str = "wkv"
) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Returns `random_inputs` with r, k, v, a, b and the cotangent of y in `dtype`, everything else in fp32."""
    known = decay if decay in ("ordinary", "extreme") else "ordinary"
    inputs, starts, cotangents = random_inputs(seed, known, torch.float32, shape, op)
    if decay == "slow":
        inputs["w"] = inputs["w"] * math.exp(-5)  # -exp(z - 7)
    elif isinstance(decay, float):
        inputs["w"] = torch.full_like(inputs["w"], decay)
    for name in {"r", "k", "v", "a", "b"} & inputs.keys():
        inputs[name] = inputs[name].to(dtype)
    return inputs, starts, [cotangents[0].to(dtype), cotangents[1]]


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

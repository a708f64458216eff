"""The CUDA kernels of WKV on the CPU: within `emulated(...)`, `wkv_cuda` runs its ops on the emulator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from infctx.cuda import wkv_cuda
from infctx.model import wkv

from emulator.emulator import Emulation, build

SOURCES = Path(wkv_cuda.__file__).parent

_machine: list[wkv_cuda.Machine] = []
_library = torch.library.Library("infctx", "IMPL")
_library.impl("wkv_forward", lambda *inputs: wkv_cuda.forward(_machine[-1], *inputs), "CPU")
_library.impl("wkv_backward", lambda *inputs: wkv_cuda.backward(_machine[-1], *inputs), "CPU")


@contextlib.contextmanager
def emulated(
    processors: int = 1, order: str = "forward", sanitize: bool = False, source_folder: Path = SOURCES
) -> Iterator[list[str]]:
    """Runs `wkv_cuda` on a machine of so many processors (which decides into how many spans time is cut), with threads
    in one of the emulator's orders; yields the names of the kernels that were launched.  `infctx.wkv` takes the backend
    cuda on a CPU as long as this lasts."""
    launched: list[str] = []

    def load(file_name: str, options: tuple[str, ...]) -> _Launcher:
        defines = [option.removeprefix("-D") for option in options]
        source = source_folder / file_name
        return _Launcher(build(source, defines, include=(source_folder,), sanitize=sanitize), order, launched)

    _machine.append(wkv_cuda.Machine(load, processors))
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
    launched: list[str]

    def launch(self, name, grid, block, shared_bytes=0, arguments=()):
        self.launched.append(name)
        self.emulation.launch(name, grid, block, shared_bytes, arguments, self.order)

"""Runs the kernels of a .cu file on the CPU: g++ compiles the same source, with one fiber for each CUDA thread.

    emulation = build("infctx/cuda/wkv_forward.cu")
    emulation.launch("wkv_forward", grid=(heads, lanes), block=128, shared_bytes=49152, arguments=(r, k, y, tokens))

Arguments are those of cuLaunchKernel: CPU tensors for pointers (any strides; the kernel writes into them), ints and
floats for the rest, None for a null pointer.  The kernel sees copies, laid out as CUDA would (storages at multiples of
512 bytes) between guard zones of NaN.  Every problem is an `EmulatorError`.

`order` is the order of threads between two rendezvous: a kernel is correct if all orders agree.  `sanitize` builds with
ASan and UBSan, about twenty times slower: they report the line of an access outside a buffer or shared memory.

It cannot show weak memory ordering (here every warp primitive makes all writes visible, on a GPU only barriers do),
bank conflicts, registers and spills, bugs of the GPU's compiler, or blocks that wait for each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

HERE = Path(__file__).resolve().parent
PRIMITIVES = HERE.parents[2] / "infctx" / "cuda"

ORDERS = ("forward", "reverse", "random")

TF32 = ("cut off", "rounded", "one more bit", "all bits")
"""What tensor cores may do with the 13 low bits of a tf32 operand; PTX leaves it open, an H100 cuts them off."""

COMPILER = ("g++", "-std=c++17", "-DINFCTX_EMULATOR", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
COMPILER += ("-fno-gnu-unique", "-U_FORTIFY_SOURCE")
"""Two libraries in a process share no symbol; a longjmp to another stack is meant, which _FORTIFY_SOURCE forbids."""

PLAIN = ("-O2",)
SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZED += ("-fsanitize-sections=emulated_shared",)

GUARD_BYTES = 4096
ALIGNMENT = 512
"""Bytes; torch's allocator on a GPU gives storages at multiples of it."""

Argument = Tensor | int | float | None


class EmulatorError(Exception):
    """A kernel did something that would fail on a GPU, or does not compile."""


def build(
    source: str | Path,
    defines: Iterable[str] = (),
    include: Sequence[str | Path] = (PRIMITIVES,),
    sanitize: bool = False,
    cache: Path | None = None,
) -> Emulation:
    """Compiles `source` unless the cache has it; `defines` are NAME or NAME=value.  Raises EmulatorError."""
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infctx" / "emulator"
    flags = [*(SANITIZED if sanitize else PLAIN), f"-I{HERE}", *(f"-I{Path(folder).resolve()}" for folder in include)]
    flags += [f"-D{define}" for define in defines]
    # In an unnamed namespace nothing clashes with the C library, and variables of templates stay in their section.
    wrapper = f'#include "emulator.h"\nnamespace {{\n#include "{Path(source).resolve()}"\n}}\n'
    text = _compile([*flags, "-D__global__=emulated_kernel", "-E", "-x", "c++", "-"], wrapper)
    names = re.findall(r'extern\s+"C"\s+emulated_kernel\s+void\s+(\w+)\s*\(', text)
    if not names:
        raise EmulatorError(f'{source} has no kernel: extern "C" __global__ void name(...)')
    wrapper += "".join(f'static const emulator::AddKernel add_{name}("{name}", &{name});\n' for name in names)
    content = "\0".join((text, _version(), *COMPILER, *flags))
    runtime = [_runtime_object(file, sanitize, cache) for file in _runtime_files(sanitize)]
    stem = f"{Path(source).stem}-{_digest(content, *(file.name for file in runtime))}"
    # The wrapper is compiled alone: standard input is C++, objects are not.
    code = _cached(cache / f"{stem}.o", lambda out: _compile([*flags, "-c", "-x", "c++", "-", "-o", out], wrapper))
    product = cache / (stem if sanitize else f"{stem}.so")
    link = [*flags, *(() if sanitize else ("-shared", "-Wl,-Bsymbolic")), str(code), *map(str, runtime)]
    _cached(product, lambda out: _compile([*link, "-o", out]))
    return _SanitizedEmulation(product) if sanitize else _PlainEmulation(product)


class Emulation:
    """Compiled kernels: `kernels` maps their names to their parameters, two letters each."""

    kernels: dict[str, str]

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared_bytes: int = 0,
        arguments: Sequence[Argument] = (),
        order: str = "forward",
        seed: int = 0,
        tf32: str = "cut off",
    ) -> None:
        """Runs a kernel to its end; `seed` is for the random order, `tf32` one of TF32.  Raises EmulatorError."""
        if kernel not in self.kernels:
            raise EmulatorError(f"no kernel {kernel}; there are: {', '.join(self.kernels)}")
        parameters = re.findall("..", self.kernels[kernel])
        if len(parameters) != len(arguments):
            raise EmulatorError(f"{kernel} has {len(parameters)} parameters, not {len(arguments)}")
        regions = _regions(argument for argument in arguments if isinstance(argument, Tensor))
        numbers = list(regions)
        places = []
        for position, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
            if isinstance(argument, Tensor):
                _check_tensor(f"{kernel}, argument {position}", parameter, argument)
                storage = argument.untyped_storage().data_ptr()
                places.append((numbers.index(storage), argument.data_ptr() - regions[storage].low))
            else:
                places.append((-1, _bits(f"{kernel}, argument {position}", parameter, argument)))
        launch = _Launch(kernel, _three(grid), _three(block), shared_bytes, order, seed, tf32)
        self._run(launch, [*regions.values()], places)

    def _run(self, launch: _Launch, regions: list[_Region], places: list[tuple[int, int]]) -> None:
        raise NotImplementedError


@dataclass
class _Launch:
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    order: str
    seed: int
    tf32: str


class _PlainEmulation(Emulation):
    """Runs kernels from a library in this process."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._running = threading.Lock()  # there is one device, and autograd may launch from its own threads
        self._library.emulator_kernels.restype = ctypes.c_char_p
        self.kernels = _parse_kernels(self._library.emulator_kernels().decode())

    def _run(self, launch: _Launch, regions: list[_Region], places: list[tuple[int, int]]) -> None:
        lent = [region.lend() for region in regions]
        values = [ctypes.c_uint64(x if buffer < 0 else lent[buffer].address + x) for buffer, x in places]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        message = ctypes.create_string_buffer(4096)
        grid, block = (ctypes.c_uint * 3)(*launch.grid), (ctypes.c_uint * 3)(*launch.block)
        order, seed = ORDERS.index(launch.order), ctypes.c_ulonglong(launch.seed)
        tf32 = TF32.index(launch.tf32)
        shared, room = ctypes.c_size_t(launch.shared_bytes), ctypes.c_size_t(len(message))
        with self._running:
            failed = self._library.emulator_launch(
                launch.kernel.encode(), grid, block, shared, pointers, order, seed, tf32, message, room
            )
        if failed:
            raise EmulatorError(message.value.decode())
        for number, (region, copy) in enumerate(zip(regions, lent, strict=True)):
            if (damage := copy.damage()) is not None:
                positions = [i for i, place in enumerate(places) if place[0] == number]
                raise EmulatorError(
                    f"kernel {launch.kernel}: written out of bounds: byte {damage} of the {region.size} bytes "
                    f"of argument {' or '.join(map(str, positions))}"
                )
            region.take_back(copy.content())


class _SanitizedEmulation(Emulation):
    """Runs kernels in a program that is started for each launch."""

    def __init__(self, program: Path) -> None:
        self._program = program
        listed = subprocess.run([program, "kernels"], capture_output=True, text=True)
        if listed.returncode:
            raise EmulatorError(f"{program} does not start: {listed.stderr}")
        self.kernels = _parse_kernels(listed.stdout)

    def _run(self, launch: _Launch, regions: list[_Region], places: list[tuple[int, int]]) -> None:
        numbers = [*launch.grid, *launch.block, launch.shared_bytes, ORDERS.index(launch.order), launch.seed]
        numbers.append(TF32.index(launch.tf32))
        lines = [" ".join(map(str, (launch.kernel, *numbers, len(regions), len(places))))]
        lines += [f"{region.offset} {region.size}" for region in regions]
        lines += [f"{buffer} {x}" for buffer, x in places]
        request = "\n".join(lines).encode() + b"\n" + b"".join(region.content() for region in regions)
        done = subprocess.run([self._program], input=request, capture_output=True)
        if done.returncode:
            raise EmulatorError(_summary(done.stderr.decode(errors="replace")))
        start = 0
        for region in regions:
            region.take_back(done.stdout[start : start + region.size])
            start += region.size


@dataclass
class _Region:
    """The range of bytes of a storage that the tensors of a call cover."""

    storage: int
    low: int
    high: int

    @property
    def size(self) -> int:
        return self.high - self.low

    @property
    def offset(self) -> int:
        return (self.low - self.storage) % ALIGNMENT

    def content(self) -> bytes:
        return ctypes.string_at(self.low, self.size) if self.size else b""

    def take_back(self, content: bytes) -> None:
        ctypes.memmove(self.low, content, self.size)

    def lend(self) -> _Lent:
        memory = np.full(2 * GUARD_BYTES + self.size + 2 * ALIGNMENT, 0xFF, dtype=np.uint8)
        start = GUARD_BYTES + (self.offset - memory.ctypes.data - GUARD_BYTES) % ALIGNMENT
        memory[start : start + self.size] = np.frombuffer(self.content(), dtype=np.uint8)
        return _Lent(memory, start, self.size)


@dataclass
class _Lent:
    """A copy of a region with NaN before and after it."""

    memory: np.ndarray
    start: int
    size: int

    @property
    def address(self) -> int:
        return self.memory.ctypes.data + self.start

    def content(self) -> bytes:
        return self.memory[self.start : self.start + self.size].tobytes()

    def damage(self) -> int | None:
        """Returns the first byte outside that was written, counted from the region's start."""
        outside = self.memory != 0xFF
        outside[self.start : self.start + self.size] = False
        return int(outside.argmax()) - self.start if outside.any() else None


def _regions(tensors: Iterable[Tensor]) -> dict[int, _Region]:
    """Returns regions by storage address, so that views of one tensor stay views of one."""
    regions: dict[int, _Region] = {}
    for x in tensors:
        storage, low = x.untyped_storage().data_ptr(), x.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        region = regions.setdefault(storage, _Region(storage, low, low))
        region.low = min(region.low, low)
        region.high = max(region.high, low + (reach * x.element_size() if x.numel() else 0))
    return regions


def _check_tensor(what: str, parameter: str, x: Tensor) -> None:
    if parameter[0] != "p":
        raise EmulatorError(f"{what}: a tensor for a parameter that is no pointer")
    if x.device.type != "cpu":
        raise EmulatorError(f"{what}: the tensor is on {x.device}")
    if parameter[1] not in ("0", str(x.element_size())):
        raise EmulatorError(f"{what}: elements of {x.dtype} for a pointer to elements of {parameter[1]} bytes")


def _bits(what: str, parameter: str, value: int | float | None) -> int:
    """Returns a number in its parameter's type, as the first of 8 bytes."""
    kind, size = parameter[0], int(parameter[1])
    if kind == "p" and value is None:
        return 0
    if kind == "i" and isinstance(value, int):
        if not -(2 ** (8 * size - 1)) <= value < 2 ** (8 * size):
            raise EmulatorError(f"{what}: {value} does not go into {size} bytes")
        return value % 2 ** (8 * size)
    if kind == "f" and isinstance(value, (int, float)):
        return int.from_bytes(np.array(value, dtype=f"<f{size}").tobytes(), "little")
    raise EmulatorError(
        f"{what}: {value!r} for a parameter that is {dict(p='a pointer', i='an integer', f='a float')[kind]}"
    )


def _three(sizes: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return sizes + (1,) * (3 - len(sizes))


def _parse_kernels(lines: str) -> dict[str, str]:
    return {name: parameters for name, _, parameters in (line.partition(" ") for line in lines.splitlines())}


def _summary(errors: str) -> str:
    """Shortens a sanitizer's report: the fault, its line in the kernel's source, the memory, the thread."""
    patterns: tuple[str, ...] = ()
    if "runtime error:" in errors:
        patterns = (r"(\S+: runtime error: .*)",)
    elif "ERROR: AddressSanitizer" in errors:
        kernel_line = r"\s((?!\S*primitives\.cuh)\S+\.cuh?:\d+)"
        beside = r"(is located \d+ bytes (?!inside).*region)"
        patterns = (r"ERROR: (AddressSanitizer: [\w-]+)", r"^((?:READ|WRITE) of size \d+)", kernel_line, beside)
    found = [match[1] for pattern in patterns if (match := re.search(pattern, errors, re.MULTILINE))]
    found += re.findall(r"^EMULATOR: (.*)$", errors, re.MULTILINE)
    return "; ".join(found) or f"the sanitized program failed: {errors[-2000:]}"


# ---- compilation ----


def _runtime_files(sanitize: bool) -> list[Path]:
    names = ["emulator.cpp", "device.cpp", *(["program.cpp"] if sanitize else [])]
    return [HERE / name for name in names]


def _runtime_object(file: Path, sanitize: bool, cache: Path) -> Path:
    flags = [*(SANITIZED if sanitize else PLAIN), f"-I{HERE}"]
    if not sanitize:
        flags.append("-O3")  # it vectorizes the loops of the matrix products
    content = [file.read_text() for file in (HERE / "emulator.h", HERE / "inside.h", file)]
    out = cache / f"{file.stem}-{_digest(*content, _version(), *COMPILER, *flags)}.o"
    return _cached(out, lambda out: _compile([*flags, "-c", str(file), "-o", out]))


def _cached(file: Path, make: Callable[[str], object]) -> Path:
    """Makes `file` under another name and then renames it, so that two processes can do this at the same time."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            make(str(made))
            made.replace(file)
    return file


def _compile(arguments: Sequence[str], text: str | None = None) -> str:
    try:
        done = subprocess.run([*COMPILER, *arguments], input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise EmulatorError("the emulator compiles with g++, which is not on the PATH") from None
    if done.returncode:
        raise EmulatorError(f"g++ failed:\n{done.stderr[:8000]}")
    return done.stdout


@functools.cache
def _version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]

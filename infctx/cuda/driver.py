"""Loads the kernels of a .cu file and launches them on torch's streams, through the CUDA driver by ctypes.

    kernels = load_kernels("wkv_forward.cu", r.device, ("-DHEAD_SIZE=64",))
    kernels.launch("wkv_forward", (heads, lanes), 128, shared_bytes, [r, k, v, y, num_tokens, scale])

Everything that could allocate, wait or compile happens in `load_kernels`, before the first launch, so a launch can be
captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from infctx.cuda.compile import Compiled, KernelsUnavailable, cubin

SOURCE_FOLDER = Path(__file__).parent
# The kernels use bf16 tensor cores and cp.async, which older devices do not have.
OLDEST_CAPABILITY = (8, 0)
# Constants of the driver API, from cuda.h.
SUCCESS = 0
ERROR_INVALID_VALUE = 1
ATTRIBUTE_MAX_DYNAMIC_SHARED_BYTES = 8
ATTRIBUTE_PREFERRED_SHARED_CARVEOUT = 9

Argument = Tensor | int | float | None


class DriverError(RuntimeError):
    """The CUDA driver refused a call, or reports an earlier error on the device; `name` is its CUresult."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass
class Kernel:
    """A kernel on one device, ready to launch."""

    name: str
    device: int
    driver: Driver
    # Driver handles as integers: the kernel, its function in the device's context, and that context.
    handle: int
    function: int
    context: int
    # Dynamic shared memory that a launch may use; grows on demand, up to the device's limit.
    dynamic_shared_bytes: int
    # Size of each parameter; None with drivers older than CUDA 12.4, which do not report it.
    parameter_bytes: tuple[int, ...] | None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


class Kernels(dict[str, Kernel]):
    """The kernels of one source on one device, by name; `compiled` has their resources."""

    def __init__(self, compiled: Compiled, kernels: dict[str, Kernel]) -> None:
        super().__init__(kernels)
        self.compiled = compiled

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared_bytes: int = 0,
        arguments: Sequence[Argument] = (),
    ) -> None:
        """Starts the kernel of that name, see `launch`."""
        launch(self[name], grid, block, shared_bytes, arguments)


def load_kernels(
    file_name: str, device: torch.device | int, options: Sequence[str] = (), folder: Path = SOURCE_FOLDER
) -> Kernels:
    """Returns the kernels of a .cu file on a device: compiled or read from the cache at the first call, then kept.

    file_name: of the source in `folder`; it can include the .cuh files there
    device:    a CUDA device; without an index, the current one
    options:   for NVRTC, such as "-DHEAD_SIZE=64"

    While a CUDA graph is captured, only call it with arguments from an earlier call.  Raises KernelsUnavailable, one
    line with the reason and the remedy, if there is no usable device, driver or compiler.
    """
    index = device if isinstance(device, int) else device.index
    if index is None:
        check_torch()
        index = torch.cuda.current_device()
    return _load(file_name, index, tuple(options), folder)


@functools.cache
def _load(file_name: str, device: int, options: tuple[str, ...], folder: Path) -> Kernels:
    check_torch()
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_CAPABILITY:
        raise KernelsUnavailable(
            "CUDA kernels need a GPU of compute capability 8.0 or newer (Ampere); "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    driver = load_driver()
    headers = {path.name: path.read_text() for path in folder.glob("*.cuh")}
    compiled = cubin((folder / file_name).read_text(), file_name, f"sm_{major}{minor}", options, headers)
    return driver.load(compiled, device)


def check_torch() -> None:
    """Raises KernelsUnavailable if torch has no GPU."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise KernelsUnavailable(
            "CUDA kernels need an NVIDIA GPU, its driver and a CUDA build of torch; "
            f"torch {torch.__version__} finds no such device here"
        )


def launch(
    kernel: Kernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    shared_bytes: int = 0,
    arguments: Sequence[Argument] = (),
) -> None:
    """Starts a kernel on torch's current stream of its device and returns immediately.

    grid, block:  blocks in the grid and threads in a block: x, (x, y) or (x, y, z)
    shared_bytes: dynamic shared memory per block; may exceed the default limit of 48 KB
    arguments:    tensors on the kernel's device as pointers, None as a null pointer, ints as int64, floats as float32

    Works from any thread.  As with any CUDA call, an error on the device may show only at a later call.  Raises
    TypeError or ValueError for arguments that do not fit, DriverError if the driver refuses or reports an error.
    """
    driver = kernel.driver
    parameters = _pack(kernel, arguments)
    sizes = (*_three(grid), *_three(block), shared_bytes)
    # ctypes would cut numbers to 32 bits; the driver checks the rest.
    if min(sizes) < 0 or max(sizes) >= 2**31:
        raise ValueError(f"{kernel.name}: grid {grid}, block {block} or {shared_bytes} shared bytes is out of range")
    stream = torch.cuda.current_stream(kernel.device).cuda_stream
    # A thread that has not yet used this device has another context or none; autograd's threads may start that way.
    # torch.cuda.device would not help: it does nothing for a device that torch considers current.
    previous = driver.current_context()
    if previous != kernel.context:
        driver.call("cuCtxSetCurrent", kernel.context, about=kernel.name)
    try:
        if shared_bytes > kernel.dynamic_shared_bytes:
            _raise_shared_bytes(kernel, shared_bytes)
        result = driver.library.cuLaunchKernel(kernel.function, *sizes, stream, parameters, None)
    finally:
        if previous != kernel.context:
            driver.call("cuCtxSetCurrent", previous, about=kernel.name)
    if result != SUCCESS:
        about = f"{kernel.name}, grid {grid}, block {block}, {shared_bytes} bytes of dynamic shared memory"
        driver.fail("cuLaunchKernel", result, about)


class _ArgumentArrays(threading.local):
    """Buffers for the arguments of a launch, by their count; one set per thread, as backward runs in autograd's."""

    def __init__(self) -> None:
        self.by_count: dict[int, tuple[ctypes.Array, ctypes.Array]] = {}

    def of(self, count: int) -> tuple[ctypes.Array, ctypes.Array]:
        """Returns values of 8 bytes each, and pointers to them for cuLaunchKernel."""
        if count not in self.by_count:
            values = (ctypes.c_uint64 * count)()
            first = ctypes.addressof(values)
            self.by_count[count] = values, (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        return self.by_count[count]


_argument_arrays = _ArgumentArrays()


def _three(sizes: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    assert 1 <= len(sizes) <= 3, f"a grid or block of {len(sizes)} dimensions"
    return sizes + (1,) * (3 - len(sizes))


def _pack(kernel: Kernel, arguments: Sequence[Argument]) -> ctypes.Array:
    """Puts the arguments where cuLaunchKernel reads them; it copies them during the call."""
    formats, sizes = ["<"], []
    values: list[int | float] = []
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            if argument.get_device() != kernel.device:
                raise ValueError(
                    f"{kernel.name}: argument {position} is on {argument.device}, the kernel on cuda:{kernel.device}"
                )
            formats.append("Q")
            values.append(argument.data_ptr())
            sizes.append(8)
        elif argument is None or isinstance(argument, int):
            formats.append("q")
            values.append(argument or 0)
            sizes.append(8)
        elif isinstance(argument, float):
            formats.append("f4x")
            values.append(argument)
            sizes.append(4)
        else:
            raise TypeError(f"{kernel.name}: argument {position} is neither a tensor nor a number: {argument!r}")
    if kernel.parameter_bytes is not None and tuple(sizes) != kernel.parameter_bytes:
        # The driver would silently read past the values, or half of one.
        raise ValueError(f"{kernel.name}: arguments of {sizes} bytes for parameters of {list(kernel.parameter_bytes)}")
    buffer, pointers = _argument_arrays.of(len(values))
    struct.pack_into("".join(formats), buffer, 0, *values)
    return pointers


def _raise_shared_bytes(kernel: Kernel, shared_bytes: int) -> None:
    """Raises the limit of the kernel and of its function in this context, which is the one that is launched.

    Nothing documents that the function takes over the kernel's limit, though an H100's driver does so.  Shared memory
    also gets all that it can of what it shares with the L1 cache, so that as many blocks fit on a processor as can.
    """
    driver = kernel.driver
    wanted = ((ATTRIBUTE_MAX_DYNAMIC_SHARED_BYTES, shared_bytes), (ATTRIBUTE_PREFERRED_SHARED_CARVEOUT, 100))
    about = f"{kernel.name}, {shared_bytes} bytes of dynamic shared memory"
    # The lock keeps a thread that needs less from lowering the limit that another has just raised.
    with kernel.lock:
        if shared_bytes > kernel.dynamic_shared_bytes:
            device = driver.device(kernel.device)
            for number, value in wanted:
                driver.call("cuKernelSetAttribute", number, value, kernel.handle, device, about=about)
                driver.call("cuFuncSetAttribute", kernel.function, number, value, about=about)
            kernel.dynamic_shared_bytes = shared_bytes


class Driver:
    """The CUDA driver's library by ctypes: calls that raise, and loading of machine code.

    path: of the library; the loader finds libcuda.so.1 wherever a driver is installed
    """

    def __init__(self, path: str = "libcuda.so.1") -> None:
        try:
            self.library = ctypes.CDLL(path)
        except OSError as error:
            raise KernelsUnavailable(
                f"CUDA kernels need NVIDIA's driver, and its library cannot be loaded ({error}); install the driver, "
                "or start the container with its GPUs"
            ) from None
        pointer, number, unsigned, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p
        signatures = {
            "cuInit": [unsigned],
            "cuDriverGetVersion": [pointer],
            "cuGetErrorName": [number, pointer],
            "cuGetErrorString": [number, pointer],
            "cuDeviceGet": [pointer, number],
            "cuDevicePrimaryCtxRetain": [pointer, number],
            "cuCtxGetCurrent": [pointer],
            "cuCtxSetCurrent": [pointer],
            "cuLibraryLoadData": [pointer, text, pointer, pointer, unsigned, pointer, pointer, unsigned],
            "cuLibraryGetKernel": [pointer, pointer, text],
            "cuKernelGetFunction": [pointer, pointer],
            "cuKernelGetAttribute": [pointer, number, pointer, number],
            "cuKernelSetAttribute": [number, number, pointer, number],
            "cuFuncSetAttribute": [pointer, number, number],
            "cuLaunchKernel": [pointer, *[unsigned] * 7, pointer, pointer, pointer],
        }
        try:
            for name, types in signatures.items():
                getattr(self.library, name).argtypes = types
        except AttributeError:
            raise KernelsUnavailable(
                f"CUDA kernels need a driver of CUDA 12.0 (525.60) or newer; this one has no {name}"
            ) from None
        self.call("cuInit", 0)

    def load(self, compiled: Compiled, device: int) -> Kernels:
        """Loads machine code onto a device, in torch's context; raises KernelsUnavailable if the code does not fit it.

        The code stays until the process ends.
        """
        # torch uses the primary context and never releases it, so neither do we.
        context = self.fetch("cuDevicePrimaryCtxRetain", self.device(device), about=f"cuda:{device}")
        previous = self.current_context()
        self.call("cuCtxSetCurrent", context)
        try:
            library = self._load_library(compiled)
            return Kernels(
                compiled,
                {name: self._load_kernel(library, name, device, context) for name in compiled.resources},
            )
        finally:
            self.call("cuCtxSetCurrent", previous)

    def _load_library(self, compiled: Compiled) -> int:
        no_options = (None, None, 0, None, None, 0)
        try:
            return self.fetch("cuLibraryLoadData", compiled.cubin, *no_options, about=compiled.name)
        except DriverError as error:
            version = self.fetch("cuDriverGetVersion", kind=ctypes.c_int)
            raise KernelsUnavailable(
                f"{error}; the driver is of CUDA {version // 1000}.{version % 1000 // 10}, and the code was made for "
                f"{compiled.arch} by {compiled.compiler}; update the driver, or install an NVRTC that is no newer"
            ) from None

    def _load_kernel(self, library: int, name: str, device: int, context: int) -> Kernel:
        handle = self.fetch("cuLibraryGetKernel", library, name.encode(), about=name)
        # With lazy loading, this moves the code onto the device.  The first launch could do it in the middle of a
        # capture.
        function = self.fetch("cuKernelGetFunction", handle, about=name)
        # The rest of 48 KB after static shared memory, until a launch needs more.
        limit = self.fetch(
            "cuKernelGetAttribute",
            ATTRIBUTE_MAX_DYNAMIC_SHARED_BYTES,
            handle,
            self.device(device),
            about=name,
            kind=ctypes.c_int,
        )
        return Kernel(name, device, self, handle, function, context, limit, self._parameter_bytes(handle))

    def _parameter_bytes(self, handle: int) -> tuple[int, ...] | None:
        if not hasattr(self.library, "cuKernelGetParamInfo"):
            return None
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        sizes: list[int] = []
        query = self.library.cuKernelGetParamInfo
        query.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        while (result := query(handle, len(sizes), ctypes.byref(offset), ctypes.byref(size))) == SUCCESS:
            sizes.append(size.value)
        # Drivers older than CUDA 13 have no count: the first missing position ends the list.
        return tuple(sizes) if result == ERROR_INVALID_VALUE else None

    def device(self, index: int) -> int:
        """Returns the driver's handle of a device; the driver and torch both number the visible devices."""
        return self.fetch("cuDeviceGet", index, about=f"cuda:{index}", kind=ctypes.c_int)

    def current_context(self) -> int | None:
        """Returns this thread's current context; None if there is none."""
        return self._fetch_or_none("cuCtxGetCurrent")

    def call(self, function: str, *arguments: object, about: str = "") -> None:
        """Calls the driver; raises DriverError with the result's name and description."""
        result = getattr(self.library, function)(*arguments)
        if result != SUCCESS:
            self.fail(function, result, about)

    def fetch(self, function: str, *arguments: object, about: str = "", kind: type = ctypes.c_void_p) -> int:
        """Calls the driver; returns the value that it stores in its first argument, which is not among `arguments`."""
        found = self._fetch_or_none(function, *arguments, about=about, kind=kind)
        assert found is not None, f"{function} returned a null pointer"
        return found

    def _fetch_or_none(
        self, function: str, *arguments: object, about: str = "", kind: type = ctypes.c_void_p
    ) -> int | None:
        """Does the same, and returns None for a null pointer."""
        place = kind()
        self.call(function, ctypes.byref(place), *arguments, about=about)
        return place.value

    def fail(self, function: str, result: int, about: str) -> NoReturn:
        """Raises DriverError for an error code of the driver."""
        name, description = ctypes.c_char_p(), ctypes.c_char_p()
        self.library.cuGetErrorName(result, ctypes.byref(name))
        self.library.cuGetErrorString(result, ctypes.byref(description))
        known = (name.value or b"CUresult").decode()
        words = (description.value or b"unknown to this driver").decode()
        raise DriverError(f"{function}{f' ({about})' * bool(about)}: {known} ({result}): {words}", known)


@functools.cache
def load_driver() -> Driver:
    """Loads this machine's driver; raises KernelsUnavailable if there is none."""
    return Driver()

"""CUDA source in, machine code for one architecture out: built by NVRTC at first use, kept in a cache on disk.

NVRTC is the compiler as a library.  Every CUDA build of torch includes it, so no toolkit, host compiler or build system
is needed.  The output is a cubin, never PTX: the driver's compiler refuses PTX of a newer minor version, but just loads
a cubin.

The cache is `$XDG_CACHE_HOME/infctx`, or `~/.cache/infctx`.  A file's name is the SHA-256 of everything that the
kernels are made from, including the compiler.  A hit neither loads NVRTC nor searches for it; `_compiler_in_sight`
explains how the compiler is known anyway.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from infctx.errors import InputError
from infctx.files import atomic_file

# Options of every compilation.  -v makes ptxas report each kernel's resources; the caller chooses the rest.
BASE_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
# NVRTC 12.9 and newer have their own cache if there is a GPU.  A hit there has no log, and so does not list the kernels
# (seen with NVRTC 13.0 on an H100); we turn it off.
OWN_CACHE_SINCE, NO_OWN_CACHE = (12, 9), "--no-cache"
# Goes up by one when the format of a cache file changes.
CACHE_FORMAT = 2
# The wheels with NVRTC: for CUDA 13 and newer, and for CUDA 12.
NVRTC_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
# Other sources: without a wheel, these variables decide which library is found.
NVRTC_PLACES = ("CONDA_PREFIX", "CUDA_PATH", "CUDA_HOME", "LD_LIBRARY_PATH")
NO_HEADERS: Mapping[str, str] = MappingProxyType({})

log = logging.getLogger(__name__)


class KernelsUnavailable(InputError):
    """The CUDA kernels are unavailable on this machine: one line with the reason and the remedy."""


class CompileError(KernelsUnavailable):
    """A source does not compile: one line with the first error; `log` has NVRTC's full output."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Resources:
    """One kernel's resources as ptxas reports them: registers (32 bits each), the rest in bytes; shared memory per
    block, the rest per thread."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """Machine code of all kernels in one source, for one architecture."""

    name: str
    arch: str
    compiler: str
    log: str
    cubin: bytes

    @functools.cached_property
    def resources(self) -> dict[str, Resources]:
        """Each kernel's resources, by its name in the code: plain for `extern "C"` kernels, else mangled."""
        return parse_resources(self.log)


def cubin(
    source: str,
    name: str,
    arch: str,
    options: Sequence[str] = (),
    headers: Mapping[str, str] = NO_HEADERS,
    folder: Path | None = None,
) -> Compiled:
    """Returns the kernels of a source from the cache; if they are not there, compiles them and puts them there.

    Arguments and exceptions are those of `compile_source`; folder: the cache, None for the user's.  A damaged cache
    file is built again.  If the folder cannot be written, a private one in the system's temporary folder replaces
    it, with one line in the log.  Processes that need the same kernels at the same time each build them; the last
    file stays, and nobody ever reads half a file.
    """
    assert Path(name).name == name, f"{name}: a plain file name, please"
    compiler = _compiler_in_sight()
    made_from = [CACHE_FORMAT, compiler, name, arch, [*BASE_OPTIONS, *options], source, sorted(headers.items())]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    file_name = f"{Path(name).stem}-{arch}-{key}"
    folder = folder or _user_folder()
    for place in (folder, _fallback_folder()):
        if place is not None:
            found = _read(place / file_name, name, arch, check_library=not isinstance(compiler, str))
            if found is not None:
                return found
    started = time.perf_counter()
    compiled = compile_source(source, name, arch, options, headers)
    seconds = time.perf_counter() - started
    log.info("%s compiled for %s by %s in %.1f s", name, arch, compiled.compiler, seconds)
    _keep(compiled, file_name, folder)
    return compiled


def compile_source(
    source: str,
    name: str,
    arch: str,
    options: Sequence[str] = (),
    headers: Mapping[str, str] = NO_HEADERS,
) -> Compiled:
    """Compiles CUDA C++ to machine code with NVRTC, without the cache.

    source:  the text of the .cu file
    name:    its file name for error messages
    arch:    such as "sm_90": the code runs on this major version, from this minor version up
    options: more options for NVRTC, such as "--maxrregcount=128"
    headers: name in the #include -> text of that file; no folder is searched

    Raises KernelsUnavailable if there is no NVRTC or it does not know the architecture, CompileError for the source.
    """
    nvrtc = _load_nvrtc()
    compiler = f"NVRTC {'.'.join(map(str, _version(nvrtc)))}"
    known = _known_architectures(nvrtc)
    if arch not in known:
        raise KernelsUnavailable(
            f"{compiler} cannot compile for {arch}, only for {known[0]} to {known[-1]}; "
            f"install one that can: pip install --upgrade {NVRTC_WHEELS[0]}"
        )
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    own_cache = _version(nvrtc) >= OWN_CACHE_SINCE
    words = [f"--gpu-architecture={arch}", *BASE_OPTIONS, *[NO_OWN_CACHE] * own_cache, *options]
    program = ctypes.c_void_p()
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names),
    )
    try:
        encoded = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        result = nvrtc.nvrtcCompileProgram(program, len(words), encoded)
        # a zero byte separates ptxas's part
        said = _fetch(nvrtc, "ProgramLog", program).replace(b"\0", b"\n").decode(errors="replace").strip()
        if result:
            reason = _first_error(said) or nvrtc.nvrtcGetErrorString(result).decode()
            raise CompileError(f"{name} does not compile for {arch} with {compiler}: {reason}", said)
        compiled = Compiled(name, arch, compiler, said, _fetch(nvrtc, "CUBIN", program))
        if not compiled.resources:
            raise CompileError(f"{name}: {compiler} compiled it for {arch} and reports no kernels in it", said)
        return compiled
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def parse_resources(log: str) -> dict[str, Resources]:
    """Reads each kernel's resources from the log of `ptxas -v`.

    Spills and stack of functions that a kernel calls without inlining count as the kernel's: ptxas lists them after
    the kernel.
    """
    sections = re.split(r"Compiling entry function '([^']+)'", log)
    return {name: _parse_section(text) for name, text in zip(sections[1::2], sections[2::2], strict=True)}


def _parse_section(text: str) -> Resources:
    def total(unit: str) -> int:
        return sum(map(int, re.findall(rf"(\d+) {unit}", text)))

    return Resources(
        registers=max(map(int, re.findall(r"Used (\d+) registers", text)), default=0),
        stack_bytes=total("bytes stack frame"),
        spill_store_bytes=total("bytes spill stores"),
        spill_load_bytes=total("bytes spill loads"),
        static_shared_bytes=total("bytes smem"),
    )


def _first_error(said: str) -> str | None:
    """Returns the line to show a person: errors of C++, of ptxas and of options all contain error or fatal."""
    for line in said.splitlines():
        if re.search(r"\b(error|fatal)\s*:", line):
            return line.strip()
    return None


@functools.cache
def _load_nvrtc() -> ctypes.CDLL:
    # Found at first use: importing infctx must not search for compilers.
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        path = load_nvidia_dynamic_lib("nvrtc").abs_path
    except DynamicLibNotFoundError:
        raise KernelsUnavailable(
            "CUDA kernels need the library NVRTC, which is not installed; "
            f"install a CUDA build of torch, which includes it, or: pip install {NVRTC_WHEELS[0]}"
        ) from None
    nvrtc = ctypes.CDLL(path)
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    # Declare pointers as void pointers: ctypes passes a bare int as 32 bits otherwise.
    pointer, count = ctypes.c_void_p, ctypes.c_int
    nvrtc.nvrtcCreateProgram.argtypes = [pointer, ctypes.c_char_p, ctypes.c_char_p, count, pointer, pointer]
    nvrtc.nvrtcCompileProgram.argtypes = [pointer, count, pointer]
    major, minor = _version(nvrtc)
    # NVRTC opens this library by its bare name at the first compilation.  Once loaded, it is found whatever the search
    # path; otherwise nvrtcCompileProgram may fail with NVRTC_ERROR_BUILTIN_OPERATION_FAILURE (7).
    builtins = Path(path).resolve().with_name(f"libnvrtc-builtins.so.{major}.{minor}")
    if builtins.exists():
        ctypes.CDLL(str(builtins))
    return nvrtc


def _version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _known_architectures(nvrtc: ctypes.CDLL) -> list[str]:
    count = ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(numbers))
    return [f"sm_{number}" for number in numbers]


def _fetch(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, data))
    return data.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result).decode()}")


def _compiler_in_sight() -> str | list[str | None]:
    """Identifies the NVRTC that would be loaded, without loading or searching for it, for the cache key.

    Usually it comes from a wheel, and the versions of the installed wheels identify it on any machine.  (With two
    wheels only one is loaded; naming both costs at worst one extra compilation.)  Otherwise it comes from conda or a
    toolkit, and the search paths identify it.  They do not show its version, so a cache file is then valid only while
    the library that built it is unchanged.
    """
    versions = []
    for wheel in NVRTC_WHEELS:
        try:
            versions.append(f"{wheel} {importlib.metadata.version(wheel)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if versions:
        return ", ".join(versions)
    return [sys.prefix, *(os.environ.get(place) for place in NVRTC_PLACES)]


def _library_mark() -> list[str | int]:
    """Returns path, size and modification time (ns) of the NVRTC in use."""
    path = os.path.realpath(_load_nvrtc()._name)
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]


def _is_unchanged(mark: list) -> bool:
    try:
        status = os.stat(mark[0])
    except OSError:
        return False
    return mark[1:] == [status.st_size, status.st_mtime_ns]


def _read(path: Path, name: str, arch: str, check_library: bool) -> Compiled | None:
    """Reads a cache file: SHA-256 of the rest in hexadecimal, a line of JSON, the cubin."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, _, rest = content.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        log.warning("%s is damaged; its kernels are compiled again", path)
        return None
    line, _, code = rest.partition(b"\n")
    about = json.loads(line)
    if check_library and not _is_unchanged(about["library"]):
        return None
    return Compiled(name, arch, about["compiler"], about["log"], code)


def _keep(compiled: Compiled, file_name: str, folder: Path | None) -> None:
    about = {"compiler": compiled.compiler, "library": _library_mark(), "log": compiled.log}
    rest = json.dumps(about).encode() + b"\n" + compiled.cubin
    content = hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest
    problem = _write(folder, file_name, content) if folder else "there is no home folder"
    if problem is None:
        return
    fallback = _fallback_folder(create=True)
    if fallback is None or _write(fallback, file_name, content) is not None:
        _warn_once("compiled kernels cannot be kept in %s, so every run compiles them again: %s", folder, problem)
    else:
        _warn_once("compiled kernels are kept in %s, because %s cannot be used: %s", fallback, folder, problem)


def _write(folder: Path, file_name: str, content: bytes) -> str | None:
    """Writes a cache file; returns the problem, if any."""
    try:
        with atomic_file(folder / file_name) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        return error.strerror or str(error)
    return None


@functools.cache
def _warn_once(message: str, *words: object) -> None:
    log.warning(message, *words)


def _user_folder() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # unset, or to be ignored: XDG Base Directory Specification
        base = os.path.expanduser("~/.cache")
    return Path(base) / "infctx" if os.path.isabs(base) else None


def _fallback_folder(create: bool = False) -> Path | None:
    """Returns a temporary folder that only this user can write: others could plant machine code elsewhere."""
    folder = Path(tempfile.gettempdir()) / f"infctx-{os.getuid()}"
    try:
        if create:
            folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if private else None

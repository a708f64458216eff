"""WKV and WKV-7, the ops of time mixing: their contracts, the checks, and the choice of a backend."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from infctx.conventions import START_SPACING
from infctx.cuda.compile import KernelsUnavailable
from infctx.cuda.driver import DriverError
from infctx.cuda.wkv7_cuda import compile_kernels7, wkv7_cuda
from infctx.cuda.wkv_cuda import DTYPES as CUDA_DTYPES
from infctx.cuda.wkv_cuda import compile_kernels, wkv_cuda
from infctx.errors import InputError
from infctx.ops.precision import state_dtype
from infctx.ops.wkv_check import find_disagreement
from infctx.ops.wkv_chunked import wkv7_chunked, wkv_chunked
from infctx.ops.wkv_compiled import wkv7_compiled, wkv_compiled
from infctx.ops.wkv_reference import wkv7_reference, wkv_reference

BACKENDS = {"reference": wkv_reference, "chunked": wkv_chunked, "compiled": wkv_compiled, "cuda": wkv_cuda}
BACKENDS_7 = {"reference": wkv7_reference, "chunked": wkv7_chunked, "compiled": wkv7_compiled, "cuda": wkv7_cuda}
REPORT = "what tools/gpu/gpu_check.py says"
ONLY_ON = {"compiled": "cpu", "cuda": "cuda"}
Op = Literal["wkv", "wkv7"]

log = logging.getLogger(__name__)


def wkv(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the WKV recurrence of RWKV-5 and RWKV-6 over a segment and passes on its state.

    Per head, for key channel i and value channel j (arXiv 2404.05892, sections 4 and 5):

        y[t, j] = sum_i r[t, i] (S[i, j] + u[i] k[t, i] v[t, j]);    S[i, j] <- exp(w[t, i]) S[i, j] + k[t, i] v[t, j]

    r, k, v: (B, T, H, N), bf16, fp32 or fp64; any T >= 1
    w:       (B, T, H, N), fp32 (fp64 with fp64) log decay <= 0; may be expanded over T, as RWKV-5 does
    u:       (H, N), the bonus of the current token
    state:   (B, H, N, N), fp32 (fp64 with fp64), key by value
    starts:  (B, ceil(T / 16)) bool: a document starts at this 16-token boundary, where the state becomes `initial`
    initial: (B, H, N, N) like state, may be expanded over B; None for zeros
    backend: "reference" (a loop over time: the definition), "chunked" (plain torch, any device), "compiled"
             (numba, CPU), "cuda" (kernels for NVIDIA GPUs, bf16 and fp32), or "auto": compiled on a CPU, cuda on a GPU
             that can run it, chunked elsewhere

    Returns y like r, and the state after the last token, like `state`.  Nothing is changed in place; every input except
    `starts` gets a gradient, from both outputs.  Raises InputError for shapes, dtypes or a backend that do not fit.
    """
    _check("wkv", {"r": r, "k": k, "v": v, "w": w}, state, starts, initial, u)
    picked = choose_backend(backend, r.device.type, r.device.index, r.dtype, r.shape[3])
    return BACKENDS[picked](r, k, v, w, u, state, starts, initial)


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the WKV recurrence of RWKV-7 over a segment and passes on its state.

    Per head, for key channel i and value channel j (arXiv 2503.14456, section 4), with u[j] = sum_i a[t, i] S[i, j]:

        S[i, j] <- exp(w[t, i]) S[i, j] + b[t, i] u[j] + k[t, i] v[t, j];    y[t, j] = sum_i r[t, i] S[i, j]

    r, k, v, a, b: (B, T, H, N), bf16, fp32 or fp64; any T >= 1.  RWKV-7's a is minus a unit vector, and its b that
             vector times rates in 0..1; others may be anything, but products of exp(w) + b a^T may then grow
    w:       (B, T, H, N), fp32 (fp64 with fp64), any log decay <= 0, also far beyond RWKV-7's -0.6065
    state, starts, initial: as for `infctx.wkv`
    backend: "reference" (a loop over time: the definition), "chunked" (plain torch, any device), "compiled"
             (numba, CPU), "cuda" (kernels for NVIDIA GPUs, bf16 and fp32, heads of at most 64 channels), or "auto":
             compiled on a CPU, cuda on a GPU that can run it, chunked elsewhere

    Returns and raises as `infctx.wkv` does; y is read after its token is written, in RWKV-5 and RWKV-6 before.
    """
    _check("wkv7", {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, state, starts, initial)
    picked = choose_backend(backend, r.device.type, r.device.index, r.dtype, r.shape[3], "wkv7")
    return BACKENDS_7[picked](r, w, k, v, a, b, state, starts, initial)


# Without this torch.compile would trace the search for a compiler.
@torch.compiler.assume_constant_result
def choose_backend(
    backend: str, device_type: str, device_index: int | None, dtype: torch.dtype, channels: int, op: Op = "wkv"
) -> str:
    """Returns the name of the backend for tensors of this dtype and head size on this device."""
    if backend == "auto" and device_type == "cuda" and dtype in CUDA_DTYPES:
        backend = _cuda_or_chunked(op, device_index, dtype, channels)
    return pick_backend(backend, device_type, op)


@functools.cache
def _cuda_or_chunked(op: Op, device_index: int, dtype: torch.dtype, channels: int) -> str:
    try:
        (compile_kernels if op == "wkv" else compile_kernels7)(device_index, dtype, channels)
        wrong = find_disagreement(torch.device("cuda", device_index), dtype, channels, op)
    except KernelsUnavailable as error:
        return _chunked_because(op, str(error))
    except DriverError as error:
        return _chunked_because(op, f"{error}; update the GPU's driver, or report this with {REPORT}")
    if wrong:
        name = torch.cuda.get_device_name(device_index)
        are_wrong = f"on {name} the CUDA kernels are wrong for {channels} channels in {dtype}: {wrong}"
        return _chunked_because(op, f"{are_wrong}; please report this with {REPORT}")
    return "cuda"


@functools.cache
def _chunked_because(op: Op, reason: str) -> str:
    """Says so once for each reason."""
    log.warning("%s runs in plain torch, many times slower: %s", op, reason)
    return "chunked"


@functools.cache
def pick_backend(backend: str, device_type: str, op: Op = "wkv") -> str:
    """Returns the name of the backend to run, and logs it once."""
    backends = BACKENDS if op == "wkv" else BACKENDS_7
    if backend == "auto":
        backend = "compiled" if device_type == "cpu" else "chunked"
    if backend not in backends:
        raise InputError(f"{op}: there is no backend {backend!r}; choose auto, {', '.join(backends)}")
    only_on = ONLY_ON.get(backend, device_type)
    if only_on != device_type:
        raise InputError(f"{op}: backend {backend!r} runs on {only_on}, not on {device_type}; choose auto or chunked")
    log.info("%s backend on %s: %s", op, device_type, backend)
    return backend


def _check(
    op: str,
    tokens: dict[str, Tensor],
    state: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
    u: Tensor | None = None,
) -> None:
    """Raises InputError for shapes or dtypes that do not fit; tokens: all inputs (B, T, H, N) by name, r first."""
    r = tokens["r"]
    if r.ndim != 4 or r.shape[1] < 1:
        raise InputError(f"{op}: r must be (B, T, H, N) with T >= 1, not {tuple(r.shape)}")
    batch, num_tokens, heads, size = r.shape
    expected = {name: (x, tuple(r.shape)) for name, x in tokens.items()} | {
        "u": (u, (heads, size)),
        "state": (state, (batch, heads, size, size)),
        "starts": (starts, (batch, -(-num_tokens // START_SPACING))),
        "initial": (initial, (batch, heads, size, size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{op}: {name} must be {shape} to go with r {tuple(r.shape)}, not {tuple(tensor.shape)}")
    if starts is not None and starts.dtype != torch.bool:
        raise InputError(f"{op}: starts must be bool, not {starts.dtype}")
    if r.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"{op}: r is {r.dtype}; use bf16, fp32 or fp64")
    for name, tensor in tokens.items():
        if name != "w" and tensor.dtype != r.dtype:
            raise InputError(f"{op}: {name} is {tensor.dtype} and r is {r.dtype}; they must be the same")
    precise = state_dtype(r.dtype)
    for name, tensor in (("w", tokens["w"]), ("state", state), ("initial", initial)):
        if tensor is not None and tensor.dtype != precise:
            raise InputError(f"{op}: {name} must be {precise} to go with r {r.dtype}, not {tensor.dtype}")

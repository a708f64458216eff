"""WKV, the op of time mixing: its contract, the checks, and the choice of a backend."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from infctx.conventions import START_SPACING
from infctx.cuda.compile import KernelsUnavailable
from infctx.cuda.driver import DriverError
from infctx.cuda.wkv_cuda import DTYPES as CUDA_DTYPES
from infctx.cuda.wkv_cuda import compile_kernels, wkv_cuda
from infctx.errors import InputError
from infctx.recurrence.precision import state_dtype
from infctx.recurrence.wkv_check import find_disagreement
from infctx.recurrence.wkv_chunked import wkv_chunked
from infctx.recurrence.wkv_compiled import wkv_compiled
from infctx.recurrence.wkv_reference import wkv_reference

BACKENDS = {"reference": wkv_reference, "chunked": wkv_chunked, "compiled": wkv_compiled, "cuda": wkv_cuda}
REPORT = "what tools/gpu/gpu_check.py says"
ONLY_ON = {"compiled": "cpu", "cuda": "cuda"}

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
    _check(r, k, v, w, u, state, starts, initial)
    picked = choose_backend(backend, r.device.type, r.device.index, r.dtype, r.shape[3])
    return BACKENDS[picked](r, k, v, w, u, state, starts, initial)


# Without this torch.compile would trace the search for a compiler.
@torch.compiler.assume_constant_result
def choose_backend(backend: str, device_type: str, device_index: int | None, dtype: torch.dtype, channels: int) -> str:
    """Returns the name of the backend for tensors of this dtype and head size on this device."""
    if backend == "auto" and device_type == "cuda" and dtype in CUDA_DTYPES:
        backend = _cuda_or_chunked(device_index, dtype, channels)
    return pick_backend(backend, device_type)


@functools.cache
def _cuda_or_chunked(device_index: int, dtype: torch.dtype, channels: int) -> str:
    try:
        compile_kernels(device_index, dtype, channels)
        wrong = find_disagreement(torch.device("cuda", device_index), dtype, channels)
    except KernelsUnavailable as error:
        return _chunked_because(str(error))
    except DriverError as error:
        return _chunked_because(f"{error}; update the GPU's driver, or report this with {REPORT}")
    if wrong:
        name = torch.cuda.get_device_name(device_index)
        are_wrong = f"on {name} the CUDA kernels are wrong for {channels} channels in {dtype}: {wrong}"
        return _chunked_because(f"{are_wrong}; please report this with {REPORT}")
    return "cuda"


@functools.cache
def _chunked_because(reason: str) -> str:
    """Says so once for each reason."""
    log.warning("wkv runs in plain torch, many times slower: %s", reason)
    return "chunked"


@functools.cache
def pick_backend(backend: str, device_type: str) -> str:
    """Returns the name of the backend to run, and logs it once."""
    if backend == "auto":
        backend = "compiled" if device_type == "cpu" else "chunked"
    if backend not in BACKENDS:
        raise InputError(f"wkv: there is no backend {backend!r}; choose auto, {', '.join(BACKENDS)}")
    only_on = ONLY_ON.get(backend, device_type)
    if only_on != device_type:
        raise InputError(f"wkv: backend {backend!r} runs on {only_on}, not on {device_type}; choose auto or chunked")
    log.info("wkv backend on %s: %s", device_type, backend)
    return backend


def _check(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, starts: Tensor | None, initial: Tensor | None
) -> None:
    if r.ndim != 4 or r.shape[1] < 1:
        raise InputError(f"wkv: r must be (B, T, H, N) with T >= 1, not {tuple(r.shape)}")
    batch, num_tokens, heads, size = r.shape
    expected = {
        "k": (k, tuple(r.shape)),
        "v": (v, tuple(r.shape)),
        "w": (w, tuple(r.shape)),
        "u": (u, (heads, size)),
        "state": (state, (batch, heads, size, size)),
        "starts": (starts, (batch, -(-num_tokens // START_SPACING))),
        "initial": (initial, (batch, heads, size, size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"wkv: {name} must be {shape} to go with r {tuple(r.shape)}, not {tuple(tensor.shape)}")
    if starts is not None and starts.dtype != torch.bool:
        raise InputError(f"wkv: starts must be bool, not {starts.dtype}")
    if r.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"wkv: r is {r.dtype}; use bf16, fp32 or fp64")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != r.dtype:
            raise InputError(f"wkv: {name} is {tensor.dtype} and r is {r.dtype}; they must be the same")
    precise = state_dtype(r.dtype)
    for name, tensor in (("w", w), ("state", state), ("initial", initial)):
        if tensor is not None and tensor.dtype != precise:
            raise InputError(f"wkv: {name} must be {precise} to go with r {r.dtype}, not {tensor.dtype}")

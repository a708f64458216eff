"""What a run needs, before it runs: weights, data, a GPU, memory."""

from __future__ import annotations

import psutil
import torch

from infctx.config import Config
from infctx.data.token_store import store_prefix
from infctx.errors import InputError
from infctx.model.sizes import Sizes, describe, make_sizes, published_sizes
from infctx.model.weights import read_sizes
from infctx.train.checkpoint import checkpoints
from infctx.train.loss import SLICE_LOGITS
from infctx.train.model_files import find_model

GB = 1e9

WEIGHT_BYTES = 16
"""A parameter in fp32: the weight, its gradient and two moments of Adam."""

ACTIVATION_BYTES = {
    # (version, bf16, WKV by kernels rather than plain torch): tensors that autograd saves in a block, in bytes a token
    # and channel of the width, when the weights learn and when they are frozen; counted with
    # torch.autograd.graph.saved_tensors_hooks, the weights' bf16 copies taken off (tests/test_plan.py)
    (5, False, True): (113, 62),
    (5, True, True): (58, 33),
    (6, False, True): (153, 97),
    (6, True, True): (82, 55),
    (5, False, False): (203, 131),
    (5, True, False): (154, 108),
    (6, False, False): (238, 171),
    (6, True, False): (174, 134),
}


def refuse_what_lacks(config: Config) -> None:
    """Raises InputError with everything that this machine lacks for the run, in one line."""
    lacking = []
    weights = config.model.weights
    goes_on = checkpoints(config.run.folder / "checkpoints")
    if weights is not None and not weights.exists() and (config.model.freezes_weights or not goes_on):
        lacking.append(f"model.weights: there is no {weights}; download it or name another file")
    state = config.model.initial_state
    if state is not None and not state.exists() and not goes_on:
        lacking.append(f"model.initial_state: there is no {state}; name another file, or leave it out for zeros")
    for name in ("store", "held_out"):
        store = getattr(config.data, name)
        prefix = None if store is None else store_prefix(store)
        if prefix and not all(prefix.with_name(prefix.name + suffix).is_file() for suffix in (".idx", ".bin")):
            lacking.append(f"data.{name}: there is no {prefix}.idx with its .bin; make it with `infctx prepare`")
    lacking += _lacking_device(config, model_sizes(config))
    if lacking:
        raise InputError(f"this machine lacks what the run needs: {'. '.join(lacking)}")


def model_sizes(config: Config) -> Sizes | None:
    """Sizes of the configured model, from its file if it is there, None if nothing tells them; InputError if they
    contradict each other."""
    settings = config.model
    named = published_sizes(settings.size) if settings.size else None
    if settings.weights and settings.weights.exists():
        found = read_sizes(find_model(settings.weights).weights)
        if named not in (None, found):
            raise InputError(
                f"{settings.weights}: holds {describe(found)}, and model.size {settings.size} is {describe(named)}; "
                "name the right one or leave model.size out"
            )
        return found
    return named or (make_sizes(**settings.sizes) if settings.sizes else None)


def pick_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for here; raises InputError where there is no such GPU."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise InputError(f"device cuda: torch {torch.__version__} finds no GPU here; choose cpu or auto")
    return torch.device("cuda" if found and device != "cpu" else "cpu")


def device_bytes(config: Config, sizes: Sizes, device_type: str) -> int:
    """Memory that a run takes on its device, in bytes: weights, optimizer, one segment, and the seams on it."""
    window, parameters = config.window, sizes.num_parameters
    low = config.run.precision == "bf16"
    lanes = window.lanes_per_pass or window.lanes
    total = lanes * window.segment_tokens * activation_bytes(config, sizes, device_type)
    carried = state_bytes(sizes)
    if config.model.freezes_weights:
        total += (2 if low else 4) * parameters + WEIGHT_BYTES * carried // 4
    else:
        total += WEIGHT_BYTES * parameters + 4 * sizes.vocab_size * sizes.width  # and the head's gradient
        if low:  # bf16 copies of the weights, of the block at work or of all blocks
            total += 2 * parameters // (sizes.num_layers if config.model.recompute_blocks else 1)
    total += 3 * 4 * SLICE_LOGITS  # slices of the logits
    if device_type == "cpu" or window.seam_store == "device":
        total += lanes * carried * min(window.gradient_segments or window.window_segments, window.window_segments)
    return total + window.lanes * carried


def activation_bytes(config: Config, sizes: Sizes, device_type: str) -> int:
    """What the backward pass holds of one token, in bytes: measured, see ACTIVATION_BYTES."""
    low = config.run.precision == "bf16"
    backend = config.model.backend
    kernels = backend in ("compiled", "cuda") or (backend == "auto" and device_type in ("cpu", "cuda"))
    block = ACTIVATION_BYTES[sizes.version, low, kernels][config.model.freezes_weights] * sizes.width
    ends = (7 if low else 13) * sizes.width  # embedding, last norm, head
    if config.model.recompute_blocks:
        return sizes.num_layers * (2 if low else 4) * sizes.width + block + ends
    return sizes.num_layers * block + ends


def state_bytes(sizes: Sizes) -> int:
    """One lane's state in fp32: what a seam takes."""
    return 4 * sizes.state_elements


def _lacking_device(config: Config, sizes: Sizes | None) -> list[str]:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        amount = "" if sizes is None else f" with {device_bytes(config, sizes, 'cuda') / GB:.1f} GB"
        return [f"run.device: cuda, and torch {torch.__version__} finds no GPU here; the run needs one{amount}"]
    if sizes is None:
        return []
    device = pick_device(config.run.device)
    needed = device_bytes(config, sizes, device.type)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        remedy = "take fewer window.segment_tokens or lanes_per_pass, or model.recompute_blocks: true"
        return [f"memory: the run needs {needed / GB:.1f} GB on {device}, {free / GB:.1f} GB are free; {remedy}"]
    return []

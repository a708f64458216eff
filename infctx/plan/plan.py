"""What a run needs, before it runs: weights, data, GPUs, memory, and the strategy that makes it fit."""

from __future__ import annotations

import os

import psutil
import torch

from infctx.config import Config
from infctx.data.token_store import store_prefix
from infctx.errors import InputError
from infctx.formats.model_files import find_model
from infctx.formats.weights import read_sizes
from infctx.model.sizes import Sizes, describe, make_sizes, published_sizes
from infctx.plan.memory import (
    Memory,
    activation_bytes,
    rank_memory,
    reduces_each_segment,
    state_bytes,
    with_distributed,
    with_strategy,
)
from infctx.train.checkpoint import checkpoints

__all__ = [
    "OPTIONS",
    "activation_bytes",
    "choose_reduction",
    "choose_strategy",
    "device_bytes",
    "device_memory",
    "host_bytes",
    "model_sizes",
    "pick_device",
    "refuse_what_lacks",
    "resolve_strategy",
    "state_bytes",
]

GB = 1e9

FILLED = 0.9
"""How much of a GPU's memory a plan fills; the rest is for the driver, NCCL and fragments."""

OPTIONS = (
    ("ddp", False, False),
    ("zero1", False, False),
    ("zero2", False, False),
    ("zero3", False, False),
    ("zero2", True, False),
    ("zero3", True, True),
)
"""(strategy, offload_optimizer, offload_parameters): what is tried, from the fastest to the smallest."""

CHOSEN_FROM = ("ddp", "zero1", "zero2", "zero3")
"""What `auto` tries, in this order."""


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


def choose_strategy(config: Config, sizes: Sizes | None, device_type: str, device_memory_bytes: int | None) -> str:
    """The strategy of a run: the one that config.distributed names, or for "auto" the first that fits.

    Gradients are reduced behind every segment where the strategy can, unless gradient_reduction says "step".
    sizes, device_memory_bytes: None where they are not known; then several GPUs take zero2.
    """
    distributed = config.distributed
    if distributed.strategy != "auto":
        return distributed.strategy
    if distributed.world_size == 1 or device_type == "cpu":
        return "ddp"
    if sizes is None or device_memory_bytes is None:
        return "zero2"
    for strategy in CHOSEN_FROM:
        if rank_memory(with_strategy(config, strategy), sizes, device_type).device <= FILLED * device_memory_bytes:
            return strategy
    return CHOSEN_FROM[-1]


def choose_reduction(config: Config, sizes: Sizes | None, device_type: str, device_memory_bytes: int | None) -> str:
    """When gradients are reduced, "step" or "segment", in a run whose strategy is not "auto": as gradient_reduction
    says, or for "auto" once a step where whole gradients fit on the device.

    sizes, device_memory_bytes: None where they are not known; then "step".
    """
    distributed = config.distributed
    if distributed.gradient_reduction != "auto":
        return distributed.gradient_reduction
    if not reduces_each_segment(config) or device_type == "cpu" or sizes is None or device_memory_bytes is None:
        return "step"
    needed = rank_memory(with_distributed(config, gradient_reduction="step"), sizes, device_type).device
    return "step" if needed <= FILLED * device_memory_bytes else "segment"


def resolve_strategy(
    config: Config, sizes: Sizes | None, device_type: str, device_memory_bytes: int | None = None
) -> Config:
    """The same run with "auto" replaced by what it stands for, in strategy and gradient_reduction.

    On a GPU of unknown memory gradient_reduction stays "auto", which counts as the least: behind every segment.
    """
    if config.distributed.strategy == "auto":
        config = with_strategy(config, choose_strategy(config, sizes, device_type, device_memory_bytes))
    if device_type != "cpu" and device_memory_bytes is None and reduces_each_segment(config):
        return config
    reduction = choose_reduction(config, sizes, device_type, device_memory_bytes)
    return with_distributed(config, gradient_reduction=reduction)


def device_memory(device_type: str, count: int = 1) -> int | None:
    """Memory of the smallest of the first `count` GPUs here, in bytes; None for a CPU, or where there is no GPU."""
    present = torch.cuda.device_count() if device_type == "cuda" and torch.cuda.is_available() else 0
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(min(count, present))]
    return min(sizes, default=None)


def device_bytes(config: Config, sizes: Sizes, device_type: str) -> int:
    """Memory that each rank takes on its device, in bytes: weights, optimizer, one segment, and the seams on it; the
    least where "auto" goes by the device's memory, see `resolve_strategy`."""
    return rank_memory(resolve_strategy(config, sizes, device_type), sizes, device_type).device


def host_bytes(config: Config, sizes: Sizes, device_type: str) -> int:
    """Memory that each rank takes of its host, in bytes, beside device_bytes: seams, and what is offloaded."""
    return rank_memory(resolve_strategy(config, sizes, device_type), sizes, device_type).host


def _lacking_device(config: Config, sizes: Sizes | None) -> list[str]:
    count = config.distributed.devices
    if config.run.device == "cuda" and not torch.cuda.is_available():
        needs = f"{count} of them" if count > 1 else "one"
        amount = "" if sizes is None else f" with {device_bytes(config, sizes, 'cuda') / GB:.1f} GB"
        return [f"run.device: cuda, and torch {torch.__version__} finds no GPU here; the run needs {needs}{amount}"]
    device = _own_device(config)
    if device.type == "cuda" and torch.cuda.device_count() < count:
        present = torch.cuda.device_count()
        return [f"distributed.devices: {count}, and torch finds {present} here; take {present}, or more nodes"]
    if sizes is None:
        return []
    return _lacking_memory(config, sizes, device, device_memory(device.type, count))


def _own_device(config: Config) -> torch.device:
    """The device of this rank."""
    device = pick_device(config.run.device)
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    if device.type == "cuda" and config.distributed.devices > 1 and local.isdecimal():
        return torch.device("cuda", min(int(local), torch.cuda.device_count() - 1))
    return device


def _lacking_memory(config: Config, sizes: Sizes, device: torch.device, total: int | None) -> list[str]:
    """What does not fit, with what would; memory of the host is shared by the ranks of a node.

    total: memory of a GPU, in bytes.
    """
    asked, config = config, resolve_strategy(config, sizes, device.type, total)
    count = config.distributed.devices
    node = psutil.virtual_memory().available
    free = Memory(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0, node)
    needed = _on_node(rank_memory(config, sizes, device.type), device.type, count)
    if needed.device <= free.device and needed.host <= free.host:
        return []
    remedy = "take fewer window.segment_tokens or lanes_per_pass, or model.recompute_blocks: true"
    other = _what_fits(asked, config, sizes, device.type, total, free)
    if other:
        remedy = f"{other} would fit, or {remedy}"
    ranks = f" for {count} ranks" if count > 1 else ""
    strategy = f" with distributed.strategy: {config.distributed.strategy}" if config.distributed.world_size > 1 else ""
    if needed.device > free.device:
        much, place, there = needed.device, f"{device} for each rank" if ranks else f"{device}", free.device
    elif device.type == "cuda":
        much, place, there = needed.host, f"the host{ranks}", free.host
        remedy += ", or keep less there (window.seam_store, distributed.offload_optimizer)"
    else:
        much, place, there = needed.host, f"{device}{ranks}", free.host
    return [f"memory: the run needs {much / GB:.1f} GB on {place}{strategy}, {there / GB:.1f} GB are free; {remedy}"]


def _on_node(rank: Memory, device_type: str, count: int) -> Memory:
    """What `count` ranks of a node take: on each device, and of the host; a CPU's device memory is the host's."""
    if device_type == "cpu":
        return Memory(0, count * (rank.device + rank.host))
    return Memory(rank.device, count * rank.host)


def _what_fits(
    asked: Config, config: Config, sizes: Sizes, device_type: str, total: int | None, free: Memory
) -> str | None:
    """The first other strategy, time of reduction or number of time_ranks, with which the run fits.

    asked, config: the run as its settings say, and what "auto" stands for in it.
    """
    others = {}
    for option in OPTIONS:
        other = resolve_strategy(with_strategy(asked, *option), sizes, device_type, total)
        name = _describe_option(option)
        others[name] = other
        by_segment = with_distributed(other, gradient_reduction="segment")
        if reduces_each_segment(by_segment):
            prefix = "distributed." if other.distributed == config.distributed else f"{name} and "
            others[f"{prefix}gradient_reduction: segment"] = by_segment
    world = config.distributed.world_size
    for ranks in range(config.distributed.time_ranks + 1, world + 1):
        whole = world % ranks == 0 and config.window.lanes % (world // ranks) == 0
        if whole and config.window.segment_tokens % (16 * ranks) == 0:
            others[f"distributed.time_ranks: {ranks}"] = with_distributed(config, time_ranks=ranks)
    for name, other in others.items():
        needed = _on_node(rank_memory(other, sizes, device_type), device_type, config.distributed.devices)
        if needed.device <= free.device and needed.host <= free.host:
            return name
    return None


def _describe_option(option: tuple[str, bool, bool]) -> str:
    strategy, *offloads = option
    names = [name for name, chosen in zip(("optimizer", "parameters"), offloads, strict=True) if chosen]
    return " and ".join([f"distributed.strategy: {strategy}", *(f"offload_{name}: true" for name in names)])

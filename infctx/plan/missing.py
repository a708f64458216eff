"""Finds what a run needs and this machine does not have: files, devices, memory; and settings that would fit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from infctx.data.token_store import store_prefix
from infctx.errors import InputError
from infctx.exits import LESS_MEMORY
from infctx.formats.checkpoint_folder import ADAPTER_FILE, LOCK, SETTINGS, STATE_FILE, checkpoints
from infctx.formats.model_files import RUN_WEIGHTS
from infctx.hub.models import to_download
from infctx.hub.names import hub_name
from infctx.hub.published import missing_weights
from infctx.machine import device_memory, free_device_memory, free_host_memory, own_device
from infctx.model.sizes import Sizes
from infctx.plan.memory import GB, Memory, Strategy, rank_memory, reduces_each_segment, with_distributed, with_strategy
from infctx.plan.strategy import possible_strategies, resolve_strategy
from infctx.settings.config import Config
from infctx.small_texts import quoted

NOT_OTHERS = {SETTINGS, RUN_WEIGHTS, ADAPTER_FILE, STATE_FILE, "state.st", "state.pth", "held_out.json", "steps.jsonl"}
NOT_OTHERS |= {"tensorboard", "metrics.csv", "run_id", "wandb", "environment.json", "evaluation.json", "report.html"}
"""What people may put into a new run's folder, and what is left of one whose checkpoints are gone."""


def missing_files(config: Config) -> list[str]:
    """Returns a line for each file that the run reads and that does not exist, here or on the hub."""
    missing: list[str] = []
    weights, state = _files_to_read(config)
    if weights is not None and not weights.exists() and not hub_name(weights):
        missing.append(f"model.weights: {missing_weights(weights)}")
    if state is not None and not state.exists() and not hub_name(state):
        missing.append(f"model.initial_state: there is no {state}; name another file, or remove the setting for zeros")
    for name, store in config.data.named_stores:
        prefix = store_prefix(store)
        if not all(prefix.with_name(prefix.name + suffix).is_file() for suffix in (".idx", ".bin")):
            missing.append(f"data.{name}: there is no {prefix}.idx with its .bin; make it with `infctx prepare`")
    return missing


def missing_loggers(config: Config) -> list[str]:
    """Returns a line for each logger whose package is not installed."""
    return [
        f"run.loggers: {name} is not installed; pip install 'infctx[{name}]', or remove it from the list"
        for name in ("wandb", "trackio")
        if name in config.run.loggers and find_spec(name) is None
    ]


def files_to_download(config: Config) -> list[Path]:
    """Returns the names of what the run reads from the hub and the cache does not have yet."""
    return [path for path in _files_to_read(config) if path is not None and to_download(path)]


def _files_to_read(config: Config) -> tuple[Path | None, Path | None]:
    """Returns the weights and the initial state that this start of the run reads; a checkpoint may have them."""
    resumes = bool(checkpoints(config.run.checkpoints))
    weights = config.model.weights if config.model.freezes_weights or not resumes else None
    return weights, None if resumes else config.model.initial_state


def refuse_folder(folder: Path) -> None:
    """Raises InputError for a run.folder that holds something else than a run, or that cannot be one."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise InputError(f"run.folder: {path} is a file; choose another folder")
    if not folder.is_dir() or (folder / LOCK).exists() or (folder / "checkpoints").is_dir():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name not in NOT_OTHERS)
    if others:
        raise InputError(f"run.folder: {folder} holds other files ({quoted(others[0])}); choose another folder")


def missing_devices(config: Config, sizes: Sizes | None) -> list[str]:
    """Returns a line for each device or amount of memory that the run needs and this machine does not have."""
    count = config.distributed.devices
    if config.run.device == "cuda" and not torch.cuda.is_available():
        needs = f"{count} of them" if count > 1 else "one"
        amount = ""
        if sizes is not None:
            amount = f" with {rank_memory(resolve_strategy(config, sizes, 'cuda'), sizes, 'cuda').device / GB:.1f} GB"
        return [f"run.device: cuda, and torch {torch.__version__} finds no GPU here; the run needs {needs}{amount}"]
    device = own_device(config.run.device, config.distributed.devices)
    if device.type == "cuda" and torch.cuda.device_count() < count:
        present = torch.cuda.device_count()
        return [f"distributed.devices: {count}, and torch finds {present} here; use {present}, or more nodes"]
    if sizes is None:
        return []
    return _missing_memory(config, sizes, device, device_memory(device.type, count))


def _missing_memory(config: Config, sizes: Sizes, device: torch.device, total: int | None) -> list[str]:
    """Returns a line if the run does not fit, with settings that would; ranks of a node share the host's memory.

    total: memory of a GPU in bytes
    """
    asked, config = config, resolve_strategy(config, sizes, device.type, total)
    count = config.distributed.devices
    free = Memory(free_device_memory(device), free_host_memory())
    needed = _on_node(rank_memory(config, sizes, device.type), device.type, count)
    if needed.device <= free.device and needed.host <= free.host:
        return []
    remedy = LESS_MEMORY
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
    needs = f"the run needs {much / GB:.1f} GB on {place}{strategy}"
    return [f"memory: {needs}, and {there / GB:.1f} GB is free; {remedy}"]


def _on_node(rank: Memory, device_type: str, count: int) -> Memory:
    """Returns the bytes that `count` ranks of a node need on each device and on the host; on a CPU, only the host."""
    if device_type == "cpu":
        return Memory(0, count * (rank.device + rank.host))
    return Memory(rank.device, count * rank.host)


def _what_fits(
    asked: Config, config: Config, sizes: Sizes, device_type: str, total: int | None, free: Memory
) -> str | None:
    """Returns the first other strategy, gradient_reduction or number of time_ranks that makes the run fit.

    asked, config: the run as configured, and with each "auto" resolved
    """
    others = {}
    for strategy in possible_strategies(asked):
        other = resolve_strategy(with_strategy(asked, strategy), sizes, device_type, total)
        name = _describe_strategy(strategy)
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


def _describe_strategy(strategy: Strategy) -> str:
    """Returns the strategy as settings: distributed.strategy: zero2 and offload_optimizer: true."""
    chosen = [name for name in ("offload_optimizer", "offload_parameters") if getattr(strategy, name)]
    return " and ".join([f"distributed.strategy: {strategy.name}", *(f"{name}: true" for name in chosen)])

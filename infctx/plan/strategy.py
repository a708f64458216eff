"""Resolves "auto" for the memory of a device: the strategy of a run, and when its gradients are reduced."""

from __future__ import annotations

from infctx.model.sizes import Sizes
from infctx.plan.memory import (
    Strategy,
    rank_memory,
    reduces_each_segment,
    strategy_of,
    with_distributed,
    with_strategy,
)
from infctx.settings.config import Config

FILLED = 0.9
"""How much of a GPU's memory a plan fills; the rest is for the driver, NCCL and fragments."""

STRATEGIES = (
    Strategy("ddp"),
    Strategy("zero1"),
    Strategy("zero2"),
    Strategy("zero3"),
    Strategy("zero2", offload_optimizer=True),
    Strategy("zero3", offload_optimizer=True, offload_parameters=True),
)
"""The strategies to try, from fastest to smallest; `auto` tries those that keep everything on the device."""


def possible_strategies(config: Config) -> tuple[Strategy, ...]:
    """Returns the STRATEGIES that a run can have: on one device, the optimizer on the host too; on one device with an
    optimizer in a small form, only what it has."""
    if config.distributed.world_size > 1:
        return STRATEGIES
    if config.optimizer.small_forms:
        return (strategy_of(config),)
    return (STRATEGIES[0], Strategy("ddp", offload_optimizer=True), *STRATEGIES[1:])


def choose_strategy(config: Config, sizes: Sizes | None, device_type: str, device_memory_bytes: int | None) -> str:
    """Returns the strategy of a run: the one that config.distributed names, or for "auto" the first that fits.

    Counts gradients as reduced after every segment if the strategy can, unless gradient_reduction is "step".
    sizes, device_memory_bytes: None if unknown; several GPUs then use zero2, or ddp if the weights are frozen
    """
    distributed = config.distributed
    if distributed.strategy != "auto":
        return distributed.strategy
    if distributed.world_size == 1 or device_type == "cpu":
        return "ddp"
    if sizes is None or device_memory_bytes is None:
        return "ddp" if config.model.freezes_weights else "zero2"
    on_device = [strategy for strategy in STRATEGIES if not strategy.offload_optimizer]
    for strategy in on_device:
        if rank_memory(with_strategy(config, strategy), sizes, device_type).device <= FILLED * device_memory_bytes:
            return strategy.name
    return on_device[-1].name


def choose_reduction(config: Config, sizes: Sizes | None, device_type: str, device_memory_bytes: int | None) -> str:
    """Returns when gradients are reduced, "step" or "segment": gradient_reduction, or for "auto" once per step if
    whole gradients fit on the device.  The strategy must not be "auto".

    sizes, device_memory_bytes: None if unknown; then "step"
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
    """Returns the same run with "auto" resolved in strategy and gradient_reduction.

    On a GPU of unknown memory gradient_reduction stays "auto", which counts as "segment", the least memory.
    """
    if config.distributed.strategy == "auto":
        chosen = choose_strategy(config, sizes, device_type, device_memory_bytes)
        config = with_distributed(config, strategy=chosen)
    if device_type != "cpu" and device_memory_bytes is None and reduces_each_segment(config):
        return config
    reduction = choose_reduction(config, sizes, device_type, device_memory_bytes)
    return with_distributed(config, gradient_reduction=reduction)

"""The strategy of a run, and when its gradients are reduced: what "auto" stands for, given the memory of a device."""

from __future__ import annotations

from infctx.config import Config
from infctx.model.sizes import Sizes
from infctx.plan.memory import Strategy, rank_memory, reduces_each_segment, with_distributed, with_strategy

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
"""What is tried, from the fastest to the smallest; `auto` tries those that keep everything on the device."""


def choose_strategy(config: Config, sizes: Sizes | None, device_type: str, device_memory_bytes: int | None) -> str:
    """The strategy of a run: the one that config.distributed names, or for "auto" the first that fits.

    Gradients are reduced after every segment where the strategy can, unless gradient_reduction says "step".
    sizes, device_memory_bytes: None where they are not known; then several GPUs take zero2.
    """
    distributed = config.distributed
    if distributed.strategy != "auto":
        return distributed.strategy
    if distributed.world_size == 1 or device_type == "cpu":
        return "ddp"
    if sizes is None or device_memory_bytes is None:
        return "zero2"
    on_device = [strategy for strategy in STRATEGIES if not strategy.offload_optimizer]
    for strategy in on_device:
        if rank_memory(with_strategy(config, strategy), sizes, device_type).device <= FILLED * device_memory_bytes:
            return strategy.name
    return on_device[-1].name


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

    On a GPU of unknown memory gradient_reduction stays "auto", which counts as the least: after every segment.
    """
    if config.distributed.strategy == "auto":
        config = with_strategy(config, Strategy(choose_strategy(config, sizes, device_type, device_memory_bytes)))
    if device_type != "cpu" and device_memory_bytes is None and reduces_each_segment(config):
        return config
    reduction = choose_reduction(config, sizes, device_type, device_memory_bytes)
    return with_distributed(config, gradient_reduction=reduction)

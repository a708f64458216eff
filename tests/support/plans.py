"""Runs on many GPUs that are planned but not started."""

from infctx.model.sizes import published_sizes
from infctx.plan.memory import Strategy, rank_memory, with_distributed, with_strategy
from infctx.plan.plan import find_weights
from infctx.plan.strategy import resolve_strategy

from plan_tables import example_config

FINCH = published_sizes("finch-3b")


def many(gpus=8, **changes):
    """Returns Finch 3B on several GPUs, without a file; changes are section__setting=value."""
    config = example_config("finch-3b", gpus)
    for name, value in changes.items():
        section, setting = name.split("__")
        part = getattr(config, section).model_copy(update={setting: value})
        config = config.model_copy(update={section: part})
    return type(config).model_validate(config.model_dump())


def other_run(config, *strategy, reduction="segment"):
    return with_distributed(with_strategy(config, Strategy(*strategy)), gradient_reduction=reduction)


def bytes_of(config, *strategy, reduction="segment"):
    return rank_memory(other_run(config, *strategy, reduction=reduction), FINCH, "cuda")


def planned_bytes(config, sizes, device):
    """Returns a rank's memory, with "auto" resolved for a device of unknown memory."""
    return rank_memory(resolve_strategy(config, sizes, device), sizes, device)


def model_sizes(config):
    return find_weights(config)[1]

"""Runs of many GPUs that are planned and not made."""

from infctx.model.sizes import published_sizes
from infctx.plan.memory import rank_memory, with_distributed, with_strategy
from infctx.plan.report import example_config

FINCH = published_sizes("finch-3b")


def many(gpus=8, **changes):
    """Finch 3B on several GPUs, without a file; changes are section__setting=value."""
    config = example_config("finch-3b", gpus)
    for name, value in changes.items():
        section, setting = name.split("__")
        part = getattr(config, section).model_copy(update={setting: value})
        config = config.model_copy(update={section: part})
    return type(config).model_validate(config.model_dump())


def other_run(config, *option, reduction="segment"):
    return with_distributed(with_strategy(config, *option), gradient_reduction=reduction)


def bytes_of(config, *option, reduction="segment"):
    return rank_memory(other_run(config, *option, reduction=reduction), FINCH, "cuda")

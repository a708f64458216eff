"""What one GPU can do with a model: a table of ways to train it by the memory of GPUs, and a configuration for one.

infctx plan finch-1.6b --gpu 24 --write mine.yaml
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from infctx.errors import InputError
from infctx.formats.model_files import find_model
from infctx.formats.weights import read_sizes
from infctx.hub.models import cached_model
from infctx.hub.published import PUBLISHED_FILES
from infctx.model.sizes import PUBLISHED_SIZES, Sizes, describe, published_sizes
from infctx.plan.memory import GB, rank_memory
from infctx.plan.strategy import FILLED
from infctx.settings.config import Config
from infctx.small_texts import aligned

GPUS = (8, 12, 16, 24, 48)
"""GB of the GPUs in the table."""

SEGMENTS = (4096, 2048, 1024, 512, 256)
"""Tokens of a segment to try, longest first: longer segments keep a GPU busier."""

WINDOW_TOKENS = 65_536


class Way(NamedTuple):
    """A way to train on one GPU: what it is called, what learns, and the settings that make it."""

    title: str
    learn: str
    settings: dict[str, dict[str, Any]]


_BF16 = "bf16_stochastic"
WAYS = (
    Way("all weights", "weights", {}),
    Way("all weights, the optimizer on the host", "weights", {"distributed": {"offload_optimizer": True}}),
    Way("all weights in bf16, moments in 8 bits", "weights", {"optimizer": {"states": "int8", "weights": _BF16}}),
    Way(
        "the same, and gradients in bf16",
        "weights",
        {"optimizer": {"states": "int8", "weights": _BF16, "gradients": _BF16}},
    ),
    Way("an adapter: LoRA of rank 32", "adapter", {}),
    Way("an adapter over weights in 4 bits", "adapter", {"model": {"frozen_dtype": "nf4"}}),
    Way("the initial state", "initial_state", {}),
    Way("the initial state over weights in 4 bits", "initial_state", {"model": {"frozen_dtype": "nf4"}}),
)
"""From the one that changes the most, exactly, to the one that needs the least."""

PEAK_LR = {"weights": 2e-5, "adapter": 2e-4, "initial_state": 0.1}
"""Learning rates to start from, by what learns (docs/settings.md, optimizer.peak_lr)."""


class Proposal(NamedTuple):
    """The table, and the configuration of one way as YAML; None if nothing fits the GPU."""

    text: str
    configuration: str | None


def propose(model: str, gpu_gb: float, learn: str | None = None) -> Proposal:
    """Proposes how to train a model on one GPU.

    model:  a published size, the name of a published file, a weights file, or a name on the hub that is in the cache
    gpu_gb: memory of the GPU in GB (1e9 bytes)
    learn:  what to learn (model.learn); None: whatever fits and changes the most
    Raises InputError if the sizes of the model are unknown.
    """
    settings, sizes = _find(model)
    gpus = sorted({*GPUS, gpu_gb})
    fitting = [(way, [_longest_segment(way, settings, sizes, gpu) for gpu in gpus]) for way in WAYS]
    rows = [("what learns", *(f"{gpu:g} GB" for gpu in gpus))]
    for way, configs in fitting:
        rows.append((way.title, *(f"{config.window.segment_tokens:,}" if config else "-" for config in configs)))
    lines = [
        describe(sizes),
        "",
        *aligned(rows, "<" + ">" * len(gpus)),
        "",
        f"Numbers: the longest segment that fits {FILLED:.0%} of a GPU, in tokens; a window of {WINDOW_TOKENS:,}.",
        "All of this is computed from sizes, not measured.  1 GB is 1e9 bytes.",
    ]
    for way, configs in fitting:
        config = configs[gpus.index(gpu_gb)]
        if config and learn in (None, way.learn):
            needed = rank_memory(config, sizes, "cuda")
            lines += ["", f"{way.title}: {needed.device / GB:.1f} GB of the GPU, {needed.host / GB:.1f} GB of the host"]
            return Proposal("\n".join(lines), _yaml(config, way, gpu_gb))
    what = f" with model.learn: {learn}" if learn else ""
    lines += ["", f"This model does not fit a GPU of {gpu_gb:g} GB{what}; choose a smaller one"]
    return Proposal("\n".join(lines), None)


def _find(model: str) -> tuple[dict[str, Any], Sizes]:
    """Returns the settings that name a model, and its sizes."""
    if model in PUBLISHED_SIZES:
        files = [file for file in PUBLISHED_FILES if file.size == model]
        return {"size": model} | ({"weights": files[-1].hub_name} if files else {}), published_sizes(model)
    for file in PUBLISHED_FILES:
        if model in (file.name, file.hub_name):
            return {"size": file.size, "weights": file.hub_name}, published_sizes(file.size)
    path = cached_model(Path(model))
    if path is not None and path.exists():
        return {"weights": model}, read_sizes(find_model(path, hashes=False).weights)
    near = difflib.get_close_matches(model, PUBLISHED_SIZES, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"name a weights file, or one of {', '.join(PUBLISHED_SIZES)}"
    raise InputError(f"{model}: is neither a published size nor a file that is here; {remedy}")


def _longest_segment(way: Way, model: dict[str, Any], sizes: Sizes, gpu_gb: float) -> Config | None:
    """Returns the configuration with the longest segment that fits; None if none does."""
    for config in _configs(way, model):
        if rank_memory(config, sizes, "cuda").device <= FILLED * gpu_gb * GB:
            return config
    return None


def _configs(way: Way, model: dict[str, Any]) -> Iterator[Config]:
    weights = model.get("weights") or "model.pth"  # sizes that nobody published a file of
    for segment_tokens in SEGMENTS:
        content: dict[str, dict[str, Any]] = {
            "model": model | {"weights": Path(weights), "learn": way.learn, "recompute_blocks": True},
            "data": {"store": Path("data/pg19/train"), "held_out": Path("data/pg19/held_out")},
            "window": {"segment_tokens": segment_tokens, "window_tokens": WINDOW_TOKENS, "lanes": 1},
            "optimizer": {"steps": 1000, "peak_lr": PEAK_LR[way.learn], "warmup_steps": 10},
            "run": {"folder": Path("runs/mine"), "device": "cuda", "precision": "bf16"},
            "distributed": {"strategy": "ddp"},
        }
        yield Config.model_validate({name: section | way.settings.get(name, {}) for name, section in content.items()})


def _yaml(config: Config, way: Way, gpu_gb: float) -> str:
    """Returns the settings that are not the defaults, with what a user should look at."""
    content = config.model_dump(mode="json", exclude_defaults=True)
    del content["distributed"]["strategy"]
    content = {name: section for name, section in content.items() if section}
    command = "train" if way.learn == "weights" else "tune"
    return (
        f"# {way.title[0].upper()}{way.title[1:]}; for one GPU of {gpu_gb:g} GB.\n"
        "# The store and the folder are examples: `infctx prepare` makes a store of your documents (docs/data.md).\n"
        f"# Then: infctx {command} THIS_FILE\n\n{yaml.safe_dump(content, sort_keys=False)}"
    )

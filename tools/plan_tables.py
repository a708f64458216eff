"""Prints the tables of docs/distributed.md: which strategy fits which GPUs, and the traffic between time_ranks.

    python tools/plan_tables.py

Nothing is run: the figures are computed from the sizes of the published models, as in `infctx plan`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from infctx.model.sizes import published_sizes
from infctx.plan.memory import GB, Strategy, rank_memory, reduces_each_segment, step_wire, with_strategy
from infctx.plan.strategy import FILLED, choose_strategy, possible_strategies, resolve_strategy
from infctx.settings.config import Config
from infctx.settings.data import DataSettings
from infctx.settings.distributed import DistributedSettings
from infctx.settings.model import ModelSettings
from infctx.settings.optimizer import OptimizerSettings
from infctx.settings.run import RunSettings
from infctx.settings.window import WindowSettings

CHOICE_MODELS = ("finch-1.6b", "finch-3b", "goose-2.9b", "eagle-7b", "finch-14b")
CHOICE_GIGABYTES = (24, 40, 80, 141)
CHOICE_GPUS = (1, 2, 4, 8)
TIME_MODELS = ("finch-3b", "goose-2.9b")
TIME_WINDOWS = (16384, 65536, 262144, 1048576)
TIME_RANKS = (2, 4, 8)


def choice_table() -> str:
    """Returns Markdown: for published models and GPUs, the first strategy that fits, and its GB on each GPU."""
    counts = [f"{count} GPU{'s'[: count > 1]}" for count in CHOICE_GPUS]
    lines = [f"| model | GPU | {' | '.join(counts)} |", "|---|---:|" + "---|" * len(counts)]
    for model in CHOICE_MODELS:
        for gigabytes in CHOICE_GIGABYTES:
            cells = [_choice(model, gigabytes, count) for count in CHOICE_GPUS]
            lines.append(f"| {model} | {gigabytes} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table() -> str:
    """Returns Markdown: GB that a rank receives for one lane's window, by the model, the window's length and the ranks.

    Eagle sends as much as Finch.
    """
    lines = [f"| model | tokens in the window | {' | '.join(f'{ranks} time_ranks' for ranks in TIME_RANKS)} |"]
    lines.append("|---|---:|" + "---:|" * len(TIME_RANKS))
    for size in TIME_MODELS:
        for tokens in TIME_WINDOWS:
            configs = [example_config(size, ranks, time_ranks=ranks, window_tokens=tokens) for ranks in TIME_RANKS]
            cells = [f"{step_wire(config, published_sizes(size)).time / GB:.1f} GB" for config in configs]
            lines.append(f"| {size} | {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def example_config(
    size: str, gpus: int, *, strategy: Literal["auto", "ddp"] = "ddp", time_ranks: int = 1, window_tokens: int = 65536
) -> Config:
    """Returns the run of the tables: a lane for each group of ranks, segments of 4,096 tokens, bf16, blocks
    recomputed."""
    return Config(
        model=ModelSettings(size=size, recompute_blocks=True),
        data=DataSettings(store=Path("data/books/train")),
        window=WindowSettings(segment_tokens=4096, window_tokens=window_tokens, lanes=gpus // time_ranks),
        optimizer=OptimizerSettings(steps=1000, peak_lr=1e-5),
        run=RunSettings(folder=Path("runs/example"), device="cuda", precision="bf16"),
        distributed=DistributedSettings(devices=gpus, strategy=strategy, time_ranks=time_ranks),
    )


def _choice(size: str, gigabytes: int, gpus: int) -> str:
    """Returns a cell of choice_table: auto's choice, or the first strategy that fits with a part on the host, or -."""
    config, sizes, memory = example_config(size, gpus, strategy="auto"), published_sizes(size), round(gigabytes * GB)
    chosen = choose_strategy(config, sizes, "cuda", memory)
    for strategy in [
        Strategy(chosen),
        *(strategy for strategy in possible_strategies(config) if strategy.offload_optimizer),
    ]:
        resolved = resolve_strategy(with_strategy(config, strategy), sizes, "cuda", memory)
        needed = rank_memory(resolved, sizes, "cuda").device
        if needed <= FILLED * memory:
            star = "*" * reduces_each_segment(resolved)
            return f"{strategy.name}{' host' if strategy.offload_optimizer else ''}{star} {needed / GB:.1f}"
    return "-"


if __name__ == "__main__":
    print(choice_table(), time_table(), sep="\n\n")

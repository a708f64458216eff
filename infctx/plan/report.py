"""`infctx plan`: what a run takes, for people to read; nothing of the model or the data is loaded.

python -m infctx.plan.report      prints the tables of docs/distributed.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from infctx.config import (
    Config,
    DataSettings,
    DistributedSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    WindowSettings,
)
from infctx.errors import InputError
from infctx.model.sizes import Sizes, describe, published_sizes
from infctx.plan.memory import (
    REDUCING_EACH_SEGMENT,
    Memory,
    lanes_at_once,
    rank_memory,
    reduces_each_segment,
    step_wire,
    time_wire,
    with_distributed,
    with_strategy,
)
from infctx.plan.plan import FILLED, GB, OPTIONS, choose_strategy, device_memory, model_sizes, resolve_strategy

Option = tuple[str, bool, bool]

CHOICE_MODELS = ("finch-1.6b", "finch-3b", "eagle-7b", "finch-14b")
CHOICE_GIGABYTES = (24, 40, 80, 141)
CHOICE_GPUS = (1, 2, 4, 8)
TIME_WINDOWS = (16384, 65536, 262144, 1048576)
TIME_RANKS = (2, 4, 8)


def plan_report(config: Config, device_gb: float | None = None) -> str:
    """The model, the window, the ranks, what every strategy takes, and what crosses the wire in a step.

    device_gb: memory of each GPU in GB (1e9 bytes); None: of the GPUs here, if there are any.
    Raises InputError where nothing tells the sizes of the model, or device_gb makes no sense.
    """
    sizes = model_sizes(config)
    if sizes is None:
        raise InputError(
            f"model.weights: there is no {config.model.weights}, which would tell the sizes of the model; "
            "name another file, or a published size with model.size"
        )
    device_type = _device_type(config, device_gb)
    memory = _memory(config, device_type, device_gb)
    lines = [*_describe_run(config, sizes), "", *_strategy_lines(config, sizes, device_type, memory)]
    if config.distributed.time_ranks > 1:
        lines += ["", *_time_lines(resolve_strategy(config, sizes, device_type, memory), sizes)]
    lines += ["", "All of this is planned from sizes, not measured.  1 GB is 1e9 bytes."]
    return "\n".join(lines)


def choice_table() -> str:
    """Markdown: for published models and GPUs, the first strategy that fits, and GB on each GPU with it."""
    counts = [f"{count} GPU{'s'[: count > 1]}" for count in CHOICE_GPUS]
    lines = [f"| model | GPU | {' | '.join(counts)} |", "|---|---:|" + "---|" * len(counts)]
    for model in CHOICE_MODELS:
        for gigabytes in CHOICE_GIGABYTES:
            cells = [_choice(model, gigabytes, count) for count in CHOICE_GPUS]
            lines.append(f"| {model} | {gigabytes} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table() -> str:
    """Markdown: GB that a rank of Finch 3B receives for one lane's window, by its length and the number of ranks."""
    lines = [f"| tokens in the window | {' | '.join(f'{ranks} time_ranks' for ranks in TIME_RANKS)} |"]
    lines.append("|---:|" + "---:|" * len(TIME_RANKS))
    for tokens in TIME_WINDOWS:
        configs = [example_config("finch-3b", ranks, time_ranks=ranks, window_tokens=tokens) for ranks in TIME_RANKS]
        cells = [f"{step_wire(config, published_sizes('finch-3b')).time / GB:.1f} GB" for config in configs]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def example_config(
    size: str, gpus: int, *, strategy: str = "ddp", time_ranks: int = 1, window_tokens: int = 65536
) -> Config:
    """The run that the tables are about: a lane for each group of ranks, segments of 4,096 tokens, bf16, blocks
    recomputed."""
    return Config(
        model=ModelSettings(size=size, recompute_blocks=True),
        data=DataSettings(store=Path("data/books/train")),
        window=WindowSettings(segment_tokens=4096, window_tokens=window_tokens, lanes=gpus // time_ranks),
        optimizer=OptimizerSettings(steps=1000, peak_lr=1e-5),
        run=RunSettings(folder=Path("runs/example"), device="cuda", precision="bf16"),
        distributed=DistributedSettings(devices=gpus, strategy=strategy, time_ranks=time_ranks),
    )


def _device_type(config: Config, device_gb: float | None) -> str:
    if device_gb is not None and not 0 < device_gb < math.inf:
        raise InputError(f"--device-gb: {device_gb} is no memory of a GPU; give it in GB, such as 80")
    if device_gb is not None and config.run.device == "cpu":
        raise InputError("--device-gb: the run is on the CPU (run.device: cpu); leave it out, or add run.device=cuda")
    on_cpu = config.run.device == "auto" and device_gb is None and not torch.cuda.is_available()
    return "cpu" if on_cpu or config.run.device == "cpu" else "cuda"


def _memory(config: Config, device_type: str, device_gb: float | None) -> int | None:
    """Bytes that there are: of each GPU, or on a CPU of the machine; None where that is not known."""
    if device_type == "cpu":
        return psutil.virtual_memory().total
    return device_memory("cuda", config.distributed.devices) if device_gb is None else round(device_gb * GB)


def _describe_run(config: Config, sizes: Sizes) -> list[str]:
    window, distributed = config.window, config.distributed
    learns = {
        "weights": "the weights learn",
        "initial_state": "the initial state learns, the weights stay",
        "initial_state_and_shifts": "the initial state and its shift vectors learn, the weights stay",
    }[config.model.learn]
    again = "blocks computed again for the backward pass" if config.model.recompute_blocks else "blocks computed once"
    reach = "over all of them"
    if window.gradient_segments not in (None, window.window_segments):
        reach = f"over {window.gradient_segments}"
    segments = f"{_count(window.window_segments, 'segment')} of {window.segment_tokens:,}"
    ranks = f"{distributed.world_size} on {_count(distributed.nodes, 'node')}"
    if distributed.time_ranks > 1:
        ranks += f"; {distributed.time_ranks} share a document's time, {config.slice_tokens:,} tokens of each segment"
    return [
        f"model     {describe(sizes)}; {learns}",
        f"compute   {config.run.precision} for activations, {again}",
        f"window    {window.window_tokens:,} tokens: {segments}, the gradient {reach}",
        f"lanes     {window.lanes} in all, {config.rank_lanes} for a rank, {lanes_at_once(config)} at once; "
        f"{config.step_tokens:,} tokens a step",
        f"ranks     {ranks}",
    ]


def _strategy_lines(config: Config, sizes: Sizes, device_type: str, memory: int | None) -> list[str]:
    """The table of strategies, and what its marks mean."""
    known = memory is not None or config.distributed.world_size == 1
    own = resolve_strategy(config, sizes, device_type, memory)
    auto = resolve_strategy(with_strategy(config, "auto"), sizes, device_type, memory) if known else None
    chosen = own if known or config.distributed.strategy != "auto" else None
    device = "GPU" if device_type == "cuda" else "process"
    rows = [("strategy", "gradients", f"GB on each {device}", "GB of a node's host", "fits", "received in a step", "")]
    for option in [*OPTIONS, *([] if _option(own) in OPTIONS else [_option(own)])]:
        for reduction in ("step", "segment") if option[0] in REDUCING_EACH_SEGMENT else ("step",):
            other = with_distributed(with_strategy(config, *option), gradient_reduction=reduction)
            rank = rank_memory(other, sizes, device_type)
            node = config.distributed.devices * (rank.host + (rank.device if device_type == "cpu" else 0))
            wire = step_wire(other, sizes)
            marks = ["auto"] * _is_row(auto, other) + ["this run"] * _is_row(chosen, other)
            rows.append(
                (
                    _name(option),
                    f"once a {reduction}",
                    f"{rank.device / GB:.1f}",
                    f"{node / GB:.1f}",
                    _fits(rank, node, device_type, memory),
                    _amount(wire.gradients + wire.weights),
                    f"<- {', '.join(marks)}" if marks else "",
                )
            )
    return [*_aligned(rows, "<<>>>><"), "", *_legend(device_type, memory)]


def _option(config: Config) -> Option:
    settings = config.distributed
    return settings.strategy, settings.offload_optimizer, settings.offload_parameters


def _is_row(config: Config | None, row: Config) -> bool:
    """Whether a row is about a run; both rows of a strategy are, where it takes the device's memory to tell."""
    if config is None or _option(config) != _option(row):
        return False
    reductions = config.distributed.gradient_reduction, row.distributed.gradient_reduction
    return config.distributed.strategy not in REDUCING_EACH_SEGMENT or reductions[0] in ("auto", reductions[1])


def _legend(device_type: str, memory: int | None) -> list[str]:
    what = "this machine" if device_type == "cpu" else "a GPU"
    known = f"fits       into {FILLED:.0%} of the {(memory or 0) / GB:.1f} GB of {what}"
    if memory is None:
        known = "fits       is not known without a GPU; --device-gb 80 would tell, and what auto takes"
    return [
        known,
        "gradients  when they are reduced over the ranks (distributed.gradient_reduction)",
        "received   by each rank, of other ranks' gradients and weights; states of other slices are not in it",
        "auto       what distributed.strategy: auto takes",
    ]


def _fits(rank: Memory, node: int, device_type: str, memory: int | None) -> str:
    if memory is None:
        return "?"
    needed = node if device_type == "cpu" else rank.device
    return "yes" if needed <= FILLED * memory else "no"


def _time_lines(config: Config, sizes: Sizes) -> list[str]:
    forward, backward = time_wire(config, sizes)
    segments, segment = config.window.window_segments, sizes.num_layers * (forward + backward)
    layer = f"a layer of a segment, {_count(lanes_at_once(config), 'lane')} at once"
    rows = [
        ("time_ranks: each rank receives, of the states of other slices", "forward", "backward", "both"),
        (layer, _amount(forward), _amount(backward), _amount(forward + backward)),
        (f"a segment, {_count(sizes.num_layers, 'layer')}", "", "", _amount(segment)),
        (f"a window, {_count(segments, 'segment')}", "", "", _amount(segment * segments)),
        (f"a step, {_count(config.rank_lanes, 'lane')}", "", "", _amount(step_wire(config, sizes).time)),
    ]
    return _aligned(rows, "<>>>")


def _choice(size: str, gigabytes: int, gpus: int) -> str:
    """A cell of choice_table: what auto takes, or the first that fits with a part on the host, or a dash."""
    config, sizes, memory = example_config(size, gpus, strategy="auto"), published_sizes(size), round(gigabytes * GB)
    chosen = choose_strategy(config, sizes, "cuda", memory)
    for option in [(chosen, False, False), *(option for option in OPTIONS if option[1])]:
        resolved = resolve_strategy(with_strategy(config, *option), sizes, "cuda", memory)
        needed = rank_memory(resolved, sizes, "cuda").device
        if needed <= FILLED * memory:
            reduction = ", by segment" if reduces_each_segment(resolved) else ""
            return f"{option[0]}{' + host' if option[1] else ''}{reduction}, {needed / GB:.1f} GB"
    return "-"


def _name(option: Option) -> str:
    strategy, optimizer, parameters = option
    parts = ["optimizer"] * optimizer + ["weights"] * parameters
    return f"{strategy}, {' and '.join(parts)} on the host" if parts else strategy


def _amount(count: float) -> str:
    """Bytes with a unit that suits: 4.7 MB, 12.4 GB."""
    for unit, size in (("TB", 1e12), ("GB", GB), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number > 1 else ''}"


def _aligned(rows: Sequence[Sequence[str]], alignments: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [f"{cell:{alignment}{width}}" for cell, alignment, width in zip(row, alignments, widths, strict=True)]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]


if __name__ == "__main__":
    print(choice_table(), time_table(), sep="\n\n")

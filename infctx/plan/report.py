"""`infctx plan`: what a run takes, for people to read; nothing of the model or the data is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from infctx.config import (
    Config,
)
from infctx.errors import InputError
from infctx.machine import device_memory, host_memory
from infctx.model.sizes import Sizes, describe
from infctx.plan.memory import (
    GB,
    REDUCING_EACH_SEGMENT,
    Memory,
    Strategy,
    rank_memory,
    step_wire,
    strategy_of,
    time_wire,
    with_distributed,
    with_strategy,
)
from infctx.plan.plan import find_weights
from infctx.plan.strategy import FILLED, STRATEGIES, resolve_strategy


def plan_report(config: Config, device_gb: float | None = None) -> str:
    """The model, the window, the ranks, what every strategy takes, and what crosses the wire in a step.

    device_gb: memory of each GPU in GB (1e9 bytes); None: of the GPUs here, if there are any.
    Raises InputError where nothing tells the sizes of the model, or device_gb makes no sense.
    """
    _, sizes = find_weights(config)
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
        return host_memory()
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
        f"lanes     {window.lanes} in all, {config.rank_lanes} for a rank, {config.pass_lanes} at once; "
        f"{config.step_tokens:,} tokens a step",
        f"ranks     {ranks}",
    ]


def _strategy_lines(config: Config, sizes: Sizes, device_type: str, memory: int | None) -> list[str]:
    """The table of strategies, and what its marks mean."""
    known = memory is not None or config.distributed.world_size == 1
    own = resolve_strategy(config, sizes, device_type, memory)
    auto = resolve_strategy(with_strategy(config, Strategy("auto")), sizes, device_type, memory) if known else None
    chosen = own if known or config.distributed.strategy != "auto" else None
    device = "GPU" if device_type == "cuda" else "process"
    rows = [("strategy", "gradients", f"GB on each {device}", "GB of a node's host", "fits", "received in a step", "")]
    for strategy in [*STRATEGIES, *([] if strategy_of(own) in STRATEGIES else [strategy_of(own)])]:
        for reduction in ("step", "segment") if strategy.name in REDUCING_EACH_SEGMENT else ("step",):
            other = with_distributed(with_strategy(config, strategy), gradient_reduction=reduction)
            rank = rank_memory(other, sizes, device_type)
            node = config.distributed.devices * (rank.host + (rank.device if device_type == "cpu" else 0))
            wire = step_wire(other, sizes)
            marks = ["auto"] * _is_row(auto, other) + ["this run"] * _is_row(chosen, other)
            rows.append(
                (
                    _name(strategy),
                    f"once a {reduction}",
                    f"{rank.device / GB:.1f}",
                    f"{node / GB:.1f}",
                    _fits(rank, node, device_type, memory),
                    _amount(wire.gradients + wire.weights),
                    f"<- {', '.join(marks)}" if marks else "",
                )
            )
    return [*_aligned(rows, "<<>>>><"), "", *_legend(device_type, memory)]


def _is_row(config: Config | None, row: Config) -> bool:
    """Whether a row is about a run; both rows of a strategy are, where it takes the device's memory to tell."""
    if config is None or strategy_of(config) != strategy_of(row):
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
    layer = f"a layer of a segment, {_count(config.pass_lanes, 'lane')} at once"
    rows = [
        ("time_ranks: each rank receives, of the states of other slices", "forward", "backward", "both"),
        (layer, _amount(forward), _amount(backward), _amount(forward + backward)),
        (f"a segment, {_count(sizes.num_layers, 'layer')}", "", "", _amount(segment)),
        (f"a window, {_count(segments, 'segment')}", "", "", _amount(segment * segments)),
        (f"a step, {_count(config.rank_lanes, 'lane')}", "", "", _amount(step_wire(config, sizes).time)),
    ]
    return _aligned(rows, "<>>>")


def _name(strategy: Strategy) -> str:
    parts = ["optimizer"] * strategy.offload_optimizer + ["weights"] * strategy.offload_parameters
    return f"{strategy.name}, {' and '.join(parts)} on the host" if parts else strategy.name


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

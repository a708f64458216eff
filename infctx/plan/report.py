"""`infctx plan`: a readable report of the memory and traffic of a run; neither the model nor the data is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from infctx.adapters.targets import count_learned
from infctx.errors import InputError
from infctx.hub.names import hub_name
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
    weight_bytes,
    with_distributed,
    with_strategy,
)
from infctx.plan.plan import Plan, find_weights
from infctx.plan.strategy import FILLED, possible_strategies, resolve_strategy
from infctx.settings.adapter import AdapterSettings
from infctx.settings.config import Config
from infctx.small_texts import aligned, counted

LEAST_SEGMENT = 256
"""Tokens; shorter segments take much longer for little memory."""


class Report(NamedTuple):
    """The report, and whether the run fits; None if only a GPU could show that."""

    text: str
    fits: bool | None


def plan_report(config: Config, device_gb: float | None = None) -> Report:
    """Reports the model, the window, the ranks, the memory of every strategy, and bytes over the wire in a step.

    device_gb: memory of each GPU in GB (1e9 bytes); None: that of the GPUs here, if there are any
    Raises InputError if the sizes of the model are unknown or device_gb makes no sense.
    """
    _, sizes = find_weights(config)
    if sizes is None:
        weights = config.model.weights
        if weights is not None and hub_name(weights):
            raise InputError(
                f"model.weights: {weights} is not downloaded yet, so its sizes are unknown; set model.size, such as "
                "finch-3b (docs/models.md)"
            )
        raise InputError(
            f"model.weights: there is no {weights} to read the sizes from; name another file, or set model.size"
        )
    device_type, memory = real_device(config, device_gb)
    own = resolve_strategy(config, sizes, device_type, memory)
    fits = _fits(own, sizes, device_type, memory)
    lines = [*_describe_run(config, sizes), "", *_strategy_lines(config, sizes, device_type, memory)]
    if config.distributed.time_ranks > 1:
        lines += ["", *_time_lines(own, sizes)]
    lines += ["", "All of this is computed from sizes, not measured.  1 GB is 1e9 bytes."]
    if fits is False:
        assert memory is not None
        lines += ["", *_remedy(own, sizes, device_type, memory)]
    return Report("\n".join(lines), fits)


def describe_plan(plan: Plan) -> list[str]:
    """Returns lines about what a plan decided: model, window, lanes, ranks, strategy, and the memory it should take."""
    assert plan.sizes is not None
    own = with_distributed(plan.config, strategy=plan.strategy, gradient_reduction=plan.reduction)
    needed = rank_memory(own, plan.sizes, plan.device.type)
    memory = f"{_amount(needed.device)} per rank" + (f", {_amount(needed.host)} of the host" if needed.host else "")
    strategy = f"{_name(strategy_of(own))}, gradients reduced each {plan.reduction}"
    return [*_describe_run(plan.config, plan.sizes), f"strategy  {strategy}", f"planned   {memory}"]


def real_device(config: Config, device_gb: float | None) -> tuple[str, int | None]:
    """Returns the type of the devices that a plan is for, and the bytes of each GPU, or of the machine for a CPU.

    device_gb: as for `plan_report`, with the same refusals; the bytes are None if they are unknown
    """
    device_type = _device_type(config, device_gb)
    if device_type == "cpu":
        return device_type, host_memory()
    known = device_memory("cuda", config.distributed.devices) if device_gb is None else round(device_gb * GB)
    return device_type, known


def _device_type(config: Config, device_gb: float | None) -> str:
    if device_gb is not None and not 0 < device_gb < math.inf:
        raise InputError(f"--device-gb: {device_gb} is not a GPU's memory; give it in GB, such as 80")
    if device_gb is not None and config.run.device == "cpu":
        raise InputError("--device-gb: the run is on the CPU (run.device: cpu); leave it out, or add run.device=cuda")
    on_cpu = config.run.device == "auto" and device_gb is None and not torch.cuda.is_available()
    return "cpu" if on_cpu or config.run.device == "cpu" else "cuda"


def _describe_run(config: Config, sizes: Sizes) -> list[str]:
    window, distributed = config.window, config.distributed
    learns = {
        "weights": "the weights learn",
        "initial_state": "the initial state learns, the weights are frozen",
        "initial_state_and_shifts": "the initial state and its shift vectors learn, the weights are frozen",
        "adapter": "an adapter learns, the weights are frozen",
    }[config.model.learn]
    again = "blocks recomputed in the backward pass" if config.model.recompute_blocks else "no recomputation"
    reach = "over all of them"
    if window.gradient_segments not in (None, window.window_segments):
        reach = f"over {window.gradient_segments}"
    segments = f"{counted(window.window_segments, 'segment')} of {window.segment_tokens:,}"
    ranks = f"{distributed.world_size} on {counted(distributed.nodes, 'node')}"
    if distributed.time_ranks > 1:
        ranks += f"; {distributed.time_ranks} share a document's time, {config.slice_tokens:,} tokens of each segment"
    frozen = config.model.frozen_dtype
    adapter = config.model.learned_adapter
    return [
        f"model     {describe(sizes)}; {learns}",
        *([f"frozen    in {frozen}, {_amount(weight_bytes(config, sizes))}"] if frozen else []),
        *([f"adapter   {_describe_adapter(adapter, sizes)}"] if adapter else []),
        f"compute   {config.run.precision} for activations, {again}",
        f"window    {window.window_tokens:,} tokens: {segments}, the gradient {reach}",
        f"lanes     {window.lanes} in all, {config.rank_lanes} per rank, {config.pass_lanes} per pass; "
        f"{config.step_tokens:,} tokens per step",
        f"ranks     {ranks}",
    ]


def _describe_adapter(settings: AdapterSettings, sizes: Sizes) -> str:
    parts = [settings.form, f"rank {settings.rank}", *settings.train_too, *["initial state"] * settings.initial_state]
    return f"{', '.join(parts)}: {counted(count_learned(settings, sizes), 'number')}"


def _strategy_lines(config: Config, sizes: Sizes, device_type: str, memory: int | None) -> list[str]:
    """Returns the table of strategies and its legend."""
    known = memory is not None or config.distributed.world_size == 1
    own = resolve_strategy(config, sizes, device_type, memory)
    auto = resolve_strategy(with_strategy(config, Strategy("auto")), sizes, device_type, memory) if known else None
    chosen = own if known or config.distributed.strategy != "auto" else None
    device = "GPU" if device_type == "cuda" else "rank"
    rows = [("strategy", "gradients", f"GB per {device}", "GB per host", "fits", "received", "")]
    for other in _choices(config, own):
        needed = _needed(other, sizes, device_type)
        wire = step_wire(other, sizes)
        fits = _fits(other, sizes, device_type, memory)
        marks = ["auto"] * _is_row(auto, other) + ["this run"] * _is_row(chosen, other)
        rows.append(
            (
                _name(strategy_of(other)),
                f"each {other.distributed.gradient_reduction}",
                f"{needed.device / GB:.1f}",
                f"{needed.host / GB:.1f}",
                "?" if fits is None else "yes" if fits else "no",
                _amount(wire.gradients + wire.weights),
                f"<- {', '.join(marks)}" if marks else "",
            )
        )
    return [*aligned(rows, "<<>>>><"), "", *_legend(device_type, memory)]


def _choices(config: Config, own: Config) -> Iterator[Config]:
    """Yields the run with every strategy, including its own, and every gradient_reduction that the strategy has."""
    possible = possible_strategies(own)
    for strategy in [*possible, *([] if strategy_of(own) in possible else [strategy_of(own)])]:
        for reduction in ("step", "segment") if strategy.name in REDUCING_EACH_SEGMENT else ("step",):
            yield with_distributed(with_strategy(config, strategy), gradient_reduction=reduction)


def _needed(config: Config, sizes: Sizes, device_type: str) -> Memory:
    """Returns bytes on a rank's device and on a node's host; on a CPU the host's include the devices'."""
    rank = rank_memory(config, sizes, device_type)
    on_host = rank.host + (rank.device if device_type == "cpu" else 0)
    return Memory(rank.device, config.distributed.devices * on_host)


def _fits(config: Config, sizes: Sizes, device_type: str, memory: int | None) -> bool | None:
    if memory is None:
        return None
    needed = _needed(config, sizes, device_type)
    return (needed.host if device_type == "cpu" else needed.device) <= FILLED * memory


def _remedy(own: Config, sizes: Sizes, device_type: str, memory: int) -> list[str]:
    """Returns lines for a run that does not fit: the memory it needs, and settings that would fit."""
    needed = _needed(own, sizes, device_type)
    much, place = (needed.host, "this machine") if device_type == "cpu" else (needed.device, "each GPU")
    lines = [
        f"This run does not fit: {_name(strategy_of(own))} needs {much / GB:.1f} GB of {place}, and "
        f"{FILLED:.0%} of {memory / GB:.1f} GB is {FILLED * memory / GB:.1f}."
    ]
    for other in (choice for smaller in _smaller(own) for choice in (smaller, *_choices(smaller, smaller))):
        if _fits(other, sizes, device_type, memory):
            needed = _needed(other, sizes, device_type)
            taken = f"{needed.device / GB:.1f} GB per GPU and {needed.host / GB:.1f} GB per host"
            return [*lines, f"It would fit, in {taken}, with", *_changed(own, other)]
    return [*lines, "No smaller segments fit either; use GPUs with more memory, more of them, or a smaller model."]


def _smaller(config: Config) -> Iterator[Config]:
    """Yields the run, then runs with the same gradient that need less and less memory."""
    yield config
    if not config.model.recompute_blocks:
        config = config.model_copy(update={"model": config.model.model_copy(update={"recompute_blocks": True})})
        yield config
    window = config.window
    if config.pass_lanes > 1:
        window = window.model_copy(update={"lanes_per_pass": 1})
        yield config.model_copy(update={"window": window})
    while window.segment_tokens % (32 * config.distributed.time_ranks) == 0 and window.segment_tokens > LEAST_SEGMENT:
        window = window.model_copy(update={"segment_tokens": window.segment_tokens // 2})
        yield config.model_copy(update={"window": window})


def _changed(before: Config, after: Config) -> list[str]:
    """Returns the settings that differ, as overrides."""
    sections = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [
        f"  {section}.{name}={str(value).lower()}"
        for section, settings in sections[1].items()
        for name, value in settings.items()
        if value != sections[0][section][name]
    ]


def _is_row(config: Config | None, row: Config) -> bool:
    """Returns whether a row shows this run; both rows of a strategy do if only the device's memory would decide."""
    if config is None or strategy_of(config) != strategy_of(row):
        return False
    reductions = config.distributed.gradient_reduction, row.distributed.gradient_reduction
    return config.distributed.strategy not in REDUCING_EACH_SEGMENT or reductions[0] in ("auto", reductions[1])


def _legend(device_type: str, memory: int | None) -> list[str]:
    what = "this machine" if device_type == "cpu" else "a GPU"
    known = f"fits       within {FILLED:.0%} of the {(memory or 0) / GB:.1f} GB of {what}"
    if memory is None:
        known = "fits       unknown without a GPU: add --device-gb 80; auto depends on it too"
    return [
        known,
        "gradients  how often ranks add theirs up (distributed.gradient_reduction: step or segment)",
        "received   by each rank in a step: gradients and weights of other ranks",
        "on host    distributed.offload_optimizer=true; the weights too with offload_parameters=true",
        "auto       the choice of distributed.strategy: auto",
    ]


def _time_lines(config: Config, sizes: Sizes) -> list[str]:
    forward, backward = time_wire(config, sizes)
    segments, segment = config.window.window_segments, sizes.num_layers * (forward + backward)
    layer = f"a layer of a segment, {counted(config.pass_lanes, 'lane')} per pass"
    rows = [
        ("time_ranks: each rank receives states of other slices", "forward", "backward", "both"),
        (layer, _amount(forward), _amount(backward), _amount(forward + backward)),
        (f"a segment, {counted(sizes.num_layers, 'layer')}", "", "", _amount(segment)),
        (f"a window, {counted(segments, 'segment')}", "", "", _amount(segment * segments)),
        (f"a step, {counted(config.rank_lanes, 'lane')}", "", "", _amount(step_wire(config, sizes).time)),
    ]
    return aligned(rows, "<>>>")


def _name(strategy: Strategy) -> str:
    parts = ["optimizer"] * strategy.offload_optimizer + ["weights"] * strategy.offload_parameters
    return f"{strategy.name}, {'all' if len(parts) == 2 else parts[0]} on host" if parts else strategy.name


def _amount(count: float) -> str:
    """Formats bytes with a suitable unit: 4.7 MB, 12.4 GB."""
    for unit, size in (("TB", 1e12), ("GB", GB), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"

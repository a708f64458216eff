"""Settings of a run on several GPUs or nodes."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from infctx.settings.section import Positive, Section, refuse


class DistributedSettings(Section):
    """Several GPUs or nodes: one process per device, and how they share memory and work (docs/distributed.md)."""

    devices: Positive = 1
    """Number of devices on each node: GPUs, or processes on a CPU.  On one node, `infctx train` starts all of them
    itself."""
    nodes: Positive = 1
    """Number of nodes.  With more than one, start `infctx train` on each node with torchrun or srun."""
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """How to share memory.  `ddp`: every rank holds everything; `zero1` shards the optimizer's state over the ranks,
    `zero2` the gradients too, `zero3` the weights too.  In this order they need less memory and send more.  `auto`: the
    first that fits, as `infctx plan` computes it."""
    gradient_reduction: Literal["auto", "step", "segment"] = "auto"
    """When ranks add up their gradients.  `step`: once per step; each rank holds all gradients until then, 4 bytes per
    weight.  `segment`: after every segment, for `zero2` and `zero3`; needs the least memory, but sends much more.
    `auto`: `step` if it fits."""
    offload_optimizer: bool = False
    """Keeps the optimizer's state in host memory and steps there, on the CPU; for one device, and for `zero1`, `zero2`
    and `zero3` on several.  Saves 8 to 12 bytes per weight on the GPU and makes each step slower.  On one device with
    `run.precision: bf16`, the fp32 weights move to the host too, and the GPU has them in bf16."""
    offload_parameters: bool = False
    """Keeps the weights in host memory until a block needs them, for `zero3`.  With `offload_optimizer` this needs the
    least GPU memory and is the slowest."""
    time_ranks: Positive = 1
    """Ranks that work together on the same lanes: each computes its slice of every segment.  Use it if a window is too
    long for one device, or if there are fewer lanes than devices.  Lanes are divided among the groups of `time_ranks`
    ranks."""

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    @property
    def data_ranks(self) -> int:
        """Groups of ranks, each with different lanes."""
        return self.world_size // self.time_ranks

    @model_validator(mode="after")
    def _fits(self) -> DistributedSettings:
        problems = []
        if self.world_size % self.time_ranks:
            problems.append(
                f"time_ranks: {self.time_ranks} does not divide the {self.world_size} ranks (devices * nodes); "
                "choose a divisor"
            )
        if self.offload_optimizer and self.world_size > 1 and not self.strategy.startswith("zero"):
            problems.append(f"offload_optimizer: strategy {self.strategy} cannot; choose zero1, zero2 or zero3")
        if self.offload_parameters and self.strategy != "zero3":
            problems.append(f"offload_parameters: strategy {self.strategy} cannot; choose zero3")
        return refuse(self, problems)

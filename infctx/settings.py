"""Every setting of a run, with its type, its unit and what it does; `infctx.config` reads them from a file.

The sections are those of the YAML file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _named(path: Path) -> Path:
    if not path.name or "\0" in str(path):
        raise ValueError(f"{str(path)!r} names no file or folder")
    return path


PathSetting = Annotated[Path, Field(strict=False), AfterValidator(_named)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


AnySection = TypeVar("AnySection", bound="Section")


class Section(BaseModel):
    """A part of the configuration: frozen, strict about types, closed to unknown settings."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _refuse(section: AnySection, problems: list[str]) -> AnySection:
    """Raises ValueError with a line for each problem: "setting: what is wrong; what would do"."""
    if problems:
        raise ValueError("\n".join(problems))
    return section


class ModelSettings(Section):
    """Which model: a file of weights, a published size, or sizes."""

    weights: PathSetting | None = None
    """A .pth or .safetensors, a checkpoint or a run's folder to start from; version and every size are read from it."""
    size: str | None = None
    """A published size such as finch-3b.  With `weights`: what the file must hold.  Alone: new weights."""
    version: Literal[5, 6] | None = None
    """5 for Eagle, 6 for Finch; together with num_layers and width: new weights of these sizes."""
    num_layers: Positive | None = None
    width: Positive | None = None
    vocab_size: Positive | None = None
    head_size: Positive | None = None
    ffn_width: Positive | None = None
    mix_rank: Positive | None = None
    decay_rank: Positive | None = None
    learn: Literal["weights", "initial_state", "initial_state_and_shifts"] = "weights"
    """weights: all of them, and the initial state if the file has one; initial_state: the matrices that documents
    start from, of a model that stays as it is (state tuning); initial_state_and_shifts: the shift vectors with them,
    which no other program's file has a place for."""
    initial_state: PathSetting | None = None
    """A state file to begin from, in any form that `infctx export` writes; null: zeros, or what `weights` holds."""
    recompute_blocks: bool = False
    """Holds only the input of each block and computes the rest again for the backward pass: less memory, 1/3 slower."""
    backend: Literal["auto", "cuda", "compiled", "chunked", "reference"] = "auto"
    """Of the WKV op: auto, cuda (kernels for NVIDIA GPUs), compiled (CPU), chunked (any device) or reference (a loop,
    for judging)."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that were given by hand."""
        names = ("version", "num_layers", "width", "vocab_size", "head_size", "ffn_width", "mix_rank", "decay_rank")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def freezes_weights(self) -> bool:
        return self.learn != "weights"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if self.sizes and (self.weights or self.size):
            raise ValueError(f"{next(iter(self.sizes))}: sizes come from `weights` or `size`; leave it out")
        if not self.sizes and not self.weights and not self.size:
            raise ValueError("nothing says which model; give weights, size, or version with num_layers and width")
        if self.sizes and not {"version", "num_layers", "width"} <= self.sizes.keys():
            raise ValueError("sizes by hand need version, num_layers and width")
        if self.freezes_weights and not self.weights:
            raise ValueError(f"learn: {self.learn} tunes a finished model; say which with model.weights")
        if self.initial_state and not self.weights:
            raise ValueError("initial_state: belongs to a finished model; say which with model.weights")
        return self


class DataSettings(Section):
    """Which documents."""

    store: PathSetting
    """Token store to train on, the common part of the names of its .bin and .idx; made by `infctx prepare`."""
    held_out: PathSetting | None = None
    """Token store of held-out documents, for the loss by position at the end."""
    document_tokens: Positive | None = None
    """Longer documents are cut into documents of so many tokens, each of which starts from the initial state; null:
    none are.  An initial state learns where documents start, so tuning one on long documents wants them cut."""
    shuffle: bool = True
    """Draws the documents of each epoch in a new order; false keeps the order of the store."""


class WindowSettings(Section):
    """How documents are cut, and how much is held in memory at once."""

    segment_tokens: Positive
    """Tokens of a lane whose activations are held at once: memory grows with it, the gradient does not depend on it."""
    window_tokens: Positive
    """Tokens of a lane in one optimizer step: inside, the gradient is exact across every segment."""
    gradient_segments: Positive | None = None
    """Over how many segments a gradient flows; null: the whole window, 1: truncated at every segment."""
    lanes: Positive = 1
    """Rows of the batch: each holds documents laid end to end."""
    lanes_per_pass: Positive | None = None
    """Lanes that are computed at once, null for all: fewer take less memory and add up to the same gradient."""
    seam_store: Literal["auto", "device", "host"] = "auto"
    """Where the states between segments are kept; auto: on the host for a GPU."""

    @property
    def window_segments(self) -> int:
        return self.window_tokens // self.segment_tokens

    @model_validator(mode="after")
    def _fits(self) -> WindowSettings:
        problems = []
        if self.segment_tokens % 16:
            near = max(16, round(self.segment_tokens / 16) * 16)
            problems.append(f"segment_tokens: {self.segment_tokens} is not a multiple of 16; {near} would do")
        elif self.window_tokens % self.segment_tokens:
            near = max(1, round(self.window_tokens / self.segment_tokens)) * self.segment_tokens
            problems.append(
                f"window_tokens: {self.window_tokens} is not a multiple of segment_tokens {self.segment_tokens}; "
                f"{near} would do"
            )
        if self.gradient_segments and self.gradient_segments > max(self.window_segments, 1):
            problems.append(
                f"gradient_segments: {self.gradient_segments} is more than the {self.window_segments} segments of a "
                "window; null means all of them"
            )
        if self.lanes % (self.lanes_per_pass or 1):
            problems.append(f"lanes_per_pass: {self.lanes_per_pass} does not divide the {self.lanes} lanes; try 1")
        return _refuse(self, problems)


class OptimizerSettings(Section):
    """AdamW, its schedule and what is done to gradients."""

    steps: Positive
    """Optimizer steps of the whole run; a step takes lanes * window_tokens tokens."""
    peak_lr: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up; decays learn at twice that.  Where the initial state is all that learns, in
    units of the root mean square of the states that the model makes, for each key channel: 0.1 suits all models."""
    final_lr: Annotated[float, Field(ge=0)] | None = None
    """Learning rate at the last step, null for a tenth of peak_lr; a constant schedule has none."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From peak_lr to final_lr over the steps after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the learning rate grows linearly from 1 % of its value; null: 10, or a tenth of a run of fewer
    than 100 steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, on matrices and embeddings (and a learned initial state) only."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient, null for no clipping."""
    l2wrap: bool = False
    """Adds RWKV-LM's L2Wrap to the gradient: keeps the largest logits small, at the loss's own denominator."""

    @property
    def warmup(self) -> int:
        """Steps of the warm-up, whether or not they were set."""
        return min(10, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    @model_validator(mode="after")
    def _fits(self) -> OptimizerSettings:
        problems = []
        if self.warmup >= self.steps:
            problems.append(
                f"warmup_steps: {self.warmup_steps} is not less than the {self.steps} steps of the run; "
                "take fewer, or null for a tenth"
            )
        if self.schedule == "constant" and self.final_lr is not None:
            problems.append(f"final_lr: {self.final_lr} has no meaning in a constant schedule; leave it out")
        return _refuse(self, problems)


class RunSettings(Section):
    """Where and how a run is done."""

    folder: PathSetting
    """Holds checkpoints, TensorBoard's files, the log of all steps and the exported weights."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of new weights and of the order of documents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """What activations and matrix products are computed in; weights, states and decays are fp32 either way."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads, null for all cores; part of what makes a resumed run equal, bit for bit."""
    resume: Literal["auto", "never"] = "auto"
    """auto: goes on from the newest whole checkpoint of the folder; never: refuses a folder that has one."""
    save_every_steps: Positive = 100
    keep_checkpoints: Positive = 3
    log_every_steps: Positive = 10
    evaluate_tokens: Annotated[int, Field(ge=0)] = 262144
    """Held-out tokens of the loss by position at the end of the run."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"


class DistributedSettings(Section):
    """Over how many processes, one a device, and what each of them holds."""

    devices: Positive = 1
    """Devices of a node: GPUs, or processes on a CPU."""
    nodes: Positive = 1
    """Nodes; with more than one, torchrun or srun starts `infctx train` on each (docs/distributed.md)."""
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """ddp: every rank holds everything; zero1 shards the optimizer's state over the ranks, zero2 the gradients too,
    zero3 the weights too; auto: the first of them that fits, with the least that gradient_reduction allows, as
    `infctx plan` counts it."""
    gradient_reduction: Literal["auto", "step", "segment"] = "auto"
    """step: gradients are reduced over the ranks once a step, and each rank holds all of them until then; segment:
    zero2 and zero3 reduce them after every segment, and hold only their share; auto: step where that fits on the
    device."""
    offload_optimizer: bool = False
    """Keeps the optimizer's state, and its step, in host memory; for zero1, zero2 and zero3."""
    offload_parameters: bool = False
    """Keeps the weights in host memory until a block needs them; for zero3."""
    time_ranks: Positive = 1
    """Ranks that share the time of one document: each has its slice of every segment; the others share out lanes."""

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    @property
    def data_ranks(self) -> int:
        """Groups of ranks with lanes of their own."""
        return self.world_size // self.time_ranks

    @model_validator(mode="after")
    def _fits(self) -> DistributedSettings:
        problems = []
        if self.world_size % self.time_ranks:
            problems.append(
                f"time_ranks: {self.time_ranks} does not divide the {self.world_size} ranks (devices * nodes); "
                "take a divisor"
            )
        if self.offload_optimizer and not self.strategy.startswith("zero"):
            problems.append(f"offload_optimizer: strategy {self.strategy} cannot; choose zero1, zero2 or zero3")
        if self.offload_parameters and self.strategy != "zero3":
            problems.append(f"offload_parameters: strategy {self.strategy} cannot; choose zero3")
        return _refuse(self, problems)


class Config(Section):
    """One run."""

    model: ModelSettings
    data: DataSettings
    window: WindowSettings
    optimizer: OptimizerSettings
    run: RunSettings
    distributed: DistributedSettings = DistributedSettings()

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step, over all lanes."""
        return self.window.lanes * self.window.window_tokens

    @property
    def rank_lanes(self) -> int:
        """Lanes of one rank."""
        return self.window.lanes // self.distributed.data_ranks

    @property
    def pass_lanes(self) -> int:
        """Lanes that one rank computes at once."""
        return min(self.window.lanes_per_pass or self.rank_lanes, self.rank_lanes)

    @property
    def rank_backwards(self) -> int:
        """Backward calls of one rank in a step: one a segment, for each group of lanes."""
        return -(-self.rank_lanes // self.pass_lanes) * self.window.window_segments

    @property
    def slice_tokens(self) -> int:
        """Tokens of a segment that one rank computes."""
        return self.window.segment_tokens // self.distributed.time_ranks

    @model_validator(mode="after")
    def _fits(self) -> Config:
        window, distributed, problems = self.window, self.distributed, []
        if window.lanes % distributed.data_ranks:
            near = -(-window.lanes // distributed.data_ranks) * distributed.data_ranks
            problems.append(
                f"window.lanes: {window.lanes} lanes cannot be divided evenly among {distributed.data_ranks} ranks "
                f"(devices * nodes / time_ranks); {near} would do"
            )
        if window.segment_tokens % (16 * distributed.time_ranks):
            unit = 16 * distributed.time_ranks
            problems.append(
                f"window.segment_tokens: {window.segment_tokens} is not a multiple of 16 for each of "
                f"{distributed.time_ranks} time_ranks; {max(1, round(window.segment_tokens / unit)) * unit} would do"
            )
        return _refuse(self, problems)

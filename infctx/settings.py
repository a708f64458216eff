"""Every setting of a run: its type, its unit, what it does and what it costs.  `infctx.config` reads them from a file.

The sections are those of the YAML file.  tools/settings_page.py turns the docstrings into docs/settings.md.
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
    """A section of the configuration: frozen, strict about types, closed to unknown settings."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _refuse(section: AnySection, problems: list[str]) -> AnySection:
    """Raises ValueError with a line for each problem: "setting: problem; remedy"."""
    if problems:
        raise ValueError("\n".join(problems))
    return section


class ModelSettings(Section):
    """The model: `weights` to start from, a published `size`, or `version`, `num_layers` and `width` for a new one."""

    weights: PathSetting | None = None
    """Weights to start from: a `.pth` or `.safetensors` file, a folder in Hugging Face's layout, a checkpoint, or the
    folder of another run.  The version and all sizes come from there; docs/models.md lists the published files."""
    size: str | None = None
    """A published size such as `finch-3b` (docs/models.md lists them).  With `weights`, the file must have this size,
    and `infctx plan` can compute the memory before you download it.  Without `weights`, it means new random weights of
    this size."""
    version: Literal[5, 6] | None = None
    """Architecture of new weights: 5 for Eagle (RWKV-5.2), 6 for Finch (RWKV-6).  Needs `num_layers` and `width`."""
    num_layers: Positive | None = None
    """Number of layers (blocks) of new weights.  Time, memory and the state grow in proportion."""
    width: Positive | None = None
    """Width of new weights: the size of a token's hidden vector, a multiple of `head_size`.  The number of weights and
    the time grow with its square."""
    vocab_size: Positive | None = None
    """Vocabulary size of new weights; null: 65,536, for the World tokenizer.  257 is enough for bytes.  The embedding
    and the head hold `vocab_size` times `width` weights each."""
    head_size: Positive | None = None
    """Width of one head of new weights; null: 64, as in all published models.  The state holds `width` times
    `head_size` numbers a layer."""
    ffn_width: Positive | None = None
    """Width of the hidden layer in the channel mix of new weights; null: 3.5 times `width`, rounded down to a multiple
    of 32, as in all published models."""
    mix_rank: Positive | None = None
    """Rank of the low-rank product that mixes tokens, Finch only; null: 32, or 64 from a width of 4,096 on."""
    decay_rank: Positive | None = None
    """Rank of the low-rank product that makes decays, Finch only; null: 64, or 128 from a width of 4,096 on."""
    learn: Literal["weights", "initial_state", "initial_state_and_shifts"] = "weights"
    """What to train.  `weights`: every weight, and the initial state if the file has one.  `initial_state`: only the
    matrices that each document starts from, with the weights frozen (state tuning); `infctx tune` sets this.
    `initial_state_and_shifts`: the shift vectors too, which only infctx can load."""
    initial_state: PathSetting | None = None
    """State file to start from, in any form that `infctx export` writes; null: the state in `weights`, or zeros."""
    recompute_blocks: bool = False
    """Keeps only the input of each block and recomputes the rest in the backward pass.  Costs a third more time and
    needs at most a tenth of the memory for activations."""
    backend: Literal["auto", "cuda", "compiled", "chunked", "reference"] = "auto"
    """How to compute the WKV op, the part of a layer that updates and reads the state.  `auto` picks the fastest that
    works here: `cuda` (kernels for NVIDIA GPUs), `compiled` (CPU) or `chunked` (plain torch, any device).  `reference`
    is a slow loop that the others are compared with."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes set by hand."""
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
            raise ValueError("no model given; set weights, size, or version with num_layers and width")
        if self.sizes and not {"version", "num_layers", "width"} <= self.sizes.keys():
            raise ValueError("sizes by hand need version, num_layers and width")
        if self.freezes_weights and not self.weights:
            raise ValueError(f"learn: {self.learn} tunes a finished model; name it with model.weights")
        if self.initial_state and not self.weights:
            raise ValueError("initial_state: belongs to a finished model; name it with model.weights")
        return self


class DataSettings(Section):
    """The documents: token stores that `infctx prepare` makes."""

    store: PathSetting
    """Token store to train on: the path of its `.bin` and `.idx` without the suffix, such as `data/books/train`."""
    held_out: PathSetting | None = None
    """Token store of held-out documents, for the table of loss by position at the end of the run; null: no table."""
    document_tokens: Positive | None = None
    """The most tokens a document may have.  Longer ones are cut, and each part starts from the initial state like a
    separate document.  null: never cut.  For state tuning, where only document starts train the state, set it to at
    most `window.window_tokens`."""
    shuffle: bool = True
    """Shuffles the documents anew each epoch; false keeps the order of the store."""


class WindowSettings(Section):
    """How many tokens make up a step, and how many of them are in memory at the same time."""

    segment_tokens: Positive
    """Tokens of a lane whose activations are in memory together, a multiple of 16 (for each of `time_ranks`).  Memory
    grows in proportion; the gradient stays the same.  Short segments leave a GPU idle: 1,024 to 4,096 is typical."""
    window_tokens: Positive
    """Tokens of a lane in one optimizer step, a multiple of `segment_tokens`.  Within a window the gradient is exact
    across all segments; each segment keeps one more state in memory (see `seam_store`).  Longer documents continue in
    the next window from their state, with no gradient back across the boundary."""
    gradient_segments: Positive | None = None
    """Segments that a gradient flows through before it is cut.  null: the whole window, which is exact.  1: cut at
    every segment (truncated): faster, because nothing is computed twice, but learns less from far back."""
    lanes: Positive = 1
    """Rows of the batch across all devices; each holds documents end to end.  A step trains on `lanes` times
    `window_tokens` tokens."""
    lanes_per_pass: Positive | None = None
    """Lanes that a device computes together; null: all of them.  Fewer need less memory and give the same gradient,
    added up pass by pass."""
    seam_store: Literal["auto", "device", "host"] = "auto"
    """Where to keep the states between segments.  `device`: in the device's memory; `host`: in main memory, copied
    while the GPU computes; `auto`: `host` for a GPU.  A state of Finch 3B is 21.6 MB per lane."""

    @property
    def window_segments(self) -> int:
        return self.window_tokens // self.segment_tokens

    @model_validator(mode="after")
    def _fits(self) -> WindowSettings:
        problems = []
        if self.segment_tokens % 16:
            near = max(16, round(self.segment_tokens / 16) * 16)
            problems.append(f"segment_tokens: {self.segment_tokens} is not a multiple of 16; {near} would work")
        elif self.window_tokens % self.segment_tokens:
            near = max(1, round(self.window_tokens / self.segment_tokens)) * self.segment_tokens
            problems.append(
                f"window_tokens: {self.window_tokens} is not a multiple of segment_tokens {self.segment_tokens}; "
                f"{near} would work"
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
    """AdamW, the learning rate over the run, and gradient clipping."""

    steps: Positive
    """Optimizer steps of the whole run, including those before a resume; each trains on `lanes` times `window_tokens`
    tokens."""
    peak_lr: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up; decays learn at twice the rate.  Use about 1e-5 for fine-tuning.  In state
    tuning it is relative to the size of the model's own states, and 0.1 worked for every model that we tried
    (docs/state-tuning.md)."""
    final_lr: Annotated[float, Field(ge=0)] | None = None
    """Learning rate at the last step; null: a tenth of `peak_lr`.  Leave it out of a constant schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate gets from `peak_lr` to `final_lr` after the warm-up; `constant` stays at `peak_lr`."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the learning rate grows linearly from 1% of `peak_lr`; null: 10, or a tenth of the steps if
    there are fewer than 100."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay: a fraction of the learning rate per step, on matrices, embeddings and a learned initial
    state only.  RWKV's pre-training used 0.001."""
    beta1: Fraction = 0.9
    """AdamW's decay of the mean of gradients, per step."""
    beta2: Fraction = 0.99
    """AdamW's decay of the mean of squared gradients, per step.  Closer to 1 is steadier but slower to adapt."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to AdamW's denominator, so that weights with tiny gradients do not take large steps."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; a gradient with a larger norm is scaled down to it.  null: no clipping."""
    l2wrap: bool = False
    """Adds RWKV-LM's L2Wrap to the gradient, which keeps the largest logits small.  The loss you see stays the
    same."""

    @property
    def warmup(self) -> int:
        """Steps of the warm-up, whether set or not."""
        return min(10, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    @model_validator(mode="after")
    def _fits(self) -> OptimizerSettings:
        problems = []
        if self.warmup >= self.steps:
            problems.append(
                f"warmup_steps: {self.warmup_steps} is not less than the {self.steps} steps of the run; "
                "use fewer, or null for a tenth"
            )
        if self.schedule == "constant" and self.final_lr is not None:
            problems.append(f"final_lr: {self.final_lr} means nothing in a constant schedule; leave it out")
        return _refuse(self, problems)


class RunSettings(Section):
    """Where results go, the device, the precision, and when to save."""

    folder: PathSetting
    """Folder for everything the run writes: checkpoints, TensorBoard files, the log of all steps (`steps.jsonl`) and,
    at the end, the weights or the state.  Each run needs a separate folder."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Random seed for new weights and for the order of documents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on: `auto` is a GPU if torch finds one, else the CPU.  `cuda` refuses to start without a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of activations and matrix products.  `bf16` is much faster on a GPU and halves the memory for
    activations.  Weights that learn, states and decays are fp32 either way; frozen weights are kept in this
    precision."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads; null: all cores, shared by the devices.  A resumed run is identical bit for bit only with the same
    number."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest complete checkpoint in the folder, if there is one; `never` refuses to start if
    there is one."""
    save_every_steps: Positive = 100
    """Steps between checkpoints; one is also saved at the end and on Ctrl-C.  A checkpoint is 12 bytes per weight that
    learns (37 GB for Finch 3B), and training waits while it is written."""
    keep_checkpoints: Positive = 3
    """How many checkpoints to keep.  The oldest is removed only once a new one is on disk, so leave room for one
    more."""
    log_every_steps: Positive = 10
    """Steps between progress lines when the output goes to a file or a pipe.  A terminal shows every step; TensorBoard
    and `steps.jsonl` record every step."""
    evaluate_tokens: Annotated[int, Field(ge=0)] = 262144
    """The most tokens of `data.held_out` on which to measure the loss by position; 0: do not measure.  Fine-tuning
    measures twice, before its first step and at the end; so does state tuning, with and without the state."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"


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
    """Keeps the optimizer's state in host memory and steps there, on the CPU; for `zero1`, `zero2` and `zero3`.  Saves
    8 to 12 bytes per weight on the GPU and makes each step slower."""
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
        if self.offload_optimizer and not self.strategy.startswith("zero"):
            problems.append(f"offload_optimizer: strategy {self.strategy} cannot; choose zero1, zero2 or zero3")
        if self.offload_parameters and self.strategy != "zero3":
            problems.append(f"offload_parameters: strategy {self.strategy} cannot; choose zero3")
        return _refuse(self, problems)


class Config(Section):
    """Every setting of one run."""

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
        """Lanes that one rank computes together."""
        return min(self.window.lanes_per_pass or self.rank_lanes, self.rank_lanes)

    @property
    def rank_backwards(self) -> int:
        """Backward calls of one rank in a step: one per segment, for each group of lanes."""
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
                f"window.lanes: {window.lanes} cannot be divided evenly among {distributed.data_ranks} ranks "
                f"(devices * nodes / time_ranks); {near} would work"
            )
        if window.segment_tokens % (16 * distributed.time_ranks):
            unit = 16 * distributed.time_ranks
            problems.append(
                f"window.segment_tokens: {window.segment_tokens} is not a multiple of 16 for each of "
                f"{distributed.time_ranks} time_ranks; {max(1, round(window.segment_tokens / unit)) * unit} would work"
            )
        return _refuse(self, problems)

"""Settings of the model: where it comes from, what learns, how it computes."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from infctx.settings.adapter import AdapterSettings
from infctx.settings.section import PathSetting, Positive, Section


class ModelSettings(Section):
    """The model: `weights` to start from, a published `size`, or `version`, `num_layers` and `width` for a new one."""

    weights: PathSetting | None = None
    """Weights to start from: a `.pth` or `.safetensors` file, a folder in Hugging Face's layout, a checkpoint, or the
    folder of another run; or a name on the Hugging Face Hub, `OWNER/REPOSITORY:FILE`, downloaded once, when the run
    starts.  The version and all sizes come from there; docs/models.md lists the published files."""
    size: str | None = None
    """A published size such as `finch-3b` (docs/models.md lists them).  With `weights`, the file must have this size,
    and `infctx plan` can compute the memory before you download it.  Without `weights`, it means new random weights of
    this size."""
    version: Literal[5, 6, 7] | None = None
    """Architecture of new weights: 5 for Eagle (RWKV-5.2), 6 for Finch (RWKV-6), 7 for Goose (RWKV-7).  Needs
    `num_layers` and `width`."""
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
    """Width of the hidden layer in the channel mix of new weights; null: as in all published models, 4 times `width`
    for Goose, and for the others 3.5 times, rounded down to a multiple of 32."""
    mix_rank: Positive | None = None
    """Rank of the low-rank product that mixes tokens, Finch only; null: 32, or 64 from a width of 4,096 on."""
    decay_rank: Positive | None = None
    """Rank of the low-rank product that makes decays, Finch and Goose; null: for Finch 64, or 128 from a width of 4,096
    on; for Goose about 2.5 times the root of the width."""
    rate_rank: Positive | None = None
    """Rank of the low-rank product that makes the rates of removal, Goose only; null: about 2.5 times the root of the
    width."""
    value_rank: Positive | None = None
    """Rank of the low-rank product that blends values with those of the first layer, Goose only; null: about 1.7 times
    the root of the width."""
    gate_rank: Positive | None = None
    """Rank of the low-rank product that makes the gate, Goose only; null: about 5 times the root of the width."""
    learn: Literal["weights", "initial_state", "initial_state_and_shifts", "adapter"] = "weights"
    """What to train.  `weights`: every weight, and the initial state if the file has one.  `initial_state`: only the
    matrices that each document starts from, with the weights frozen (state tuning); `infctx tune` sets this.
    `initial_state_and_shifts`: the shift vectors too, which only infctx can load.  `adapter`: small matrices beside the
    frozen ones, as `adapter` says (docs/one-gpu.md)."""
    adapter: AdapterSettings | None = None
    """What learns with `learn: adapter`, in a section inside this one; null: its defaults.  If it is there, `infctx
    tune` trains an adapter."""
    frozen_dtype: Literal["bf16", "int8", "nf4"] | None = None
    """How to keep weights that do not learn; null: in `run.precision`.  `nf4` keeps the matrices of the blocks in 4.25
    bits a weight, `int8` in 8.25, and the embedding and the head in bf16.  Each matrix is made from them when it is
    needed, which takes longer the shorter the segments are, and costs a little quality; a line in the log compares
    the loss on held-out documents before the first step (docs/state-tuning.md)."""
    initial_state: PathSetting | None = None
    """State file to start from, in any form that `infctx export` writes, here or on the hub; null: the state in
    `weights`, or zeros."""
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
        names = ["version", "num_layers", "width", "vocab_size", "head_size", "ffn_width"]
        names += ["mix_rank", "decay_rank", "rate_rank", "value_rank", "gate_rank"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def freezes_weights(self) -> bool:
        """Returns whether the weights stay as they are in their file, but for those that an adapter names."""
        return self.learn != "weights"

    @property
    def learned_adapter(self) -> AdapterSettings | None:
        """The adapter that learns, if one does."""
        return (self.adapter or AdapterSettings()) if self.learn == "adapter" else None

    @property
    def tunes_state(self) -> bool:
        """Returns whether the initial state learns, and nothing else."""
        return self.learn in ("initial_state", "initial_state_and_shifts")

    @property
    def learns_state(self) -> bool:
        """Returns whether the initial state of a frozen model learns, alone or with an adapter."""
        return self.tunes_state or bool(self.learned_adapter and self.learned_adapter.initial_state)

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
        if self.adapter and self.learn != "adapter":
            raise ValueError(f"adapter: means nothing with learn: {self.learn}; set learn: adapter, or leave it out")
        if self.frozen_dtype and not self.freezes_weights:
            raise ValueError(
                f"frozen_dtype: {self.frozen_dtype} is for frozen weights, and learn: {self.learn} trains them; "
                "leave it out"
            )
        if self.initial_state and self.learn == "adapter" and not self.learns_state:
            raise ValueError(
                "initial_state: with learn: adapter, it is for a state that learns; set adapter.initial_state: true, "
                "or leave it out"
            )
        if self.initial_state and not self.weights:
            raise ValueError("initial_state: belongs to a finished model; name it with model.weights")
        return self

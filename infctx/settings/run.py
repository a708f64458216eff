"""Settings of the run itself: its folder, device and precision, and when it saves and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from infctx.settings.section import PathSetting, Positive, Section


class RunSettings(Section):
    """Where results go, the device, the precision, and when to save."""

    folder: PathSetting
    """Folder for everything the run writes: checkpoints, TensorBoard files, the log of all steps (`steps.jsonl`) and,
    at the end, the weights or the state, and a report (`report.html`).  Each run needs a separate folder."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Random seed for new weights and for the order of documents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on: `auto` is a GPU if torch finds one, else the CPU.  `cuda` refuses to start without a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of activations and matrix products.  `bf16` is much faster on a GPU, and on a CPU that multiplies bf16
    itself (AMX or AVX512_BF16 among the flags that `lscpu` shows; on others it may be slower).  It halves the memory
    for activations.  Weights that learn, states and decays are fp32 either way; frozen weights are kept in this
    precision, unless `model.frozen_dtype` says otherwise."""
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
    """Steps between progress lines when the output goes to a file or a pipe.  A terminal shows every step, and
    `steps.jsonl` and the loggers record every step."""
    loggers: list[Literal["tensorboard", "csv", "wandb", "trackio"]] = ["tensorboard"]
    """Where the numbers of every step go besides `steps.jsonl`; `[]`: nowhere.  `csv` is `metrics.csv` in the run's
    folder.  `wandb` and `trackio` are optional: `pip install 'infctx[wandb]'` or `'infctx[trackio]'`.  They send the
    settings and losses to their servers, or with WANDB_MODE=offline to no one.  A logger that fails never stops a
    run."""
    evaluate_tokens: Annotated[int, Field(ge=0)] = 262144
    """The most tokens of `data.held_out` on which to measure the loss by position; 0: do not measure.  Fine-tuning
    measures twice, before its first step and at the end; so does state tuning, with and without the state."""
    evaluate_every_steps: Positive | None = None
    """Steps between measurements of the held-out loss while the run trains; null: only before and after.  Each reads up
    to `evaluate_tokens`, divided among the ranks, forward only: a token takes a quarter of the time that it takes
    in training.  Training waits, and computes the same bits as without."""
    keep_best: bool = True
    """Keeps the checkpoint with the lowest held-out loss, besides the last `keep_checkpoints`; `checkpoints/best` is
    a link to it.  Each time that the loss is the lowest so far, a checkpoint is saved at that step.  Needs
    `evaluate_every_steps`."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

"""Settings of the optimizer and the learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infctx.settings.section import Fraction, Positive, Section, refuse


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
    states: Literal["fp32", "int8"] = "fp32"
    """How to hold AdamW's two moments: `fp32`, 8 bytes per weight; or `int8`, 2 bytes, each block of 256 values with a
    scale, rounded at random so that averages stay right.  For one device."""
    weights: Literal["fp32", "bf16_stochastic"] = "fp32"
    """How to hold the matrices that learn: `fp32`, 4 bytes per weight; or `bf16_stochastic`, 2 bytes, stepped in fp32
    and rounded to bf16 at random, so that steps below bf16's last bit still count on average.  Needs `run.precision:
    bf16`, which then makes no copies of the weights.  For one device."""
    gradients: Literal["fp32", "bf16_stochastic"] = "fp32"
    """How gradients of bf16 matrices add up over the segments of a step: `fp32`, 4 bytes per weight; or
    `bf16_stochastic`, 2 bytes, each sum rounded at random: no bias, and noise of about 0.4% of a sum of eight
    segments."""
    l2wrap: bool = False
    """Adds RWKV-LM's L2Wrap to the gradient, which keeps the largest logits small.  The loss you see stays the
    same."""

    @property
    def small_forms(self) -> list[str]:
        """The settings that hold less than fp32, as `states: int8`."""
        asked = {name: getattr(self, name) for name in ("states", "weights", "gradients")}
        return [f"{name}: {form}" for name, form in asked.items() if form != "fp32"]

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
        return refuse(self, problems)

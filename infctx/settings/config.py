"""The whole configuration of a run: its sections, and what follows from several of them."""

from __future__ import annotations

from pydantic import model_validator

from infctx.settings.data import DataSettings
from infctx.settings.distributed import DistributedSettings
from infctx.settings.model import ModelSettings
from infctx.settings.optimizer import OptimizerSettings
from infctx.settings.run import RunSettings
from infctx.settings.section import Section, refuse
from infctx.settings.window import WindowSettings


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
        every = self.run.evaluate_every_steps
        if every and not (self.data.held_out and self.run.evaluate_tokens):
            missing = "run.evaluate_tokens above 0" if self.data.held_out else "data.held_out"
            problems.append(
                f"run.evaluate_every_steps: {every} has no documents to measure; set {missing}, or null here"
            )
        if window.carry == "lane" and distributed.time_ranks > 1:
            problems.append("window.carry: lane needs whole segments on each rank; set distributed.time_ranks to 1")
        if window.carry == "lane" and self.model.learns_state:
            problems.append("window.carry: in lane, documents never start from the state that learns; use document")
        problems += self._optimizer_problems()
        for name in ("from_tokens", "to_tokens") if self.data.curriculum else ():
            tokens, unit = getattr(self.data.curriculum, name), window.segment_tokens
            if tokens % unit:
                problems.append(
                    f"data.curriculum.{name}: {tokens} is not a multiple of window.segment_tokens {unit}; "
                    f"{max(1, round(tokens / unit)) * unit} would work"
                )
        return refuse(self, problems)

    def _optimizer_problems(self) -> list[str]:
        """Returns what is wrong with optimizer.states, weights and gradients in this run."""
        distributed, small = self.distributed, self.optimizer.small_forms
        if not small:
            return []
        first, is_zero = f"optimizer.{small[0]}", distributed.strategy.startswith("zero")
        problems = []
        if self.model.freezes_weights:
            problems.append(f"{first} is for weights that learn, and model.learn is {self.model.learn}; use fp32")
        elif distributed.world_size > 1:
            problems.append(
                f"{first} is for one device; on {distributed.world_size}, distributed.strategy: zero2 divides memory"
            )
        elif is_zero:
            problems.append(f"{first} has no place in distributed.strategy: {distributed.strategy}; use ddp")
        on_host = distributed.offload_optimizer and not is_zero
        for form in small if on_host else ():
            if not form.startswith("gradients"):
                problems.append(f"optimizer.{form} does not go with distributed.offload_optimizer; use one of them")
        is_low = self.run.precision == "bf16"
        if self.optimizer.weights != "fp32" and not is_low:
            problems.append("optimizer.weights: bf16_stochastic needs run.precision: bf16")
        if self.optimizer.gradients != "fp32" and not (self.optimizer.weights != "fp32" or (on_host and is_low)):
            problems.append("optimizer.gradients: bf16_stochastic needs optimizer.weights: bf16_stochastic")
        return problems

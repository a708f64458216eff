"""Reports of a run: a progress line, a log with one JSON object per step, and the same numbers for every logger."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from infctx.evaluate.held_out import trained_evaluations
from infctx.evaluate.loss_by_position import DocumentLoss, shown_value, total
from infctx.evaluate.record import Evaluation
from infctx.machine import peak_memory
from infctx.model.state import State
from infctx.report.early import EarlyReport
from infctx.report.evaluations import held_out_scalars, line_of
from infctx.report.loggers import Loggers
from infctx.report.progress import Part, ProgressLine, duration
from infctx.report.step_log import STEP_LOG, reopen_step_log
from infctx.settings.config import Config

LAG_TO_SHOW = 0.1
"""The progress line names the slowest rank if it takes this much longer than the median, as a fraction."""

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """The results of a step: the tokens seen so far, its loss (nats per target), the gradient norm before clipping, the
    state to carry into the next step, and the initial state if one learns.

    more: further numbers by name, for the step log and every logger
    """

    number: int
    num_tokens: int
    loss: float
    learning_rate: float
    gradient_norm: float
    carry: State
    initial: State | None
    more: Mapping[str, float] = MappingProxyType({})


def loss_by_source(config: Config, losses: list[float], num_targets: list[int]) -> dict[str, float]:
    """Returns the mean loss of each source with a target in the step, by name; nothing if there is only one source.

    losses, num_targets: the sums of each source, over all ranks
    """
    names = [f"loss_by_source/{source.called}" for source in config.data.all_sources]
    found = zip(names, losses, num_targets, strict=True)
    return {name: loss / count for name, loss, count in found if count} if len(names) > 1 else {}


def open_metrics(config: Config, first_step: int, reports: bool) -> Metrics | NoMetrics:
    """Returns the reporter of a run from first_step on; reports: whether this is the rank that reports."""
    return Metrics(config, first_step) if reports else NoMetrics()


class NoMetrics:
    """Reports nothing: only one rank reports."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def report(self, *_: object) -> None:
        pass

    def report_held_out(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def stop(self, line: str) -> None:
        pass


class Metrics:
    """Reports the steps of a run; a context that closes its files at the end."""

    def __init__(self, config: Config, first_step: int) -> None:
        self.config, self.first_step = config, first_step
        self.steps, self.step_tokens = config.optimizer.steps, config.step_tokens
        folder = config.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        self.step_log, self.seconds_before = reopen_step_log(folder / STEP_LOG, first_step)
        self.line = ProgressLine(self.steps, first_step - 1, config.run.log_every_steps)
        self.loggers = Loggers(config, first_step, self.say)
        self.loggers.send_settings(config, first_step)
        self.evaluations = trained_evaluations(config, first_step)
        self.early = EarlyReport(config)
        if first_step == 1:
            for evaluation in self.evaluations:
                self.loggers.log(held_out_scalars(evaluation, self.config), 0)
        self.began = self.before = time.perf_counter()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.line.end()
        self.loggers.close()
        self.step_log.close()

    def report(self, done: Step, busy_seconds: Tensor) -> None:
        """Reports a step with its speed and memory, and with several ranks, the one that the others wait for.

        busy_seconds: of every rank, from the beginning of the step until its gradients are reduced
        """
        step, carry = done.number, done.carry
        now = time.perf_counter()
        tokens_per_second = self.step_tokens / (now - self.before)
        self.before = now
        memory = peak_memory(carry.wkv.device)
        scalars = {
            "tokens": done.num_tokens,
            "seconds": round(self.seconds_before + now - self.began, 3),
            "loss": done.loss,
            "learning_rate": done.learning_rate,
            "gradient_norm": done.gradient_norm,
            "tokens_per_second": tokens_per_second,
            "peak_memory_gb": memory / 1e9,
            **done.more,
        }
        left = (now - self.began) / (step - self.first_step + 1) * (self.steps - step)
        parts = [Part(f"step {step}/{self.steps}", 9), Part(f"loss {done.loss:.4f}", 8)]
        if self.evaluations:
            parts.append(Part(f"held-out {shown_value(total(self.evaluations[-1].buckets)):.3f}", 6))
        parts += [Part(f"{tokens_per_second:,.0f} tokens/s", 4), Part(f"{duration(left)} left", 7)]
        parts.append(Part(f"peak {memory / 1e9:.2f} GB", 3))
        if len(busy_seconds) > 1:
            rank, lag = int(busy_seconds.argmax()), float(busy_seconds.max() / busy_seconds.median()) - 1
            scalars |= {"slowest_rank": rank, "slowest_rank_lag": lag}
            parts += [Part(f"slowest rank {rank}", 5)] if lag > LAG_TO_SHOW else []
        self.step_log.write(json.dumps({"step": step} | scalars) + "\n")
        self.step_log.flush()
        for name, state in (("carried", carry), ("initial", done.initial)):
            for layer, size in enumerate(state_sizes(state) if state else ()):
                scalars[f"{name}_state_rms/layer_{layer}"] = size
        self.loggers.log(scalars, step)
        self.line.show(step, parts)

    def report_held_out(self, evaluation: Evaluation, documents: list[DocumentLoss]) -> None:
        """Reports a measurement of the held-out loss, and what it says so far."""
        self.say(f"step {evaluation.step}/{self.steps}  {line_of(evaluation, self.evaluations)}")
        self.evaluations.append(evaluation)
        self.loggers.log(held_out_scalars(evaluation, self.config), evaluation.step or 0)
        for line in self.early.add(evaluation, documents):
            self.say(line)
        self.before = time.perf_counter()  # the speed of the next step is without it

    def say(self, line: str) -> None:
        """Prints a line, above the progress line."""
        self.line.say(line)

    def stop(self, line: str) -> None:
        """Prints the last line of a run that stops early, below the progress line."""
        self.line.end(line)


def state_sizes(state: State) -> list[float]:
    """Returns the root mean square of each layer's matrices."""
    return state.wkv.square().mean(dim=(1, 2, 3, 4)).sqrt().tolist()

"""What a run tells: a progress line, a log file with one JSON object a step, TensorBoard's scalars."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from infctx.config import Config
from infctx.files import atomic_file
from infctx.machine import peak_memory
from infctx.model.state import State
from infctx.small_texts import parse_json

STEP_LOG = "steps.jsonl"
LAG_TO_SHOW = 0.1
"""How much longer than the median a rank takes to be shown in the progress line."""


class Step(NamedTuple):
    """What a step has come to: its loss (nats a target), the gradient norm before clipping, the state to carry on, and
    the initial state if one learns."""

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float
    carry: State
    initial: State | None


def open_metrics(config: Config, first_step: int, reports: bool) -> Metrics | NoMetrics:
    """What tells of a run's steps from first_step on; reports: whether this is the rank that does."""
    if not reports:
        return NoMetrics()
    run = config.run
    return Metrics(run.folder, first_step, config.optimizer.steps, config.step_tokens, run.log_every_steps)


class NoMetrics:
    """Tells nothing: there is one report of a run, not one of each rank."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def report(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        pass


class Metrics:
    """Reports of one run; `close` it, or use it as a context."""

    def __init__(self, folder: Path, first_step: int, steps: int, step_tokens: int, log_every_steps: int) -> None:
        self.steps, self.step_tokens, self.log_every_steps = steps, step_tokens, log_every_steps
        self.first_step = first_step
        self.began = self.before = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        self.step_log = _reopen_step_log(folder / STEP_LOG, first_step)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=first_step - 1, disable=not terminal, bar_format="{desc}  |{bar:20}|", delay=0.01
        )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.writer.close()
        self.step_log.close()

    def report(self, done: Step, busy_seconds: Tensor) -> None:
        """Reports a step with its speed and memory; and of many ranks, which one the others wait for.

        busy_seconds: of every rank, from the beginning of the step to where its gradients are reduced.
        """
        step, carry = done.number, done.carry
        now = time.perf_counter()
        tokens_per_second = self.step_tokens / (now - self.before)
        self.before = now
        memory = peak_memory(carry.wkv.device)
        scalars = {
            "loss": done.loss,
            "learning_rate": done.learning_rate,
            "gradient_norm": done.gradient_norm,
            "tokens_per_second": tokens_per_second,
            "peak_memory_gb": memory / 1e9,
        }
        slowest = ""
        if len(busy_seconds) > 1:
            rank, lag = int(busy_seconds.argmax()), float(busy_seconds.max() / busy_seconds.median()) - 1
            scalars |= {"slowest_rank": rank, "slowest_rank_lag": lag}
            slowest = f"  slowest rank {rank} (+{lag:.0%})" if lag > LAG_TO_SHOW else ""
        self.step_log.write(json.dumps({"step": step} | scalars) + "\n")
        self.step_log.flush()
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        for name, state in (("carried", carry), ("initial", done.initial)):
            for layer, size in enumerate(state_sizes(state) if state else ()):
                self.writer.add_scalar(f"{name}_state_rms/layer_{layer}", size, step)
        left = (now - self.began) / (step - self.first_step + 1) * (self.steps - step)
        line = (
            f"step {step}/{self.steps}  loss {done.loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"{_duration(left)} left  peak memory {memory / 1e9:.2f} GB{slowest}"
        )
        self.bar.set_description_str(line, refresh=False)
        self.bar.update()
        if self.bar.disable and (step % self.log_every_steps == 0 or step in (self.first_step, self.steps)):
            self.say(line)

    def say(self, line: str) -> None:
        """One line, above the progress line if there is one."""
        tqdm.write(line, file=sys.stderr)


def read_step_log(folder: Path) -> list[dict[str, Any]]:
    """One dict a step: step, loss, learning_rate, gradient_norm, tokens_per_second, peak_memory_gb."""
    return [parse_json(line) for line in (folder / STEP_LOG).read_text(encoding="utf-8").splitlines()]


def state_sizes(state: State) -> list[float]:
    """Root mean square of the matrices of each layer."""
    return state.wkv.square().mean(dim=(1, 2, 3, 4)).sqrt().tolist()


def _reopen_step_log(path: Path, first_step: int) -> Any:
    """Drops what a killed run wrote after the checkpoint that this one goes on from."""
    kept = []
    if path.exists() and first_step > 1:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = parse_json(line)
                if entry["step"] < first_step and isinstance(entry["loss"], float):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line that the kill cut off
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

"""Reports of a run: a progress line, a log with one JSON object per step, and scalars and settings for TensorBoard."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from infctx.evaluate.held_out import TENSORBOARD
from infctx.files import atomic_file
from infctx.machine import peak_memory
from infctx.model.state import State
from infctx.settings.config import Config
from infctx.settings.load import dump_config
from infctx.small_texts import parse_json

STEP_LOG = "steps.jsonl"
MOST_COLUMNS = 100
"""Longest progress line."""
LAG_TO_SHOW = 0.1
"""The progress line names the slowest rank if it takes this much longer than the median, as a fraction."""


class Step(NamedTuple):
    """The results of a step: the tokens seen so far, its loss (nats per target), the gradient norm before clipping, the
    state to carry into the next step, and the initial state if one learns."""

    number: int
    num_tokens: int
    loss: float
    learning_rate: float
    gradient_norm: float
    carry: State
    initial: State | None


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

    def stop(self, line: str) -> None:
        pass


class Metrics:
    """Reports the steps of a run; a context that closes its files at the end."""

    def __init__(self, config: Config, first_step: int) -> None:
        self.steps, self.step_tokens = config.optimizer.steps, config.step_tokens
        self.log_every_steps, self.first_step = config.run.log_every_steps, first_step
        self.began = self.before = time.perf_counter()
        folder = config.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        self.step_log, self.seconds_before = _reopen_step_log(folder / STEP_LOG, first_step)
        self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=first_step)
        settings = textwrap.indent(dump_config(config), "    ")  # Markdown shows indented text unchanged
        self.writer.add_text("settings", settings, first_step)
        self.bar = tqdm(
            total=self.steps,
            initial=first_step - 1,
            disable=not _columns(),
            bar_format="{desc}  |{bar}|",
            ncols=_columns(),
            delay=0.01,
        )

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.writer.close()
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
            slowest = f"  slowest rank {rank}" if lag > LAG_TO_SHOW else ""
        seconds = self.seconds_before + now - self.began
        counts = {"step": step, "tokens": done.num_tokens, "seconds": round(seconds, 3)}
        self.step_log.write(json.dumps(counts | scalars) + "\n")
        self.step_log.flush()
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        for name, state in (("carried", carry), ("initial", done.initial)):
            for layer, size in enumerate(state_sizes(state) if state else ()):
                self.writer.add_scalar(f"{name}_state_rms/layer_{layer}", size, step)
        left = (now - self.began) / (step - self.first_step + 1) * (self.steps - step)
        line = (
            f"step {step}/{self.steps}  loss {done.loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"{duration(left)} left  peak {memory / 1e9:.2f} GB{slowest}"
        )
        self.bar.set_description_str(line, refresh=False)
        self.bar.update()
        if self.bar.disable and (step % self.log_every_steps == 0 or step in (self.first_step, self.steps)):
            print(line, file=sys.stderr, flush=True)

    def stop(self, line: str) -> None:
        """Prints the last line of a run that stops early, below the progress line."""
        self.bar.close()
        print(line, file=sys.stderr, flush=True)


def read_step_log(folder: Path) -> list[dict[str, Any]]:
    """Returns a dict per step: step, tokens (seen so far), seconds (of training so far, resumes included), loss,
    learning_rate, gradient_norm, tokens_per_second, peak_memory_gb.  Before 0.2 there were no tokens and seconds."""
    return [parse_json(line) for line in (folder / STEP_LOG).read_text(encoding="utf-8").splitlines()]


def state_sizes(state: State) -> list[float]:
    """Returns the root mean square of each layer's matrices."""
    return state.wkv.square().mean(dim=(1, 2, 3, 4)).sqrt().tolist()


def _columns() -> int:
    """Returns the width of the progress line: the terminal's, but at most MOST_COLUMNS; 0 for no terminal."""
    found = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    return min(found, MOST_COLUMNS)


def _reopen_step_log(path: Path, first_step: int) -> tuple[IO[str], float]:
    """Drops entries that a killed run wrote after the checkpoint that this one resumes from.

    Returns the log, open for appending, and the seconds of training so far.
    """
    kept, seconds = [], 0.0
    if path.exists() and first_step > 1:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = parse_json(line)
                if entry["step"] < first_step and isinstance(entry["loss"], float):
                    kept.append(line + "\n")
                    seconds = float(entry.get("seconds", 0.0))  # older logs do not have them
            except (ValueError, KeyError, TypeError, OverflowError):
                continue  # a line that the kill cut off
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8"), seconds


def duration(seconds: float) -> str:
    """Formats seconds like 2:31 or 1:02:31."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

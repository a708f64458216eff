"""Loggers: the numbers of a run go to each program in run.loggers; one that fails never stops the run.

In: numbers by name, for a step.  All programs get the same names.  wandb and trackio are optional packages; a resumed
run continues there under the same id, which is kept in the run's folder.
"""

from __future__ import annotations

import logging
import os
import secrets
import textwrap
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from infctx.files import atomic_file
from infctx.report.csv_log import METRICS_CSV, CsvLog
from infctx.settings.config import Config
from infctx.settings.load import dump_config

TENSORBOARD = "tensorboard"
"""The folder of TensorBoard's files in a run's folder."""
RUN_ID = "run_id"
"""The file in a run's folder with its id at wandb and trackio."""
PROJECT = "infctx"
"""The project there, unless WANDB_PROJECT or TRACKIO_PROJECT names another."""
BY_LAYER = "_state_rms/"
"""Part of the names of numbers of each layer, which would be too many columns."""
CLOSE_SECONDS = 60.0
"""Time for a logger to send what it still has: without a network it would wait forever."""

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Where numbers go."""

    def send_settings(self, config: Config, step: int) -> None:
        """Sends every setting of the run."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Sends the numbers of a step, or more of them."""

    def close(self) -> None:
        """Sends the rest."""


class Loggers:
    """All loggers of a run, as one.  A logger that raises gets one line in the log, and no more numbers.

    first_step: numbers of this step and later ones, which a killed run logged, are replaced
    say:        prints a warning
    """

    def __init__(self, config: Config, first_step: int, say: Callable[[str], None] = log.warning) -> None:
        self.say = say
        self.open: dict[str, Logger] = {}
        for name in dict.fromkeys(config.run.loggers):
            self._attempt(name, partial(self._open, name, config, first_step))

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send_settings(self, config: Config, step: int) -> None:
        for name, logger in list(self.open.items()):
            self._attempt(name, partial(logger.send_settings, config, step))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, logger in list(self.open.items()):
            self._attempt(name, partial(logger.log, scalars, step))

    def close(self) -> None:
        for name, logger in list(self.open.items()):
            self._attempt(name, logger.close)
        self.open.clear()

    def _open(self, name: str, config: Config, first_step: int) -> None:
        self.open[name] = KINDS[name](config, first_step)

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, the run is worth more
            self.open.pop(name, None)
            why = " ".join(str(error).split()) or type(error).__name__
            self.say(f"{name}: gets no more numbers of this run ({why}); training continues, and steps.jsonl has all")


class _TensorBoard:
    def __init__(self, config: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(config.run.folder / TENSORBOARD), purge_step=first_step)

    def send_settings(self, config: Config, step: int) -> None:
        settings = textwrap.indent(dump_config(config), "    ")  # Markdown shows indented text unchanged
        self.writer.add_text("settings", settings, step)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Csv:
    def __init__(self, config: Config, first_step: int) -> None:
        self.rows = CsvLog(config.run.folder / METRICS_CSV, first_step)

    def send_settings(self, config: Config, step: int) -> None:
        pass  # config.yaml has them

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.rows.log({name: value for name, value in scalars.items() if BY_LAYER not in name}, step)

    def close(self) -> None:
        self.rows.close()


class _Wandb:
    """A run at wandb: `step` is its horizontal axis, since wandb's own count cannot go back when a run resumes."""

    def __init__(self, config: Config, first_step: int) -> None:
        import wandb

        folder = config.run.folder
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=run_id(folder, first_step),
            dir=folder,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, init_timeout=CLOSE_SECONDS),
        )
        self.run.define_metric("*", step_metric="step")
        offline = f"offline; `wandb sync {folder}/wandb/offline-run-*` sends it later"
        self.where = offline if self.run.offline else self.run.url

    def send_settings(self, config: Config, step: int) -> None:
        self.run.config.update(config.model_dump(mode="json"), allow_val_change=True)
        log.info("wandb: %s", self.where)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log({**scalars, "step": step})

    def close(self) -> None:
        _within(CLOSE_SECONDS, self.run.finish, "it still has numbers to send; `wandb sync` sends them later")


class _Trackio:
    def __init__(self, config: Config, first_step: int) -> None:
        import trackio

        folder = config.run.folder
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{folder.name}-{run_id(folder, first_step)}",  # trackio finds a run again by its name
            config=config.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def send_settings(self, config: Config, step: int) -> None:
        pass  # `init` has sent them

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        _within(CLOSE_SECONDS, self.run.finish, "it still has numbers to send")


KINDS: dict[str, Callable[[Config, int], Logger]] = {
    "tensorboard": _TensorBoard,
    "csv": _Csv,
    "wandb": _Wandb,
    "trackio": _Trackio,
}


def run_id(folder: Path, first_step: int) -> str:
    """Returns the id of the run in a folder: a new one for a new run, else the one that it had before."""
    path = folder / RUN_ID
    if first_step > 1 and path.is_file():
        known = path.read_text(encoding="utf-8", errors="replace").strip()
        if known.isascii() and known.isalnum() and len(known) <= 64:
            return known
    new = secrets.token_hex(4)  # not from the generators of the run, which it would change
    with atomic_file(path) as temporary:
        temporary.write_text(f"{new}\n", encoding="utf-8")
    return new


def _within(seconds: float, work: Callable[[], Any], otherwise: str) -> None:
    """Does the work; raises TimeoutError if it takes longer."""
    failed: list[Exception] = []

    def attempt() -> None:
        try:
            work()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise TimeoutError(otherwise)

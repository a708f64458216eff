"""A run's folder in; everything that a page shows of it out, read without torch.

What is missing or damaged in a log that a killed run left becomes a note; a file that somebody made and that cannot be
read is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from infctx.errors import InputError
from infctx.formats.checkpoint_folder import SETTINGS, checkpoints
from infctx.pages.measured import EVALUATION, HELD_OUT, HeldOut, HeldOutLoss, Measured, Measures, read_measures
from infctx.report.starts import ENVIRONMENT, Start, read_starts
from infctx.report.step_log import STEP_LOG
from infctx.small_texts import counted, parse_json, read_yaml


@dataclass
class RunFolder:
    """What a run's folder holds.

    name:     short, and different from those of the other runs on the page
    steps:    columns of the step log, each as long as "step"; nan where a step has no such number
    held_out: the run's own measurements; measures: those of evaluation.json
    settings: section -> setting -> value; none if they are unknown
    starts:   the machine and the plan of each start; none of runs before 0.2
    notes:    what a reader should know, such as a log that is cut off
    """

    path: Path
    name: str
    steps: dict[str, list[float]]
    held_out: list[HeldOutLoss] = field(default_factory=list)
    measures: list[Measures] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    logged: datetime | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return int(self.steps["step"][-1]) if self.steps["step"] else 0

    def setting(self, section: str, name: str) -> Any:
        return self.settings.get(section, {}).get(name)


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Reads runs, or files that `infctx evaluate --output` wrote; raises InputError for what is neither."""
    names = short_names(paths)
    return [
        _read_file(path, name) if path.is_file() else read_run(path, name)
        for path, name in zip(paths, names, strict=True)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Returns the last part of each path, with as many parts before it as make them differ."""
    if len({path.resolve() for path in paths}) < len(paths):
        twice = next(path for number, path in enumerate(paths) if path.resolve() in _resolved(paths[:number]))
        raise InputError(f"{twice}: is named twice; name each run once")
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _resolved(paths: Sequence[Path]) -> set[Path]:
    return {path.resolve() for path in paths}


def _read_file(path: Path, name: str) -> RunFolder:
    if path.suffix != ".json":
        raise InputError(f"{path}: is no run; name a run's folder, or a file that infctx evaluate --output wrote")
    return RunFolder(path, name, {"step": []}, measures=read_measures(Measured, path).models)


def read_run(path: Path, name: str) -> RunFolder:
    """Reads the folder of a run that may still be going."""
    if not path.is_dir():
        raise InputError(f"{path}: there is no such run; name a run's folder (run.folder)")
    log = path / STEP_LOG
    run = RunFolder(path, name, {"step": []})
    if log.is_file():
        run.logged = datetime.fromtimestamp(log.stat().st_mtime, timezone.utc)
        run.steps, damaged = read_columns(log)
        if damaged:
            run.notes.append(f"{STEP_LOG}: {counted(damaged, 'line')} cannot be read, such as one that a kill cut off")
    if (path / HELD_OUT).is_file():
        run.held_out = read_measures(HeldOut, path / HELD_OUT).evaluations
    if (path / EVALUATION).is_file():
        run.measures = read_measures(Measured, path / EVALUATION).models
        if run.logged and (path / EVALUATION).stat().st_mtime < log.stat().st_mtime:
            run.notes.append(f"{EVALUATION} is older than the last step: it may be about an earlier state of the run")
    if not run.steps["step"] and not run.held_out and not run.measures:
        is_run = any((path / name).exists() for name in (SETTINGS, STEP_LOG, "checkpoints"))
        what = "the run has logged no step yet" if is_run else f"is no run: it has no {STEP_LOG}"
        remedy = "train it first, or name another" if is_run else "name a run's folder (run.folder)"
        raise InputError(f"{path}: {what}; {remedy}")
    _read_settings(run)
    if (path / ENVIRONMENT).is_file():
        try:
            run.starts = read_starts(path / ENVIRONMENT)
        except (ValueError, OSError) as error:
            run.notes.append(f"{ENVIRONMENT} cannot be read ({error})")
    return run


def read_columns(log: Path) -> tuple[dict[str, list[float]], int]:
    """Returns the numbers of a step log by name, in the order of the steps, and how many lines are damaged."""
    rows: dict[int, dict[str, Any]] = {}
    damaged = 0
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = parse_json(line)
                step = entry["step"]
                if type(step) is not int:  # a bool is an int too
                    raise TypeError
                rows[step] = entry
            except (ValueError, KeyError, TypeError):
                damaged += 1
    ordered = [rows[step] for step in sorted(rows)]
    names = dict.fromkeys(str(name) for row in ordered for name in row)
    return {"step": []} | {name: [_number(row.get(name)) for row in ordered] for name in names}, damaged


def _number(value: object) -> float:
    """Returns nan for what is no number, or a larger one than any run has."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return float(value)
    return value if isinstance(value, float) else math.nan


def _read_settings(run: RunFolder) -> None:
    """Reads config.yaml; a page about results needs it less than a reader who has only the results."""
    saved = checkpoints(run.path / "checkpoints")
    path = run.path / SETTINGS
    if not path.is_file() and saved:  # runs before 0.2 have them only there
        path = saved[-1] / SETTINGS
    if not path.is_file():
        run.notes.append(f"{SETTINGS} is missing, so the settings are unknown")
        return
    try:
        content, _ = read_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    except InputError as error:
        run.notes.append(str(error))
        return
    if isinstance(content, dict) and all(isinstance(section, dict) for section in content.values()):
        run.settings = content
    else:
        run.notes.append(f"{SETTINGS} holds no settings of a run")

"""Where a run was started: environment.json in its folder, with the machine, the versions and the plan of each start.

    [{"from_step": 1, "at": "2026-03-01T12:00:00+00:00", "infctx": "0.2.0", "commit": "40b7b5bf0e1c",
      "python": "3.12.3", "torch": "2.9.0", "system": "Linux x86_64", "device": "2 CPU cores", "ranks": 1,
      "plan": ["model     Finch, ...", ...]}]

commit: of the code, if infctx runs from its repository, with "-dirty" after changes; null otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, RootModel

from infctx.files import atomic_file
from infctx.small_texts import read_json_as
from infctx.version import __version__

if TYPE_CHECKING:
    from infctx.plan.plan import Plan

ENVIRONMENT = "environment.json"
"""The file's name in a run's folder."""
GIT_SECONDS = 5
"""The longest that a start waits for the commit's name, such as on a slow network drive."""

log = logging.getLogger(__name__)


class Start(BaseModel):
    """One start of a run."""

    from_step: int
    at: str
    infctx: str
    commit: str | None
    python: str
    torch: str
    system: str
    device: str
    ranks: int
    plan: list[str]


class Starts(RootModel):
    """environment.json."""

    root: list[Start]


def read_starts(path: Path) -> list[Start]:
    """Returns the starts of a run, the first one first; raises ValueError for another file."""
    return read_json_as(Starts, path).root


def record_start(plan: Plan, first_step: int) -> None:
    """Adds a start to the run's file, in place of those after first_step, which a killed run made.

    A start of a run that is complete is none.  If the file cannot be written, there is a line in the log.
    """
    if first_step > plan.config.optimizer.steps:
        return
    path = plan.config.run.folder / ENVIRONMENT
    try:
        earlier = read_starts(path) if path.is_file() and first_step > 1 else []
    except (ValueError, OSError):
        earlier = []
    starts = [*(start for start in earlier if start.from_step < first_step), _this_start(plan, first_step)]
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(
                json.dumps([start.model_dump() for start in starts], indent=1) + "\n", encoding="utf-8"
            )
    except OSError as error:
        log.warning("%s: not written (%s); the run continues without it", path, error.strerror)


def _this_start(plan: Plan, first_step: int) -> Start:
    import torch  # readers of the file do without

    from infctx.plan.report import describe_plan

    return Start(
        from_step=first_step,
        at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        infctx=__version__,
        commit=commit_of(Path(__file__).parents[2]),
        python=platform.python_version(),
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name() if plan.device.type == "cuda" else f"{os.cpu_count()} CPU cores",
        ranks=plan.config.distributed.world_size,
        plan=describe_plan(plan) if plan.sizes else [],
    )


@cache  # what is loaded stays what it was
def commit_of(folder: Path, digits: int | None = 12) -> str | None:
    """Returns the commit that a folder is at, with "-dirty" after changes; None if it is not the top of a repository.

    digits: at least as many, None for as few as git takes
    """
    if not (folder / ".git").exists():  # a repository further up is of somebody else's project
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    command += [] if digits is None else [f"--abbrev={digits}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

"""Reads this process's rank from the environment: whether it is one, which one, and who started it.

torchrun and infctx itself set RANK, LOCAL_RANK and WORLD_SIZE; srun sets SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS.
"""

from __future__ import annotations

import os

LAUNCHER = "INFCTX_LAUNCHER"
"""Set for ranks that `infctx` itself starts on one machine: the process ID of the launcher."""


def is_rank() -> bool:
    """Returns whether this process is already a rank, started by us, torchrun or srun."""
    if "LOCAL_RANK" in os.environ:
        return True
    in_slurm = "SLURM_PROCID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
    return in_slurm and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def rank_number() -> int:
    """Returns this rank's number across all nodes; 0 if the process is not a rank."""
    return _number("RANK", "SLURM_PROCID") or 0


def local_rank() -> int | None:
    """Returns this rank's number on its node; None if the process is not a rank."""
    return _number("LOCAL_RANK", "SLURM_LOCALID")


def ranks_started() -> int | None:
    """Returns how many ranks torchrun, srun or `infctx` started; None if the process is not a rank."""
    return (_number("WORLD_SIZE", "SLURM_NTASKS") or 1) if is_rank() else None


def started_by_launcher() -> bool:
    """Returns whether `infctx` itself started this rank; it has then checked the machine already."""
    return LAUNCHER in os.environ


def _number(*names: str) -> int | None:
    """Returns the first of these variables that holds a whole number."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), None)

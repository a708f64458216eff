"""What the environment says of this process: whether it is a rank of a run, which one, and who started it.

torchrun and infctx itself set RANK, LOCAL_RANK and WORLD_SIZE, srun sets SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS.
"""

from __future__ import annotations

import os

LAUNCHER = "INFCTX_LAUNCHER"
"""Set for the ranks that `infctx` itself starts on one machine: the number of the process that did."""


def is_rank() -> bool:
    """Whether this process is one of the ranks of a run already: of ours, of torchrun or of srun."""
    if "LOCAL_RANK" in os.environ:
        return True
    in_slurm = "SLURM_PROCID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
    return in_slurm and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def rank_number() -> int:
    """The number of this rank among those of all nodes; 0 for a process that is no rank."""
    return _number("RANK", "SLURM_PROCID") or 0


def local_rank() -> int | None:
    """The number of this rank among those of its node; None for a process that is no rank."""
    return _number("LOCAL_RANK", "SLURM_LOCALID")


def ranks_started() -> int | None:
    """How many ranks torchrun, srun or `infctx` itself has started, None for a process that is no rank."""
    return (_number("WORLD_SIZE", "SLURM_NTASKS") or 1) if is_rank() else None


def started_by_launcher() -> bool:
    """Whether `infctx` itself started this rank, on one machine, and has looked whether that has all that it needs."""
    return LAUNCHER in os.environ


def _number(*names: str) -> int | None:
    """The first of these variables that holds a whole number."""
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), None)

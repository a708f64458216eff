"""The dtype of states and log decays."""

from __future__ import annotations

import torch


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns fp64 for an fp64 model, fp32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32

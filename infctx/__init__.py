"""infctx trains RWKV-5 (Eagle) and RWKV-6 (Finch) on documents of any length.

The public interface is the names below; each is described at its definition.  They are looked up at first use, so
that `import infctx` costs nothing and commands that need no model do not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infctx.errors import InputError
    from infctx.formats.state_file import load_state, save_state
    from infctx.formats.weights import load_model, save_weights
    from infctx.model.build import build_model
    from infctx.model.state import State
    from infctx.recurrence.wkv import wkv
    from infctx.train.window import window_backward

__all__ = [
    "InputError",
    "State",
    "build_model",
    "load_model",
    "load_state",
    "save_state",
    "save_weights",
    "window_backward",
    "wkv",
]
__version__ = "0.1.0"

_DEFINED_IN = {
    "InputError": "infctx.errors",
    "State": "infctx.model.state",
    "build_model": "infctx.model.build",
    "load_model": "infctx.formats.weights",
    "load_state": "infctx.formats.state_file",
    "save_state": "infctx.formats.state_file",
    "save_weights": "infctx.formats.weights",
    "window_backward": "infctx.train.window",
    "wkv": "infctx.recurrence.wkv",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'infctx' has no attribute {name!r}")
    return getattr(importlib.import_module(_DEFINED_IN[name]), name)

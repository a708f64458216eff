"""infctx trains RWKV-5 (Eagle), RWKV-6 (Finch) and RWKV-7 (Goose) on documents of any length.

The names below are the public interface; each is documented where it is defined.  They are loaded at first use, so
`import infctx` costs nothing and commands that need no model do not load torch.  examples/ shows how to use them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from infctx.version import __version__ as __version__

if TYPE_CHECKING:
    from infctx.data.token_store import TokenStore
    from infctx.data.tokenizer import get_tokenizer as tokenizer
    from infctx.errors import InputError
    from infctx.evaluate.generate import generate
    from infctx.formats.model_files import load_model
    from infctx.formats.state_file import load_state, save_state
    from infctx.formats.weights import save_weights
    from infctx.model.build import build_model
    from infctx.model.rwkv import RWKV
    from infctx.model.state import State
    from infctx.ops.wkv import wkv, wkv7
    from infctx.train.window import window_backward

__all__ = [
    "InputError",
    "RWKV",
    "State",
    "TokenStore",
    "build_model",
    "generate",
    "load_model",
    "load_state",
    "save_state",
    "save_weights",
    "tokenizer",
    "window_backward",
    "wkv",
    "wkv7",
]

_DEFINED_AS = {
    "InputError": "infctx.errors.InputError",
    "RWKV": "infctx.model.rwkv.RWKV",
    "State": "infctx.model.state.State",
    "TokenStore": "infctx.data.token_store.TokenStore",
    "build_model": "infctx.model.build.build_model",
    "generate": "infctx.evaluate.generate.generate",
    "load_model": "infctx.formats.model_files.load_model",
    "load_state": "infctx.formats.state_file.load_state",
    "save_state": "infctx.formats.state_file.save_state",
    "save_weights": "infctx.formats.weights.save_weights",
    "tokenizer": "infctx.data.tokenizer.get_tokenizer",
    "window_backward": "infctx.train.window.window_backward",
    "wkv": "infctx.ops.wkv.wkv",
    "wkv7": "infctx.ops.wkv.wkv7",
}


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # type checkers use the imports above; with this they would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _DEFINED_AS:
            raise AttributeError(f"module 'infctx' has no attribute {name!r}")
        module, _, defined = _DEFINED_AS[name].rpartition(".")
        return getattr(importlib.import_module(module), defined)

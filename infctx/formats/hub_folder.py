"""A model in Hugging Face's layout: weights in, a folder with model.safetensors and config.json out.

`infctx.load_model` and `infctx export` read it back with every value unchanged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from infctx.errors import InputError
from infctx.files import atomic_folder
from infctx.formats.weights import StoredWeights, copy_weights
from infctx.model.sizes import Sizes

WEIGHTS, CONFIG = "model.safetensors", "config.json"

CODE = {5: "RWKV/rwkv-5-world-1b5", 6: "RWKV/v6-Finch-1B6-HF"}
"""Version -> a repository on the hub with the model's Python code and the World tokenizer."""


def write_hub_folder(stored: StoredWeights, path: Path, dtype: torch.dtype, names: str) -> int:
    """Writes the folder completely or not at all, without an initial state; returns the number of tensors.

    names: "huggingface", for the remote code of Rwkv5ForCausalLM and Rwkv6ForCausalLM, or "fla" (RWKV-6 and RWKV-7)
    An existing folder is replaced if it holds only files that this function writes.  Raises InputError if it holds
    others, if the other code cannot have these sizes, and for everything that `copy_weights` refuses.
    """
    path = path.resolve() if path.is_symlink() else path
    _refuse_other_files(path)
    config = hub_config(stored.sizes, names, dtype, path)
    with atomic_folder(path) as temporary:
        try:
            num_tensors = copy_weights(stored, temporary / WEIGHTS, dtype, names, state={})
        except InputError as error:  # the temporary name means nothing to the user
            raise InputError(str(error).replace(str(temporary), str(path))) from None
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return num_tensors


def hub_config(sizes: Sizes, names: str, dtype: torch.dtype, path: Path) -> dict[str, Any]:
    """Returns the content of config.json; path: its folder, for messages."""
    shared = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "intermediate_size": sizes.ffn_width,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return (_fla_config(sizes) if names == "fla" else _huggingface_config(sizes, path)) | shared


def _huggingface_config(sizes: Sizes, path: Path) -> dict[str, Any]:
    """Returns the fields of configuration_rwkv5.py or configuration_rwkv6.py in the repositories of CODE."""
    if sizes.version not in CODE:
        raise InputError(f"{path}: Hugging Face's repositories have no code for RWKV-{sizes.version}; give --names fla")
    _refuse_other_sizes(sizes, path)
    name = f"rwkv{sizes.version}"
    return {
        "architectures": [f"{name.capitalize()}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{name}.{name.capitalize()}Config",
            "AutoModelForCausalLM": f"modeling_{name}.{name.capitalize()}ForCausalLM",
        },
        "model_type": name,
        "attention_hidden_size": sizes.width,
        "head_size": sizes.head_size,
        "head_size_divisor": 8,  # the heads' norm has eps = 1e-5 * 8 * 8
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 6,
    }


def _refuse_other_sizes(sizes: Sizes, path: Path) -> None:
    """Raises InputError for sizes that Hugging Face's code would derive differently from the width."""
    derived = {"ffn_width": int(3.5 * sizes.width) // 32 * 32}
    if sizes.version == 6:
        derived |= {"mix_rank": 64, "decay_rank": 128} if sizes.width == 4096 else {"mix_rank": 32, "decay_rank": 64}
    for name, size in derived.items():
        if getattr(sizes, name) != size:
            raise InputError(
                f"{path}: with width {sizes.width}, Hugging Face's code has {name} {size}, and this model has "
                f"{getattr(sizes, name)}; export a file, such as {path.name}.safetensors"
            )


def _fla_config(sizes: Sizes) -> dict[str, Any]:
    """Returns the fields of fla's RWKV6Config or RWKV7Config; Eagle, which fla does not have, is refused later."""
    ranks = {"proj_low_rank_dim": sizes.mix_rank, "gate_low_rank_dim": sizes.decay_rank}
    heads: dict[str, Any] = {"num_heads": sizes.num_heads, "expand_k": 1.0, "expand_v": 1.0}
    if sizes.version == 7:
        ranks = {"decay_low_rank_dim": sizes.decay_rank, "gate_low_rank_dim": sizes.gate_rank}
        ranks |= {"a_low_rank_dim": sizes.rate_rank, "v_low_rank_dim": sizes.value_rank}
        heads = {"head_dim": sizes.head_size, "hidden_ratio": sizes.ffn_width / sizes.width}
    name = 7 if sizes.version == 7 else 6
    return {"architectures": [f"RWKV{name}ForCausalLM"], "model_type": f"rwkv{name}", **heads, **ranks} | {
        "attn_mode": "chunk",
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "fuse_norm": True,
    }


def _refuse_other_files(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: is a file; choose another name for the folder")
    others = sorted(file.name for file in path.iterdir() if file.name not in (WEIGHTS, CONFIG))
    if others:
        raise InputError(f"{path}: also holds {others[0]}, which is not part of an export; choose another folder")

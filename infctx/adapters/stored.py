"""An adapter under the names of peft and RWKV-PEFT, and what its adapter_config.json says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, Field, model_validator

from infctx.settings.adapter import AdapterSettings, Target

# RWKV-PEFT (Joluck/RWKV-PEFT 259effb, rwkvt/lightning_train/trainer.py and rwkvt/rwkvpeft/peft_loading.py) saves with
# peft's save_pretrained: a folder with these two files.  The names are those of peft (huggingface/peft 04c69f4): of its
# wrapper, the module, and the parameter without the adapter's name.
MODEL_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
STEM = "base_model.model."
PARTS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector", "block": "miss_block"}
"""The parameters of our adapters, and their names in files."""
LOOKUP_PARTS = {"down": "lora_embedding_A", "up": "lora_embedding_B"}
"""The same of the embedding's adapter.  RWKV-PEFT makes none beside head and embedding, but peft reads these."""
OLD_PARTS = {"down": "lora_A", "up": "lora_B", "block": "disha"}
"""The same in RWKV-PEFT's .pth files from before it used peft (LoraLinear, BoneLinear), which have no STEM."""
FORMS = {"lora": ("down", "up"), "dora": ("down", "up", "magnitude"), "miss": ("block",)}
"""The parameters of each form."""
TARGETS = get_args(Target)


class Kind(NamedTuple):
    """What a file's adapters compute: their form, and the factor of lora's and dora's product."""

    form: Literal["lora", "dora", "miss"]
    scale: float


def stored_name(name: str, official: Mapping[str, str]) -> str:
    """Returns the name in a file of a parameter that learns: of an adapter, or of another weight.

    official: our name -> official name of every weight
    """
    matrix, is_adapter, part = name.partition(".adapter.")
    if not is_adapter:
        return official[name]
    parts = LOOKUP_PARTS if matrix == "embedding" else PARTS
    return f"{STEM}{official[f'{matrix}.weight'].removesuffix('weight')}{parts[part]}"


def our_name(stored: str, ours: Mapping[str, str]) -> str | None:
    """Inverts `stored_name`, also for OLD_PARTS; None for a name of something else.

    ours: official name -> our name of every weight
    """
    if stored in ours:
        return ours[stored]
    parts = (*PARTS.items(), *LOOKUP_PARTS.items()) if stored.startswith(STEM) else OLD_PARTS.items()
    for part, suffix in parts:
        matrix = ours.get(f"{stored.removeprefix(STEM).removesuffix(suffix)}weight", "").removesuffix(".weight")
        is_lookup = suffix in LOOKUP_PARTS.values()
        if stored.endswith(f".{suffix}") and is_lookup == (matrix == "embedding"):
            return f"{matrix}.adapter.{part}" if matrix else None
    return None


def holds_adapter(names: Iterable[str]) -> bool:
    """Returns whether the tensors of a file are an adapter, of this or RWKV-PEFT's old form."""
    return any(
        name.startswith(STEM) or name.endswith(tuple(f".{part}" for part in OLD_PARTS.values())) for name in names
    )


def old_kind(shapes: Mapping[str, Sequence[int]]) -> OldKind | None:
    """Returns what a file of RWKV-PEFT's old form says by its tensors' names and shapes; None for another file."""
    for name, shape in shapes.items():
        part = name.rpartition(".")[2]
        if part in OLD_PARTS.values() and not name.startswith(STEM) and shape:
            return OldKind("miss" if part == "disha" else "lora", shape[1] if part == "lora_B" else shape[0])
    return None


class OldKind(NamedTuple):
    """The form and the rank of an adapter of RWKV-PEFT's old form; it does not have lora's factor."""

    form: Literal["lora", "miss"]
    rank: int


class Header(BaseModel):
    """What our files say of their adapter.

    weights: fingerprint of the weights that it learned over
    """

    weights: Annotated[str, Field(max_length=64)]
    form: Literal["lora", "dora", "miss"]
    rank: Annotated[int, Field(gt=0)]
    scale: Annotated[float, Field(gt=0, lt=float("inf"))]
    dropout: Annotated[float, Field(ge=0, lt=1)]

    @classmethod
    def of(cls, settings: AdapterSettings, tuned_over: str) -> Header:
        form, rank, scale, dropout = settings.form, settings.rank, settings.scale, settings.dropout
        return cls(weights=tuned_over, form=form, rank=rank, scale=scale, dropout=dropout)

    def kind(self) -> Kind:
        return Kind(self.form, self.scale)


def peft_config(header: Header, stored: list[str]) -> dict[str, Any]:
    """Returns the content of adapter_config.json.

    stored: names of the adapter's tensors in the file
    """
    parts = (*PARTS.values(), *LOOKUP_PARTS.values())
    matrices = {name.removeprefix(STEM).removesuffix(f".{part}") for name in stored for part in parts}
    targets = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in matrices} & set(TARGETS))
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": header.rank,
        "target_modules": targets,
    }
    if header.form == "miss":
        return {"peft_type": "MISS", **config, "miss_dropout": header.dropout, "mini_r": 1, "init_weights": True}
    config |= {"lora_alpha": header.scale * header.rank, "lora_dropout": header.dropout}
    config |= {"use_dora": header.form == "dora", "bias": "none", "fan_in_fan_out": False}
    return {"peft_type": "LORA", **config}


class PeftConfig(BaseModel):
    """What matters in an adapter_config.json."""

    peft_type: Literal["LORA", "MISS", "BONE"]
    r: Annotated[int, Field(gt=0)]
    lora_alpha: Annotated[float, Field(gt=0, lt=float("inf"))] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, Any] | None = None
    alpha_pattern: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_readable(self) -> PeftConfig:
        if self.rank_pattern or self.alpha_pattern or self.use_rslora or isinstance(self.init_weights, str):
            raise ValueError("has several ranks or alphas, rslora, bat or mini; only the plain forms can be read")
        if self.peft_type == "LORA" and self.lora_alpha is None:
            raise ValueError("lora_alpha is missing")
        return self

    @property
    def weights(self) -> None:
        """Unknown, see `Header`."""

    def kind(self) -> Kind:
        if self.peft_type != "LORA":
            return Kind("miss", 1.0)
        return Kind("dora" if self.use_dora else "lora", (self.lora_alpha or 0) / self.r)

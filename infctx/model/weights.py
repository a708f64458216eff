"""Models on disk, the only file that knows RWKV's stored names: `.pth` or `.safetensors` in and out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from infctx.errors import InputError
from infctx.model.initialise import initialise
from infctx.model.rwkv import RWKV
from infctx.model.sizes import Sizes, make_sizes, published_sizes
from infctx.model.state import state_dtype
from infctx.model.tensor_file import read_shapes, read_tensors, write_tensors

Shape = tuple[int, ...]

CHECKPOINT_WEIGHTS = "model.safetensors"
"""The file of a checkpoint folder that holds the model."""


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", backend: str = "auto"
) -> RWKV:
    """Reads a model of RWKV-5.2 or RWKV-6 with its official names; version and every size come from the file.

    path: a `.pth` (a dict of tensors; no code in it is run), a `.safetensors`, or a checkpoint folder of infctx.
    `blocks.N.att.time_state` tensors, if there, become the model's initial state.

    Raises InputError naming the file and the tensor for anything else.
    """
    path = _weights_file(path)
    shapes = read_shapes(path)
    sizes = _sizes_of(shapes, path)
    with_state = any(_is_state(name) for name in shapes)
    model = _empty_model(sizes, backend, with_state)
    names = stored_names(sizes)
    _check_shapes(shapes, model, names, path)
    stored = read_tensors(path)
    tensors = {ours: stored[name].to(device=device, dtype=dtype, copy=True) for ours, name in names.items()}
    if with_state:
        value_major = torch.stack([stored[_state_name(layer)] for layer in range(sizes.num_layers)])
        tensors["initial_wkv"] = value_major.mT.contiguous().to(device=device, dtype=state_dtype(dtype))
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_()


def build_model(
    name: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    backend: str = "auto",
    **sizes: int,
) -> RWKV:
    """A new model with the official initialisation; device "meta" takes no memory and draws no weights.

    name: a published size, such as "finch-3b"; or sizes by keyword: version, num_layers, width, and optionally
    vocab_size, head_size, ffn_width, mix_rank, decay_rank (see `infctx.model.sizes.make_sizes`).
    """
    if (name is None) == (not sizes):
        raise InputError("build_model: give the name of a published size, or version, num_layers, width, ...")
    model = _empty_model(published_sizes(name) if name else make_sizes(**sizes), backend).to(dtype)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    initialise(model, seed)
    return model


def read_sizes(path: str | Path) -> Sizes:
    """Version and sizes of a weights file, without loading it."""
    path = _weights_file(path)
    return _sizes_of(read_shapes(path), path)


def save_weights(model: RWKV, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes the model under the official names and in their order: `.pth` or `.safetensors` by the suffix, atomic.

    dtype: what the weights are stored in, None for what they are.  A learned initial state is stored with them,
    value-major, as `blocks.N.att.time_state`.  Raises InputError for another suffix and for values beyond the dtype.
    """
    tensors = stored_tensors(model)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtype or tensor.dtype)
        if not torch.isfinite(tensors[name]).all() and torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} has values beyond the range of {dtype}; choose another dtype")
    write_tensors(tensors, Path(path))


def _weights_file(path: str | Path) -> Path:
    """A checkpoint folder stands for the weights in it."""
    path = Path(path)
    return path / CHECKPOINT_WEIGHTS if path.is_dir() else path


def stored_tensors(model: RWKV) -> dict[str, Tensor]:
    """Official name -> tensor, on the CPU, contiguous, in the official order."""
    ours = model.state_dict()
    tensors = {name: ours[our].cpu().contiguous() for our, name in stored_names(model.sizes).items()}
    if model.initial_wkv is not None:
        for layer, wkv in enumerate(model.initial_wkv.detach().cpu()):
            tensors[_state_name(layer)] = wkv.mT.contiguous()
    return tensors


def stored_names(sizes: Sizes) -> dict[str, str]:
    """Our parameter name -> official name of every weight, in the official order; the initial state is apart."""
    names = {"embedding.weight": "emb.weight"}
    for layer in range(sizes.num_layers):
        for ours, stored in _block_names(sizes.version, first=layer == 0).items():
            ours = ours if ours.startswith("embedding_norm") else f"blocks.{layer}.{ours}"
            names[ours] = f"blocks.{layer}.{stored}"
    return names | {
        "output_norm.weight": "ln_out.weight",
        "output_norm.bias": "ln_out.bias",
        "head.weight": "head.weight",
    }


def _block_names(version: int, first: bool) -> dict[str, str]:
    norms = {"time_norm": "ln1", "channel_norm": "ln2"} | ({"embedding_norm": "ln0"} if first else {})
    kind = "time_mix" if version == 5 else "time_maa"
    letters = {"key": "k", "value": "v", "receptance": "r", "gate": "g"}
    if version == 6:
        letters = {"inner": "x", "decay": "w"} | letters
    mixing = {f"mix_{word}": f"{kind}_{letter}" for word, letter in letters.items()}
    if version == 6:
        mixing |= {"mix_down": "time_maa_w1", "mix_up": "time_maa_w2"}
    mixing["decay"] = "time_decay"
    if version == 6:
        mixing |= {"decay_down": "time_decay_w1", "decay_up": "time_decay_w2"}
    matrices = ("receptance", "key", "value", "output", "gate")
    return (
        {f"{ours}.{part}": f"{stored}.{part}" for ours, stored in norms.items() for part in ("weight", "bias")}
        | {f"time_mix.mixing.{ours}": f"att.{stored}" for ours, stored in mixing.items()}
        | {"time_mix.bonus": "att.time_faaaa"}
        | {f"time_mix.{matrix}.weight": f"att.{matrix}.weight" for matrix in matrices}
        | {f"time_mix.head_norm.{part}": f"att.ln_x.{part}" for part in ("weight", "bias")}
        | {"channel_mix.mix_key": f"ffn.{kind}_k", "channel_mix.mix_receptance": f"ffn.{kind}_r"}
        | {f"channel_mix.{matrix}.weight": f"ffn.{matrix}.weight" for matrix in ("key", "receptance", "value")}
    )


def _state_name(layer: int) -> str:
    return f"blocks.{layer}.att.time_state"


def _is_state(name: str) -> bool:
    return name.endswith(".att.time_state")


def _empty_model(sizes: Sizes, backend: str, with_state: bool = False) -> RWKV:
    """The module on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = RWKV(sizes, backend)
        if with_state:
            model.add_initial_state()
    return model


def _sizes_of(shapes: Mapping[str, Shape], path: Path) -> Sizes:
    """Version and all sizes from names and shapes; raises InputError for other architectures, naming the tensor."""
    _refuse_other_architectures(shapes, path)

    def shape(name: str, ndim: int) -> Shape:
        if name not in shapes:
            raise InputError(f"{path}: tensor {name} is missing; not a whole model of RWKV-5.2 or RWKV-6")
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise InputError(f"{path}: tensor {name} has the odd shape {shapes[name]}; {ndim} dimensions are expected")
        return shapes[name]

    version = 6 if any("time_maa" in name for name in shapes) else 5
    vocab_size, width = shape("emb.weight", 2)
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    num_layers = max(layers, default=0) + 1
    for layer in range(num_layers):  # before anything is built for them
        shape(f"blocks.{layer}.ln1.weight", 1)
    given = {
        "num_layers": num_layers,
        "head_size": shape("blocks.0.att.time_faaaa", 2)[1],
        "ffn_width": shape("blocks.0.ffn.key.weight", 2)[0],
    }
    if version == 6:
        given["mix_rank"] = shape("blocks.0.att.time_maa_w2", 3)[1]
        given["decay_rank"] = shape("blocks.0.att.time_decay_w1", 2)[1]
    try:
        return make_sizes(version=version, width=width, vocab_size=vocab_size, **given)
    except InputError as error:
        told_by = ", ".join(f"{name} {shapes[name]}" for name in ("emb.weight", "blocks.0.att.time_faaaa"))
        raise InputError(f"{path}: the sizes of the tensors {told_by} do not fit together: {error}") from None


def _refuse_other_architectures(shapes: Mapping[str, Shape], path: Path) -> None:
    telling = {"x_r": "RWKV-7", "w0": "RWKV-7", "r_k": "RWKV-7", "time_first": "RWKV-4 or RWKV-5.0/5.1"}
    for name, architecture in telling.items():
        name = f"blocks.0.att.{name}"
        if name in shapes:
            raise InputError(f"{path}: tensor {name} is of {architecture}; infctx reads RWKV-5.2 and RWKV-6")
    if "emb.weight" not in shapes:
        found = ", ".join(sorted(shapes)[:2]) or "nothing"
        raise InputError(f"{path}: tensor emb.weight is missing (found {found}); infctx reads RWKV-5.2 and RWKV-6")


def _check_shapes(shapes: Mapping[str, Shape], model: RWKV, names: Mapping[str, str], path: Path) -> None:
    """Every tensor of the model is in the file with its shape, and nothing else is."""
    sizes = model.sizes
    expected = {names[ours]: tuple(p.shape) for ours, p in model.state_dict().items() if ours in names}
    if model.initial_wkv is not None:
        shape = (sizes.num_heads, sizes.head_size, sizes.head_size)
        expected |= {_state_name(layer): shape for layer in range(sizes.num_layers)}
    for name, shape in expected.items():
        if name not in shapes:
            raise InputError(f"{path}: tensor {name} is missing; not a whole model of RWKV-{sizes.version}")
        if shapes[name] != shape:
            raise InputError(
                f"{path}: tensor {name} has shape {shapes[name]}; {shape} would go with width "
                f"{sizes.width}, {sizes.num_heads} heads of {sizes.head_size} and {sizes.num_layers} layers"
            )
    for name in shapes:
        if name not in expected:
            raise InputError(f"{path}: tensor {name} does not belong to RWKV-{sizes.version}; remove it from the file")

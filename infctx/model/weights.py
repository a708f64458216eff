"""Models on disk: `.pth` or `.safetensors` in and out, under the official names (`stored_names`)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from infctx.errors import InputError
from infctx.model.initialise import initialise
from infctx.model.other_names import naming_of, to_official
from infctx.model.rwkv import RWKV
from infctx.model.sizes import Sizes, make_sizes, published_sizes
from infctx.model.state import state_dtype
from infctx.model.stored_names import stored_names
from infctx.model.tensor_file import narrow, read_shapes, read_tensors, weight_files, write_tensors

Shape = tuple[int, ...]

CHECKPOINT_WEIGHTS = "model.safetensors"
"""The file of a checkpoint folder that holds the model."""


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", backend: str = "auto"
) -> RWKV:
    """Reads a model of RWKV-5.2 or RWKV-6; version and every size come from the file.

    path: a `.pth` (a dict of tensors; no code in it is run) or a `.safetensors`, with the official names, those of
    Hugging Face's rwkv-5-world and rwkv-6-world, or those of fla; a checkpoint folder of infctx, or a folder as Hugging
    Face's libraries write it, in one file or several.
    `blocks.N.att.time_state` tensors, if there, become the model's initial state.

    Raises InputError naming the file and the tensor for anything else.
    """
    path, shapes, read = _open(Path(path))
    sizes = _sizes_of(shapes, path)
    with_state = any(is_state_name(name) for name in shapes)
    model = _empty_model(sizes, backend, with_state)
    names = stored_names(sizes)
    _check_shapes(shapes, model, names, path)
    stored = read()
    tensors = {ours: stored[name].to(device=device, dtype=dtype, copy=True) for ours, name in names.items()}
    if with_state:
        value_major = torch.stack([stored[state_name(layer)] for layer in range(sizes.num_layers)])
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
    path, shapes, _ = _open(Path(path))
    return _sizes_of(shapes, path)


def save_weights(model: RWKV, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes the model under the official names and in their order: `.pth` or `.safetensors` by the suffix, atomic.

    dtype: what the weights are stored in, None for what they are.  A learned initial state is stored with them, in
    fp32, value-major, as `blocks.N.att.time_state`.  Raises InputError for another suffix, for values beyond the dtype
    and for learned shift vectors, which these files have no place for.
    """
    if model.initial_time_shift is not None or model.initial_channel_shift is not None:
        raise InputError(
            f"{path}: the model has learned shift vectors, and files of weights have no place for them; save its state "
            "with infctx.save_state in form infctx"
        )
    tensors = stored_tensors(model)
    states = {name: tensor for name, tensor in tensors.items() if is_state_name(name)}
    write_tensors(narrow(tensors, dtype, path) | states, Path(path))


def fingerprint(model: RWKV) -> str:
    """Tells models apart, 16 hex digits: of the weights as bf16, whatever they are held in; not of the initial state.

    Sums of the bits at every place, every third, seventh and eleventh: any device works them out, in no memory.
    """
    digest = hashlib.sha256()
    for name in stored_names(model.sizes):
        bits = model.get_parameter(name).detach().to(torch.bfloat16).flatten().view(torch.int16)
        sums = [int(bits[::stride].sum(dtype=torch.int64)) for stride in (1, 3, 7, 11)]
        digest.update(f"{name} {bits.numel()} {sums}".encode())
    return digest.hexdigest()[:16]


def stored_tensors(model: RWKV) -> dict[str, Tensor]:
    """Official name -> tensor, on the CPU, contiguous, in the official order."""
    ours = model.state_dict()
    tensors = {name: ours[our].cpu().contiguous() for our, name in stored_names(model.sizes).items()}
    state = model.learned_state()
    if state is not None:
        for layer, wkv in enumerate(state.wkv[:, 0].cpu()):
            tensors[state_name(layer)] = wkv.mT.contiguous()
    return tensors


def state_name(layer: int) -> str:
    return f"blocks.{layer}.att.time_state"


def is_state_name(name: str) -> bool:
    return re.fullmatch(r"blocks\.\d{1,4}\.att\.time_state", name) is not None


def _open(path: Path) -> tuple[Path, dict[str, Shape], Callable[[], dict[str, Tensor]]]:
    """The file (or folder) to name in messages, the shapes in it under official names, and what reads the tensors."""
    files = weight_files(path)
    path = files[0] if len(files) == 1 else path
    shapes = {name: shape for file in files for name, shape in read_shapes(file).items()}

    def read() -> dict[str, Tensor]:
        return {name: tensor for file in files for name, tensor in read_tensors(file).items()}

    if naming_of(shapes) == "official":
        return path, shapes, read
    tensors = to_official(read(), path)
    return path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, lambda: tensors


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
        expected |= {state_name(layer): shape for layer in range(sizes.num_layers)}
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

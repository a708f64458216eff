"""Models on disk: `.pth` or `.safetensors` in and out, under the official names (`stored_names`)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.errors import InputError
from infctx.formats.other_names import ways_from_official, ways_to_official
from infctx.formats.stored_names import stored_names
from infctx.formats.tensor_file import narrow, weight_files, write_tensors
from infctx.formats.tensor_stream import LazyTensors, StoredTensors, stream_tensors
from infctx.model.build import empty_model
from infctx.model.rwkv import RWKV, Compute
from infctx.model.sizes import Sizes, make_sizes
from infctx.recurrence.precision import state_dtype

Shape = tuple[int, ...]

FINGERPRINT_KIND = "sha256:"
"""What a fingerprint begins with; those of 0.1.0, which two values exchanged could escape, begin with nothing."""
HASHED_AT_ONCE = 1 << 20
"""Values, which are 2 MB as bf16."""


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
    return read_model(open_weights(path), dtype, device, Compute(backend=backend))


def read_model(
    stored: StoredWeights,
    dtype: torch.dtype,
    device: torch.device | str,
    compute: Compute = Compute(),  # noqa: B008
) -> RWKV:
    """`load_model` of weights that are open."""
    model = empty_model(stored.sizes, compute, stored.has_state)
    names = stored_names(stored.sizes)
    tensors = {ours: stored.tensors[name].to(device=device, dtype=dtype, copy=True) for ours, name in names.items()}
    if stored.has_state:
        tensors["initial_wkv"] = stored.initial_wkv().to(device=device, dtype=state_dtype(dtype))
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_()


def read_sizes(path: str | Path) -> Sizes:
    """Version and sizes of a weights file, without loading it."""
    return _open(Path(path)).sizes


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


class StoredWeights(NamedTuple):
    """A model on disk, its names and shapes checked, of which tensors are read as they are looked up."""

    path: Path
    """The file or folder that messages name."""
    sizes: Sizes
    tensors: LazyTensors
    """Official name -> tensor, in the dtype that it is stored in."""

    @property
    def has_state(self) -> bool:
        return any(is_state_name(name) for name in self.tensors)

    def initial_wkv(self) -> Tensor:
        """The initial state among the weights, (L, H, N, N) key by value, in its own dtype."""
        value_major = torch.stack([self.tensors[state_name(layer)] for layer in range(self.sizes.num_layers)])
        return value_major.mT.contiguous()


def open_weights(path: str | Path) -> StoredWeights:
    """What `load_model` reads, checked and refused as there, but no more of it in memory than what is looked up."""
    stored = _open(Path(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.tensors.plan.items()}
    model = empty_model(stored.sizes, with_state=stored.has_state)
    _check_shapes(shapes, model, stored_names(stored.sizes), stored.path)
    return stored


def copy_weights(
    stored: StoredWeights,
    path: Path,
    dtype: torch.dtype,
    naming: str = "official",
    state: Mapping[str, Tensor] | None = None,
) -> int:
    """Writes what `save_weights` would of the model loaded in fp32, holding one tensor at a time; returns how many.

    naming: whose names the tensors get; others than the official ones have no place for an initial state
    state:  official name -> fp32 tensor of the initial state, value-major; None for what is stored
    Peak memory is some one and a half times the largest tensor in fp32, three times where it has values that are not
    finite, and what `StoredTensors` says of the file that is read.
    """

    def read(name: str) -> Tensor:
        if is_state_name(name):
            return stored.tensors[name].float() if state is None else state[name]
        return narrow({name: stored.tensors[name].float()}, dtype, path)[name]

    shapes = {name: stored.tensors.plan[name].shape for name in stored_names(stored.sizes).values()}
    plan = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    for layer in range(stored.sizes.num_layers):
        name = state_name(layer)
        if name in (stored.tensors if state is None else state):
            shape = (stored.tensors.plan if state is None else state)[name].shape
            plan[name] = torch.empty(shape, dtype=torch.float32, device="meta")
    official = LazyTensors(plan, read)
    ways = ways_from_official(plan, naming, path)
    theirs = LazyTensors({name: way(plan) for name, way in ways.items()}, lambda name: ways[name](official))
    stream_tensors(theirs, path)
    return len(theirs)


def fingerprint(model: RWKV | StoredWeights) -> str:
    """Identifies weights, as `sha256:` and 16 hex digits: of their bits as bf16, whatever they are held in.

    The initial state is not part of it.  Reads every value once, a few MB at a time; 3B of them take seconds.
    """
    digest = hashlib.sha256()
    for name, weight in _weights(model):
        digest.update(f"{name} {weight.numel()} ".encode())
        for piece in weight.flatten().split(HASHED_AT_ONCE):
            digest.update(piece.to(torch.bfloat16).view(torch.int16).cpu().numpy().data)
    return f"{FINGERPRINT_KIND}{digest.hexdigest()[:16]}"


def has_fingerprint(model: RWKV | StoredWeights, mark: str) -> bool:
    """Whether a mark is the fingerprint of these weights, by this version or by 0.1.0, whose marks have no prefix."""
    return mark == (fingerprint(model) if ":" in mark else _fingerprint_of_0_1_0(model))


def _fingerprint_of_0_1_0(model: RWKV | StoredWeights) -> str:
    """Of the sums of the bits at every place, every third, seventh and eleventh."""
    digest = hashlib.sha256()
    for name, weight in _weights(model):
        bits = weight.to(torch.bfloat16).flatten().view(torch.int16)
        sums = [
            sum(int(piece.sum(dtype=torch.int64)) for piece in bits[::stride].split(1 << 22))
            for stride in (1, 3, 7, 11)
        ]
        digest.update(f"{name} {bits.numel()} {sums}".encode())
    return digest.hexdigest()[:16]


def _weights(model: RWKV | StoredWeights) -> Iterator[tuple[str, Tensor]]:
    """Our name and the values of every weight, of a file rounded to fp32 as the model would be; not the state."""
    for name, official in stored_names(model.sizes).items():
        if isinstance(model, StoredWeights):
            yield name, model.tensors[official].float()
        else:
            yield name, model.get_parameter(name).detach()


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


def _open(path: Path) -> StoredWeights:
    """A model on disk, of which the names and shapes have told the sizes, and are not checked any further."""
    files = weight_files(path)
    path = files[0] if len(files) == 1 else path
    theirs = StoredTensors(files)
    empty = {name: _empty_tensor(name, shape, path) for name, shape in theirs.shapes.items()}
    ways = ways_to_official(empty, path)
    plan = {name: way(empty) for name, way in ways.items()}
    sizes = _sizes_of({name: tuple(tensor.shape) for name, tensor in plan.items()}, path)
    return StoredWeights(path, sizes, LazyTensors(plan, lambda name: ways[name](theirs)))


def _empty_tensor(name: str, shape: Shape, path: Path) -> Tensor:
    """On the device meta; what has no values can have other sizes beyond all bounds."""
    try:
        return torch.empty(shape, device="meta")
    except (RuntimeError, TypeError):
        raise InputError(
            f"{path}: tensor {name} has the odd shape {shape}; not a model of RWKV-5.2 or RWKV-6"
        ) from None


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

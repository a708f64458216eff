"""Models on disk: reads and writes `.pth` and `.safetensors`, under the official names (`stored_names`)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infctx.errors import InputError
from infctx.formats.other_names import READ, conversions_from_official, conversions_to_official, version_of
from infctx.formats.stored_names import stored_names
from infctx.formats.tensor_file import narrow, weight_files, write_tensors
from infctx.formats.tensor_stream import LazyTensors, StoredTensors, stream_tensors
from infctx.model.build import empty_model
from infctx.model.layers import Linear
from infctx.model.quantized import FrozenDtype, QuantizedLinear, quantize, quantize_layers
from infctx.model.rwkv import RWKV, Compute
from infctx.model.sizes import Sizes, make_sizes
from infctx.ops.precision import state_dtype

Shape = tuple[int, ...]

GOOSE_RANKS = {"decay_rank": "w", "rate_rank": "a", "gate_rank": "g"}
"""Size -> the letter of its product in every block; value_rank is missing from some first blocks."""
DEEP_EMBED = ("ffn.s_emb.weight", "ffn.s0", "qkv.qq.weight", "qkv.k1")
"""Tensors of the first block of RWKV-7a and 7b alone."""

FINGERPRINT_KIND = "sha256:"
"""Prefix of a fingerprint; those of 0.1.0 have none, and could miss two exchanged values."""
HASHED_AT_ONCE = 1 << 20
"""Values: 2 MB as bf16."""


def read_model(
    stored: StoredWeights,
    dtype: torch.dtype | FrozenDtype,
    device: torch.device | str,
    compute: Compute = Compute(),  # noqa: B008
) -> RWKV:
    """Reads the model of opened weights, as `infctx.load_model` does; on the device is never more than it will hold,
    and one tensor."""
    model = empty_model(stored.sizes, compute, stored.has_state)
    frozen, dtype = (dtype, compute.dtype or torch.bfloat16) if isinstance(dtype, str) else (None, dtype)
    if frozen in ("int8", "nf4"):
        quantize_layers(model, frozen)
    tensors: dict[str, Tensor] = {}
    for ours, name in stored_names(stored.sizes).items():
        place = ours.rpartition(".")[0]
        layer, tensor = model.get_submodule(place), stored.tensors[name]
        if isinstance(layer, QuantizedLinear):
            try:
                parts = quantize(tensor.to(device), layer.form)
            except InputError as error:
                raise InputError(f"{stored.path}: tensor {name} {error}; the file is damaged") from None
            tensors |= {f"{place}.{part}": value for part, value in parts.items()}
        else:
            its = torch.bfloat16 if frozen and isinstance(layer, (Linear, nn.Embedding)) else dtype
            tensors[ours] = tensor.to(device=device, dtype=its, copy=True)
    if stored.has_state:
        tensors["initial_wkv"] = stored.initial_wkv().to(device=device, dtype=state_dtype(dtype))
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False) if frozen else model


def read_sizes(path: str | Path) -> Sizes:
    """Reads version and sizes of a weights file, without loading it."""
    return _open(Path(path)).sizes


def save_weights(model: RWKV, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes the model atomically, under the official names and in their order: `.pth` or `.safetensors` by the suffix.

    dtype: of the stored weights, None: unchanged
    A learned initial state is stored with them, in fp32, value-major, as `blocks.N.att.time_state`.  Raises InputError
    for another suffix, for values beyond the dtype and for learned shift vectors, which these files cannot hold.
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
    """A model on disk with checked names and shapes; a tensor is read when it is looked up."""

    path: Path
    """The file or folder that messages name."""
    sizes: Sizes
    tensors: LazyTensors
    """Official name -> tensor, in its stored dtype."""

    @property
    def has_state(self) -> bool:
        return any(is_state_name(name) for name in self.tensors)

    def initial_wkv(self) -> Tensor:
        """Returns the initial state among the weights, (L, H, N, N) key by value, in its stored dtype."""
        value_major = torch.stack([self.tensors[state_name(layer)] for layer in range(self.sizes.num_layers)])
        return value_major.mT.contiguous()


def open_weights(path: str | Path) -> StoredWeights:
    """Opens what `load_model` reads, with the same checks, but only tensors that are looked up need memory."""
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
    """Writes the bytes that `save_weights` would for the model loaded in fp32, one tensor at a time; returns how many.

    naming: of the written tensors, one of NAMINGS; only "official" has a place for an initial state
    state:  official name -> fp32 tensor of the initial state, value-major; None: the stored one
    Peak memory is about one and a half times the largest tensor in fp32, three times if it has values that are not
    finite, plus the memory that `StoredTensors` holds for the source.
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
    conversions = conversions_from_official(plan, naming, path)
    converted = {name: convert(plan) for name, convert in conversions.items()}
    theirs = LazyTensors(converted, lambda name: conversions[name](official))
    stream_tensors(theirs, path)
    return len(theirs)


def fingerprint(model: RWKV | StoredWeights) -> str:
    """Returns `sha256:` and 16 hex digits that identify weights: of their bits as bf16, in whatever dtype they are.

    The initial state is not part of it.  Reads every value once, a few MB at a time; 3B values take seconds.
    """
    digest = hashlib.sha256()
    for name, weight in _weights(model):
        digest.update(f"{name} {weight.numel()} ".encode())
        for chunk in weight.flatten().split(HASHED_AT_ONCE):
            digest.update(chunk.to(torch.bfloat16).view(torch.int16).cpu().numpy().data)
    return f"{FINGERPRINT_KIND}{digest.hexdigest()[:16]}"


def has_fingerprint(model: RWKV | StoredWeights, mark: str) -> bool:
    """Returns whether a mark is the fingerprint of these weights, by this version or by 0.1.0, which has no prefix."""
    return mark == (fingerprint(model) if ":" in mark else _fingerprint_of_0_1_0(model))


def _fingerprint_of_0_1_0(model: RWKV | StoredWeights) -> str:
    """Hashes sums of the bits: of all values, and of every third, seventh and eleventh."""
    digest = hashlib.sha256()
    for name, weight in _weights(model):
        bits = weight.to(torch.bfloat16).flatten().view(torch.int16)
        sums = [
            sum(int(chunk.sum(dtype=torch.int64)) for chunk in bits[::stride].split(1 << 22))
            for stride in (1, 3, 7, 11)
        ]
        digest.update(f"{name} {bits.numel()} {sums}".encode())
    return digest.hexdigest()[:16]


def _weights(model: RWKV | StoredWeights) -> Iterator[tuple[str, Tensor]]:
    """Yields our name and the values of every weight, without the state; those of a file in fp32, as when loaded."""
    for name, official in stored_names(model.sizes).items():
        if isinstance(model, StoredWeights):
            yield name, model.tensors[official].float()
        else:
            yield name, model.get_parameter(name).detach()


def stored_tensors(model: RWKV) -> dict[str, Tensor]:
    """Returns official name -> tensor, on the CPU, contiguous, in the official order.

    Raises InputError for quantized weights.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise InputError(
            "model: its matrices are quantized, and no longer those of its file; load the file in bf16 or fp32, and "
            "save that"
        )
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
    """Opens a model on disk and gets its sizes from names and shapes, which are not checked further here."""
    files = weight_files(path)
    path = files[0] if len(files) == 1 else path
    theirs = StoredTensors(files)
    empty = {name: _empty_tensor(name, shape, path) for name, shape in theirs.shapes.items()}
    conversions = conversions_to_official(empty, path)
    plan = {name: convert(empty) for name, convert in conversions.items()}
    sizes = _sizes_of({name: tuple(tensor.shape) for name, tensor in plan.items()}, path)
    return StoredWeights(path, sizes, LazyTensors(plan, lambda name: conversions[name](theirs)))


def _empty_tensor(name: str, shape: Shape, path: Path) -> Tensor:
    """Makes a tensor on the meta device; a tensor without values can claim other sizes beyond all bounds."""
    try:
        return torch.empty(shape, device="meta")
    except (RuntimeError, TypeError):
        raise InputError(f"{path}: tensor {name} has the odd shape {shape}; not a model of {READ}") from None


def _sizes_of(shapes: Mapping[str, Shape], path: Path) -> Sizes:
    """Derives all sizes from names and shapes; raises InputError naming a tensor for other architectures."""
    _refuse_other_architectures(shapes, path)

    def shape(name: str, ndim: int) -> Shape:
        if name not in shapes:
            raise InputError(f"{path}: tensor {name} is missing; not a whole model of {READ}")
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise InputError(f"{path}: tensor {name} has the odd shape {shapes[name]}; {ndim} dimensions are expected")
        return shapes[name]

    version = version_of(shapes)
    vocab_size, width = shape("emb.weight", 2)
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    num_layers = max(layers, default=0) + 1
    for layer in range(num_layers):  # before anything is built
        shape(f"blocks.{layer}.ln1.weight", 1)
    bonus = f"blocks.0.att.{'r_k' if version == 7 else 'time_faaaa'}"
    given = {
        "num_layers": num_layers,
        "head_size": shape(bonus, 2)[1],
        "ffn_width": shape("blocks.0.ffn.key.weight", 2)[0],
    }
    if version == 6:
        given["mix_rank"] = shape("blocks.0.att.time_maa_w2", 3)[1]
        given["decay_rank"] = shape("blocks.0.att.time_decay_w1", 2)[1]
    keeps_first_blend = version == 7 and any(f"blocks.0.att.v{part}" in shapes for part in "012")
    if version == 7:
        given |= {name: shape(f"blocks.0.att.{letter}1", 2)[1] for name, letter in GOOSE_RANKS.items()}
        if keeps_first_blend or num_layers > 1:  # without it, nothing in a model of one layer has this rank
            given["value_rank"] = shape(f"blocks.{0 if keeps_first_blend else 1}.att.v1", 2)[1]
    try:
        sizes = make_sizes(version=version, width=width, vocab_size=vocab_size, **given)
        return replace(sizes, keeps_first_blend=keeps_first_blend)
    except InputError as error:
        shown = ", ".join(f"{name} {shapes[name]}" for name in ("emb.weight", bonus))
        raise InputError(f"{path}: the sizes of the tensors {shown} do not fit together: {error}") from None


def _refuse_other_architectures(shapes: Mapping[str, Shape], path: Path) -> None:
    telltale = {"att.time_first": "RWKV-4 or RWKV-5.0/5.1"} | dict.fromkeys(DEEP_EMBED, "RWKV-7a or 7b (DeepEmbed)")
    for name, architecture in telltale.items():
        name = f"blocks.0.{name}"
        if name in shapes:
            raise InputError(f"{path}: tensor {name} is of {architecture}; infctx reads {READ}")
    if "emb.weight" not in shapes:
        found = ", ".join(sorted(shapes)[:2]) or "nothing"
        raise InputError(f"{path}: tensor emb.weight is missing (found {found}); infctx reads {READ}")


def _check_shapes(shapes: Mapping[str, Shape], model: RWKV, names: Mapping[str, str], path: Path) -> None:
    """Raises InputError unless the file has exactly the model's tensors, with their shapes."""
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

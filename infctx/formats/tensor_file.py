"""Files of tensors from others, treated as hostile: `.pth` and `.safetensors` in, name -> tensor out."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infctx.errors import InputError
from infctx.files import atomic_file
from infctx.formats.checkpoint_folder import WeightIndex, listed_files
from infctx.pth_check import is_zip, refuse_odd_pth
from infctx.small_texts import quoted, read_json_as

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_NAME = 200
"""Letters in the name of a tensor."""
MOST_DIMENSIONS = 8


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Reads name -> floating-point tensor, on the CPU, memory-mapped if the format allows; runs no code in the file.

    names: the tensors to read from a safetensors file, None for all; a .pth always gives all
    The content decides the format, not the suffix.  Raises InputError naming the file and the entry.
    """
    tensors = _read_safetensors(path, names) if is_safetensors(path) else _read_pth(path)
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            shown = f" {name}" if isinstance(name, int) else ""
            raise InputError(f"{path}: entry{shown} is named by a {type(name).__name__}; not a weights file")
        _refuse_odd(name, getattr(tensor, "ndim", 0), path)
        if not isinstance(tensor, Tensor):
            raise InputError(f"{path}: entry {name!r} is a {type(tensor).__name__}, not a tensor; not a weights file")
        if tensor.dtype not in STORED_DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without values" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise InputError(f"{path}: tensor {name} is {kind}; dense fp32, bf16, fp16 and fp64 are read")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{path}: tensor {name} repeats its values to {tuple(tensor.shape)}; save it contiguous")
        # In files from before torch 1.6, a storage missing from their list is allocated but never read.
        if tensor.untyped_storage().nbytes() > path.stat().st_size:
            raise InputError(f"{path}: tensor {name} claims more values than the file has; copy it again")
    return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads name -> shape of the tensors of a file, without their values if the format allows."""
    if not is_safetensors(path):
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    with open_safetensors(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict)
    for name, shape in shapes.items():
        _refuse_odd(name, len(shape), path)
    return shapes


def weight_files(path: Path) -> list[Path]:
    """Returns the files of a model: `path` itself, or those of a folder, by the names of Hugging Face's libraries.

    An index of several files is the JSON object `{"weight_map": {tensor: file}}`; the files are in its folder.
    """
    if not path.is_dir():
        return [path]
    listed = listed_files(path)  # for our checkpoints; other files in the folder are ignored
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).is_file() and (listed is None or name in listed):
            return [path / name]
        if index.is_file() and (listed is None or index.name in listed):
            try:
                names = sorted(set(read_json_as(WeightIndex, index).weight_map.values()))
            except ValueError as error:
                raise InputError(f"{index}: not an index of weight files ({error}); copy it again") from None
            files = [path / Path(name).name for name in names]
            if files:
                return files
    raise InputError(f"{path}: holds no model.safetensors, pytorch_model.bin or index of these; name a weights file")


def is_safetensors(path: Path) -> bool:
    """Returns whether a file is a safetensors file rather than a .pth, by its content."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .pth or .safetensors of RWKV-5.2, 6 or 7")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise InputError(f"{path}: the file is empty; copy it again, or name another")
    return head[8:] == b"{" and head[:4] != b"PK\x03\x04"  # a zip: .pth since torch 1.6


def is_mapped(path: Path) -> bool:
    """Returns whether `read_tensors` maps the file, so that values need memory only when they are used."""
    # Mapping needs a path, and torch would read any path that ends in .safetensors as that format.
    return is_safetensors(path) or (is_zip(path) and path.suffix != ".safetensors")


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the text in the header of a safetensors file; empty for a .pth, which has none."""
    if not is_safetensors(path):
        return {}
    with open_safetensors(path) as file:
        return file.metadata() or {}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Opens a safetensors file and reads its header; yields `safe_open`'s object, with InputError for its failures."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({quoted(str(error), 200)}); copy it again") from None


def narrow(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, path: str | Path, remedy: str = "choose another dtype"
) -> dict[str, Tensor]:
    """Returns the tensors in `dtype` (None: unchanged); raises InputError naming the first value beyond it."""
    narrowed = {}
    for name, tensor in tensors.items():
        wanted = dtype or tensor.dtype
        narrowed[name] = tensor.to(wanted)
        # The extremes need no extra memory, and mostly show that there is no infinity to look for.
        if not tensor.numel() or all(extreme.isfinite() for extreme in narrowed[name].aminmax()):
            continue
        beyond = narrowed[name].isinf() & tensor.isfinite()
        if beyond.any():
            place = tuple(beyond.nonzero()[0].tolist())
            raise InputError(
                f"{path}: {name}[{', '.join(map(str, place))}] is {tensor[place].item():g}, beyond the "
                f"{torch.finfo(wanted).max:g} of {str(wanted).removeprefix('torch.')}; {remedy}"
            )
    return narrowed


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    suffixes: Sequence[str] = (".pth", ".safetensors"),
) -> None:
    """Writes contiguous CPU tensors atomically: .pth by torch, every other suffix as safetensors.

    metadata: text for the header of a safetensors file, instead of {"format": "pt"}
    suffixes: those that the path may have
    """
    with tensor_file(path, suffixes) as temporary:
        if path.suffix == ".pth":
            with temporary.open("wb") as file:  # given a path, torch would write that path into the file
                torch.save(dict(tensors), file)
        else:
            # With more than one key, their order in the file, and so its bytes, would be random.
            safetensors.torch.save_file(dict(tensors), temporary, metadata=dict(metadata or {"format": "pt"}))


@contextmanager
def tensor_file(path: Path, suffixes: Sequence[str] = (".pth", ".safetensors")) -> Iterator[Path]:
    """Yields a temporary path to write tensors to, renamed to `path` once it is complete; see `atomic_file`.

    Raises InputError if `path` has none of the suffixes.
    """
    if path.suffix not in suffixes:
        raise InputError(f"{path}: weights are written as {' or '.join(suffixes)}; choose one of these suffixes")
    with atomic_file(path) as temporary, _system_errors(path):
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors leaves 0600, and a server under another user cannot read it


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raises a full disk as the OSError that it is: torch and safetensors wrap it in other errors."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def _read_safetensors(path: Path, names: Collection[str] | None) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def _refuse_odd(name: str, num_dimensions: int, path: Path) -> None:
    """Raises InputError for names and shapes too odd to repeat in other messages."""
    if len(name) > MOST_NAME or not name.isprintable():
        raise InputError(f"{path}: tensor {quoted(name)} has an odd name; not a weights file")
    if num_dimensions > MOST_DIMENSIONS:
        raise InputError(f"{path}: tensor {name} has {num_dimensions} dimensions; not a weights file")


def _read_pth(path: Path) -> dict[Any, Any]:
    refuse_odd_pth(path)
    try:
        mapped = is_mapped(path)
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:Unsupported|GLOBAL|global) [^\n]*", str(error))
        raise InputError(
            f"{path}: not a plain dict of tensors, and no code in it was run "
            f"({quoted(found[0].strip(), 200) if found else 'unreadable pickle'}); "
            "save the weights alone, as torch.save(model.state_dict(), path) does"
        ) from None
    except Exception as error:  # torch raises nearly anything on damaged bytes
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a whole .pth file ({quoted(reason, 200)}); copy it again") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return dict(content)

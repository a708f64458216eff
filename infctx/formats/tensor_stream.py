"""Reads and writes files of tensors one tensor at a time: read when looked up, written when computed."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from infctx.formats.tensor_file import is_mapped, is_safetensors, read_shapes, read_tensors, tensor_file

MOST_MAPPED = 1 << 26
"""Bytes to read from .pth files before their pages are released; to reopen them for each tensor would be slow."""


class StoredTensors(Mapping[str, Tensor]):
    """Name -> tensor of one file or several, read again at each lookup and not kept.

    In memory are the tensors that the caller holds, and for a .pth up to MOST_MAPPED bytes of others.  A .pth from
    before torch 1.6, or with the suffix .safetensors, cannot be mapped: from the first lookup it is held whole.
    Raises InputError like `read_tensors`: for the tensor looked up in a safetensors file, for any in a .pth.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            shapes = read_shapes(file)
            self.shapes |= shapes
            self._file_of |= dict.fromkeys(shapes, file)
        self._mapped: dict[Path, dict[str, Tensor]] = {}
        self._loaded: dict[Path, dict[str, Tensor]] = {}
        self._num_bytes = 0  # read from mapped files

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        if is_safetensors(file):
            return read_tensors(file, [name])[name]
        if file not in self._mapped and file not in self._loaded:
            (self._mapped if is_mapped(file) else self._loaded)[file] = read_tensors(file)
        if file in self._loaded:
            return self._loaded[file][name]
        num_bytes = self._mapped[file][name].nbytes
        if self._num_bytes and self._num_bytes + num_bytes > MOST_MAPPED:
            self._mapped, self._num_bytes = {}, 0
            self._mapped[file] = read_tensors(file)
        self._num_bytes += num_bytes
        return self._mapped[file][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor, computed at each lookup and not kept.

    plan: name -> tensor on the meta device, with the shape and, if it will be written, the dtype
    read: returns the tensor of a name
    """

    def __init__(self, plan: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.plan, self._read = plan, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)


def stream_tensors(tensors: LazyTensors, path: Path) -> None:
    """Writes the same bytes as `write_tensors`, atomically, and holds one tensor at a time.

    tensors: fp32, bf16, fp16 or fp64, on the CPU; each is looked up once, in the order of the file
    """
    with tensor_file(path) as temporary, temporary.open("wb") as file:
        (_stream_pth if path.suffix == ".pth" else _stream_safetensors)(tensors, file)


class _Kind(NamedTuple):
    """The names of a dtype in a .pth and in a safetensors file."""

    storage: type
    name: str


_KINDS = {  # in the order of a safetensors file
    torch.float64: _Kind(torch.DoubleStorage, "F64"),
    torch.float32: _Kind(torch.FloatStorage, "F32"),
    torch.bfloat16: _Kind(torch.BFloat16Storage, "BF16"),
    torch.float16: _Kind(torch.HalfStorage, "F16"),
}


def _stream_safetensors(tensors: LazyTensors, file: IO[bytes]) -> None:
    """Writes the header's length in 8 bytes; the header, JSON padded with spaces to a multiple of 8; the values."""
    kinds = list(_KINDS)
    names = sorted(tensors.plan, key=lambda name: (kinds.index(tensors.plan[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        planned, begin = tensors.plan[name], end
        end += planned.nbytes
        header[name] = {
            "dtype": _KINDS[planned.dtype].name,
            "shape": list(planned.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(_values(tensors, name).flatten().view(torch.uint8).numpy().data)


def _values(tensors: LazyTensors, name: str) -> Tensor:
    """Returns the contiguous values of one tensor."""
    values, planned = tensors[name].detach(), tensors.plan[name]
    assert (values.shape, values.dtype) == (planned.shape, planned.dtype), name
    return values.contiguous()


def _stream_pth(tensors: LazyTensors, file: IO[bytes]) -> None:
    """Writes torch.save's records, the plan as a pickle and the values, with torch's writer, which adds checksums.

    A thread writes them, because its small allocations come from a separate arena.  The writer keeps some for each
    record; among the tensors they would leave gaps too small for the next one, a third of the memory in the end.
    """
    serialization = torch.serialization
    with ThreadPoolExecutor(1) as thread, serialization._open_zipfile_writer_buffer(file) as archive:
        for name, text in (
            ("data.pkl", _pickled(dict(tensors.plan))),
            (".format_version", b"1"),
            (".storage_alignment", str(serialization._get_storage_alignment()).encode()),
            ("byteorder", sys.byteorder.encode()),
        ):
            archive.write_record(name, text, len(text))
        for number, name in enumerate(tensors.plan):
            values = _values(tensors, name)
            if values.untyped_storage().nbytes() != values.nbytes:  # a view of a larger tensor
                values = values.clone()
            thread.submit(archive.write_record, f"data/{number}", values.untyped_storage(), values.nbytes).result()


def _pickled(plan: dict[str, Tensor]) -> bytes:
    """Returns torch.save's pickle of tensors with these shapes, each with a separate storage."""
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(plan)
    return text.getvalue()


class _Storage(NamedTuple):
    kind: type
    key: str
    num_values: int


class _Pickler(pickle.Pickler):
    """Pickles tensors by shape and dtype; their storages get the keys "0", "1", ... in the file."""

    num_storages = 0

    def reducer_override(self, thing: object) -> Any:
        if not isinstance(thing, Tensor):
            return NotImplemented
        storage = _Storage(_KINDS[thing.dtype].storage, str(self.num_storages), thing.numel())
        self.num_storages += 1
        no_hooks: OrderedDict[int, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(thing.shape), thing.stride(), False, no_hooks)

    def persistent_id(self, thing: object) -> tuple[str, type, str, str, int] | None:
        if isinstance(thing, _Storage):
            return "storage", thing.kind, thing.key, "cpu", thing.num_values
        return None

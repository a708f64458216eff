"""Files of tensors of which one is held at a time: read as they are asked for in, written as they come out."""

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
"""Bytes read of .pth files before their pages are let go; to open one for each tensor would take long."""


class StoredTensors(Mapping[str, Tensor]):
    """Name -> tensor of one file or several, read anew each time it is looked up and not kept.

    What is held is the tensors that the caller holds, and of a .pth up to MOST_MAPPED bytes of others.  A .pth from
    before torch 1.6, or under the name of a .safetensors, cannot be mapped: it is held whole from the first look on.
    Raises InputError as `read_tensors` does: of a safetensors file for the tensor looked up, of a .pth for any.
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
        self._num_bytes = 0  # read of what is mapped

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
    """Name -> tensor, worked out each time it is looked up and not kept.

    plan: name -> tensor on the device meta, of the shape and, where it is to be written, the dtype that there will be
    read: gives the tensor of a name
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
    """Writes the file that `write_tensors` writes, the same bytes, and holds one tensor at a time; atomic.

    tensors: fp32, bf16, fp16 or fp64, on the CPU, each looked up once, in the order that the file has them in.
    """
    with tensor_file(path) as temporary, temporary.open("wb") as file:
        (_stream_pth if path.suffix == ".pth" else _stream_safetensors)(tensors, file)


class _Kind(NamedTuple):
    """What a dtype is called in a .pth and in a safetensors file."""

    storage: type
    name: str


_KINDS = {  # in the order in which a safetensors file has them
    torch.float64: _Kind(torch.DoubleStorage, "F64"),
    torch.float32: _Kind(torch.FloatStorage, "F32"),
    torch.bfloat16: _Kind(torch.BFloat16Storage, "BF16"),
    torch.float16: _Kind(torch.HalfStorage, "F16"),
}


def _stream_safetensors(tensors: LazyTensors, file: IO[bytes]) -> None:
    """The length of the header, 8 bytes; the header, JSON, spaces up to a multiple of 8; the values, as they lie."""
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
    """Contiguous values of one tensor."""
    values, planned = tensors[name].detach(), tensors.plan[name]
    assert (values.shape, values.dtype) == (planned.shape, planned.dtype), name
    return values.contiguous()


def _stream_pth(tensors: LazyTensors, file: IO[bytes]) -> None:
    """The records of torch.save, by its own writer, which adds the checksums: the plan as a pickle, the values.

    They are written in a thread, whose small allocations come from an arena of its own: the writer keeps some for each
    record, and among the tensors these would leave gaps that no next tensor fits in, a third of all in the end.
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
            if values.untyped_storage().nbytes() != values.nbytes:  # a view of more
                values = values.clone()
            thread.submit(archive.write_record, f"data/{number}", values.untyped_storage(), values.nbytes).result()


def _pickled(plan: dict[str, Tensor]) -> bytes:
    """What torch.save pickles of tensors of these shapes, each with a storage of its own."""
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(plan)
    return text.getvalue()


class _Storage(NamedTuple):
    kind: type
    key: str
    num_values: int


class _Pickler(pickle.Pickler):
    """Pickles tensors by shape and dtype, their storages as those that have the keys "0", "1", ... in the file."""

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

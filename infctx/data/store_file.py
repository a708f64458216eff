"""The files of a token store: read by place, never mapped into memory."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np

from infctx.errors import InputError


class StoreFile:
    """A file that is read by place. Not mapped into memory: a mapped file that is cut short while it is in use kills
    the process with SIGBUS, and the pages of a mapping count as its memory."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self.num_bytes = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; a token store is a .bin and an .idx side by side") from None
        if self.num_bytes == 0:
            raise damaged(path, "empty")
        self.path = path

    def read(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        """Returns `count` values from byte `offset` on, read-only."""
        return np.frombuffer(self.read_bytes(offset, count * dtype.itemsize), dtype)

    def read_bytes(self, offset: int, wanted: int) -> bytes:
        """Returns `wanted` bytes from byte `offset` on."""
        try:
            data = os.pread(self._descriptor, wanted, offset)
            while len(data) < wanted and (more := os.pread(self._descriptor, wanted - len(data), offset + len(data))):
                data += more  # one call gives at most 2 GiB
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
        if len(data) < wanted:
            raise InputError(
                f"{self.path}: was cut short while in use, from {self.num_bytes:,} bytes to "
                f"{os.fstat(self._descriptor).st_size:,}; make the store again, and leave it alone while it is read"
            )
        return data


def damaged(path: Path, problem: str) -> InputError:
    """Returns the error for a file that is not what `infctx prepare` wrote."""
    return InputError(f"{path}: {problem}; copy it again, or make it with `infctx prepare`")

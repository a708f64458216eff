"""Counts the memory of tensors while code runs."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocated(TorchDispatchMode):
    """A context that counts the bytes of tensors that operations make, and `most`, those that were alive at a time.

    held: tensors that were there before, which do not count
    """

    def __init__(self, held):
        super().__init__()
        self.held = {tensor.untyped_storage().data_ptr() for tensor in held}
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key = storage.data_ptr()
        if key in self.alive or key in self.held:
            return
        self.alive[key] = size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self.now -= self.alive.pop(key, 0)

"""Random inputs and output gradients of a linear layer, and the memory that a computation takes."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def random_pair(examples, positions, d_in, d_out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(positions)
    x = torch.randn(examples, positions, d_in, generator=generator, dtype=dtype)
    g = torch.randn(examples, positions, d_out, generator=generator, dtype=dtype)
    return x, g


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are still alive."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in inputs and storage.data_ptr() not in self.known:
                    self.add(storage)
        return result

    def add(self, storage):
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.known.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, pointer, size)

    def remove(self, pointer, size):
        self.known.discard(pointer)
        self.live -= size

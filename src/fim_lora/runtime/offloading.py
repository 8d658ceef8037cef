"""Weights that Accelerate keeps on the CPU or on disk and loads for each pass through their module."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate loads the module's own weights only while the module runs."""
    return bool(_offloading_hooks(module))


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of the modules until the block ends, and then discard them, with any changes.

    Passes inside the block neither load nor discard them.
    """
    loaded = []
    try:
        for module in modules:
            for hook in _offloading_hooks(module):
                hook.pre_forward(module)
                hook.offload = False
                loaded.append((module, hook))
        yield
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, torch.empty(0))


def _offloading_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]

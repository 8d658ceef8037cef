"""Weights that Accelerate keeps on the CPU or on disk, and loads for each pass through their module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether the weights of a module itself are there only while it runs.

    Args:
        module: A module.

    Returns:
        Whether Accelerate offloads them.
    """
    return bool(_offloading(module))


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of some modules; a pass through a module inside neither loads nor drops them.

    What is changed in them is lost afterwards.

    Args:
        modules: Modules, offloaded or not.

    Yields:
        Nothing.
    """
    loaded = []
    try:
        for module in modules:
            for hook in _offloading(module):
                hook.pre_forward(module)
                hook.offload = False
                loaded.append((module, hook))
        yield
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, torch.empty(0))


def _offloading(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]

"""A warning for an adapter that is trained although it still awaits its ranks."""

from __future__ import annotations

import functools
from typing import Any, Protocol
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..runtime.user_warnings import warn_user


class _Recorder(Protocol):
    @property
    def is_full(self) -> bool: ...


class ForgottenAllocation:
    """Warns once if an optimizer steps with the adapter after the recorder has seen enough batches.

    Copies and pickles of a model contain a copy, which does the same. Optimizers that do not derive from PyTorch's are
    not noticed.

    Args:
        adapter_name: The adapter.
        weight: One of its weights.
        recorder: It tells whether it has seen enough batches.
    """

    adapter_name: str
    weight: nn.Parameter
    recorder: _Recorder

    def __init__(self, adapter_name: str, weight: nn.Parameter, recorder: _Recorder) -> None:
        self.__setstate__({"adapter_name": adapter_name, "weight": weight, "recorder": recorder})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _forgotten.add(self)
        _watch_optimizers()

    def stop(self) -> None:
        """Never warn."""
        _forgotten.discard(self)

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if not self.recorder.is_full or not any(parameter is self.weight for parameter in trained):
            return
        self.stop()
        warn_user(
            f"Adapter {self.adapter_name!r} is trained without FIM ranks: the hooks have seen enough calibration "
            "batches, but `initialize_lora_fim_ranks` was not called, so every layer has its base rank. Call it "
            "before the first step of the optimizer."
        )


# Only the models hold these objects, so nothing keeps a model that is no longer used.
_forgotten: WeakSet[ForgottenAllocation] = WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Register one hook for all optimizers; without an adapter that awaits its ranks it does nothing."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for forgotten in list(_forgotten):
        forgotten.before_step(optimizer)

"""Modules that wrap a model, or parts of it, for parallel training, checkpointing or compilation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

# What these wrappers put into the names of modules. There is no public function that takes it out.
_ATTRIBUTES = {
    FullyShardedDataParallel: "_fsdp_wrapped_module",
    OptimizedModule: "_orig_mod",
    CheckpointWrapper: "_checkpoint_wrapped_module",
}


def without_wrappers(name: str) -> str:
    """The name of a module, or of a parameter, as if nothing were wrapped.

    Args:
        name: Name in the wrapped model.

    Returns:
        Name in the model.
    """
    return ".".join(part for part in name.split(".") if part not in _ATTRIBUTES.values())


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside FSDP1's, a checkpointing or a compiling wrapper.

    Args:
        module: A module.

    Returns:
        The module inside, or the module itself.
    """
    while True:
        attribute = next((name for wrapper, name in _ATTRIBUTES.items() if isinstance(module, wrapper)), None)
        if attribute is None:
            return module
        module = getattr(module, attribute)


def without_engine(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, `DataParallel` or DeepSpeed's engine, compiled or not.

    They only synchronise gradients of parameters and step the optimizer; what shards the model stays.

    Args:
        model: A model.

    Returns:
        The model inside, or the model itself.
    """
    while _is_engine(inside := unwrapped(model)):
        model = cast(nn.Module, inside.module)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a pass through the model needs all processes: FSDP1, FSDP2 or ZeRO-3.

    Args:
        model: A model.

    Returns:
        Whether it does.
    """
    if any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def are_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether one of some parameters is there only in part.

    Args:
        parameters: The parameters.

    Returns:
        Whether FSDP2, tensor parallelism or ZeRO-3 has divided one.
    """
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in parameters)


def _is_engine(module: nn.Module) -> bool:
    # By its name, because importing DeepSpeed takes seconds and is not wanted by those who do not use it.
    names = {parent.__name__ for parent in type(module).__mro__}
    return isinstance(module, (DistributedDataParallel, DataParallel)) or "DeepSpeedEngine" in names

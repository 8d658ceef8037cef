"""Modules that wrap a model, or parts of it, for parallel training, checkpointing or compilation."""

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

# What these wrappers insert into the names of modules. PyTorch has no public function that removes it.
_WRAPPER_ATTRIBUTES = {
    FullyShardedDataParallel: "_fsdp_wrapped_module",
    OptimizedModule: "_orig_mod",
    CheckpointWrapper: "_checkpoint_wrapped_module",
}


def strip_wrapper_names(name: str) -> str:
    """The name that a module or parameter has in the model without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_ATTRIBUTES.values())


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of FSDP1, checkpointing and compilation, or the module itself."""
    for wrapper, attribute in _WRAPPER_ATTRIBUTES.items():
        if isinstance(module, wrapper):
            return unwrap(getattr(module, attribute))
    return module


def unwrap_engine(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, `DataParallel` or DeepSpeed's engine, compiled or not; or itself.

    These only synchronize the gradients of parameters and step the optimizer. Wrappers that shard the model are kept.
    """
    while _is_engine(inside := unwrap(model)):
        model = cast(nn.Module, inside.module)
    return model


def needs_all_processes(model: nn.Module) -> bool:
    """Whether all processes must take part in a pass through the model, because of FSDP1, FSDP2 or ZeRO-3."""
    if any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def any_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether FSDP2, tensor parallelism or ZeRO-3 has sharded any of the parameters."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in parameters)


def uses_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 wraps the model or a part of it."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _is_engine(module: nn.Module) -> bool:
    # DeepSpeed's engine is recognized by its name, because importing DeepSpeed takes seconds, and most users do not
    # need it.
    names = {parent.__name__ for parent in type(module).__mro__}
    return isinstance(module, (DistributedDataParallel, DataParallel)) or "DeepSpeedEngine" in names

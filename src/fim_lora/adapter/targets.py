"""The layers that PEFT would adapt in a plain model, found by PEFT's own injection into a skeleton of the model."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..fisher.converted_targets import ConvertedTargets
from ..fisher.layers.registry import TargetLayer, target_layer
from ..runtime.flags import requires_grad_restored
from ..runtime.wrappers import unwrap, uses_fsdp1
from .checks import require_initialization, require_resizable_form
from .converted_targets import compare_targets
from .lora_layers import adapter_layers
from .pending_config import awaits_ranks, final_initialization

_FLATTENED = (
    "FullyShardedDataParallel flattens the parameters, so PEFT cannot see their names and shapes: use FSDP2 "
    "(`fully_shard`), which keeps them."
)


def resolve_targets(model: nn.Module, config: LoraConfig) -> dict[str, TargetLayer]:
    """Name, as in the base model, to the layers that PEFT would adapt; see `convert_targets`."""
    return convert_targets(model, config)[0]


def convert_targets(model: nn.Module, config: LoraConfig) -> tuple[dict[str, TargetLayer], ConvertedTargets | None]:
    """The layers that PEFT would adapt, and what it would make of the targets in the config.

    The skeleton shares every tensor with the model and has modules of its own; the adapters in it are on the meta
    device. Nothing in model and config changes.

    Args:
        model: The model. Its existing adapters are ignored.
        config: The LoRA config.

    Returns:
        Name, as in the base model, to the layer in the model; and the targets that the config would have then, if
        PEFT converts them for this model.

    Raises:
        TypeError: If a layer's class is not supported.
        ValueError: If PEFT finds nothing to adapt or ties adapters, the config is not a LoRA config, or it awaits its
            ranks and PEFT does not have its initialization for a layer.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_config must be a LoraConfig, got {type(config).__name__}.")
    is_flattened = uses_fsdp1(model)
    model = unwrap(model)
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # whose whole names a regular expression must match
    if awaits_ranks(config):
        require_resizable_form(config, except_for="kasa_config")
    injected = _injectable(config)
    clones: dict[int, tuple[nn.Module, nn.Module]] = {}
    skeleton = _skeleton(model, clones)
    _inject(skeleton, injected, model, is_flattened)
    _require_untied(injected)
    originals = {id(clone): original for original, clone in clones.values()}
    targets = {name: target_layer(name, layer) for name, layer in adapter_layers(skeleton, "default").items()}
    init_lora_weights = final_initialization(config) if awaits_ranks(config) else True
    require_initialization({name: target.module for name, target in targets.items()}, init_lora_weights)
    if is_flattened:
        _require_parameters(config, targets)
    targets = {
        name: dataclasses.replace(target, module=originals[id(target.module)]) for name, target in targets.items()
    }
    return targets, compare_targets(config, injected, targets)


def _injectable(config: LoraConfig) -> LoraConfig:
    """A copy of the config that changes no weight and needs none."""
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.use_dora = False
    config.layer_replication = None  # would change the config of the model, which the skeleton shares
    return config


def _inject(skeleton: nn.Module, config: LoraConfig, model: nn.Module, is_flattened: bool) -> None:
    with requires_grad_restored(model.parameters()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same warnings appear once, when the adapter is created
        try:
            LoraModel(skeleton, {"default": config}, "default", low_cpu_mem_usage=True)
        except ValueError as error:
            if is_flattened:
                raise ValueError(f"{_FLATTENED} PEFT says: {error}") from error
            raise


def _require_untied(config: LoraConfig) -> None:
    tied: Any = getattr(config, "target_modules_to_tie", None)
    if tied:
        raise ValueError(
            f"With ensure_weight_tying=True PEFT makes one adapter of {sorted(tied)} and the input embedding, "
            "which share one adapter and therefore one rank: set it to False, or target one of them."
        )


def _require_parameters(config: LoraConfig, targets: Iterable[str]) -> None:
    """FSDP1 may hide parameters, and PEFT would go on without them."""
    wanted = config.target_parameters or ()
    hidden = [name for name in wanted if not any(f".{target}".endswith(f".{name}") for target in targets)]
    if hidden:
        raise ValueError(f"{_FLATTENED} It finds no parameter {hidden[0]!r}.")


def _skeleton(module: nn.Module, clones: dict[int, tuple[nn.Module, nn.Module]]) -> nn.Module:
    """A copy of the tree of modules without wrappers and adapters; `clones` has id to module and its copy."""
    module = unwrap(module)
    while isinstance(module, BaseTunerLayer):
        module = unwrap(module.get_base_layer())
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    if id(module) not in clones:
        # Not `copy.copy`, which calls the constructor of classes that FSDP2 and parametrizations make on the fly.
        clone = object.__new__(type(module))
        clone.__dict__.update(module.__dict__)
        clones[id(module)] = (module, clone)
        clone.__dict__.pop("peft_config", None)
        # PEFT registers the weights of nn.MultiheadAttention again.
        clone.__dict__["_parameters"] = dict(module._parameters)
        clone.__dict__["_modules"] = {
            name: None if child is None else _skeleton(child, clones) for name, child in module._modules.items()
        }
    return clones[id(module)][1]

"""Removal of an adapter from the layers that got rank 0."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import nn

from ..runtime.flags import requires_grad_restored
from .layer_state import own_modules_and_parameters
from .lora_layers import layers_rebuilt_together
from .targets import resolve_targets


def layers_to_keep(layers: Mapping[str, LoraLayer], adapter_name: str, config: LoraConfig) -> list[str]:
    """The layers that cannot lose the adapter, however little it is worth there.

    A trained bias would be lost when the adapter is saved. A parameter that another adapter adapts, too, cannot lose
    its wrapper, because PEFT distinguishes parameters by the order in which they are wrapped.
    """
    if config.lora_bias or config.bias == "lora_only":
        return list(layers)
    return [
        name for name, layer in layers.items() if isinstance(layer, ParamWrapper) and set(layer.r) - {adapter_name}
    ]


def require_removable(
    model: nn.Module, adapter_name: str, removed: Mapping[str, LoraLayer], kept: Iterable[str], config: LoraConfig
) -> None:
    """Refuse a removal after which PEFT could not load the rest of the adapter.

    Raises `ValueError` if another adapter shares a parameter's wrapper, if the targets of `config` match other layers
    than `kept`, or if PEFT refuses them, as it does for a parameter after a `Conv1D`.
    """
    for name, layer in removed.items():
        others = sorted(set(layer.r) - {adapter_name})
        if isinstance(layer, ParamWrapper) and others:
            raise ValueError(
                f"Parameter {name!r} got rank 0, but adapter {others[0]!r} adapts it too, and PEFT distinguishes "
                "parameters by the order in which they are wrapped: use r_min=1, or delete the other adapter first."
            )
    try:
        resolved = resolve_targets(model, config)
    except ValueError as error:
        raise ValueError(
            f"PEFT could not load the adapter without the layers of rank 0, {sorted(removed)}: {error} Keep at least "
            "one rank in them: use r_min=1 before the training, or a larger size after it."
        ) from error
    different = sorted(set(resolved) ^ set(kept))
    if different:
        raise ValueError(
            f"Without the layers of rank 0, PEFT would adapt other layers than intended: {different}. Use r_min=1."
        )


def remove_adapter(model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str, bias: str) -> None:
    """Remove an adapter from some layers; a LoRA layer without another adapter is replaced by its base layer.

    `bias` is that of the adapter's config: with `"lora_only"` the bias of a layer is trained with its adapter.
    """
    parents = _parents(model)
    for layer in layers.values():
        _remove(parents, layer, adapter_name, bias)
    _forget_targets(model, (name for name, layer in layers.items() if not set(layer.r) - {adapter_name}))


def _parents(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, str]]:
    """Module to the module that contains it, and its name there."""
    parents: dict[nn.Module, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, child in module.named_children():
            parents.setdefault(child, (module, name))
    return parents


def _remove(parents: dict[nn.Module, tuple[nn.Module, str]], layer: Any, adapter_name: str, bias: str) -> None:
    parts = layers_rebuilt_together(layer)
    for part in parts:
        _clear_gradients(part, adapter_name)
    if set(layer.r) - {adapter_name}:
        for part in parts:
            _delete_adapter(part, adapter_name)
        return
    parent, attribute = parents[layer]
    base = _base_of(layer)
    if bias == "lora_only" and not isinstance(base, ParamWrapper):
        base.requires_grad_(False)
    setattr(parent, attribute, base)
    parents[base] = parent, attribute


def _clear_gradients(layer: Any, adapter_name: str) -> None:
    """Clear the gradients of one adapter, because an optimizer may hold its parameters after the removal.

    PEFT names a parameter by its container and the adapter: `lora_A.default.weight`, `lora_embedding_A.default`.
    """
    for (module_name, own_name), parameter in own_modules_and_parameters(layer)[1].items():
        if f"{module_name}.{own_name}".split(".")[1] == adapter_name:
            parameter.grad = None


def _base_of(layer: Any) -> nn.Module:
    if isinstance(layer, MultiheadAttention):
        return layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
    if isinstance(layer, ParamWrapper):
        return layer.base_layer  # another wrapper, if several parameters of the module are adapted
    return layer.get_base_layer()


def _delete_adapter(layer: Any, adapter_name: str) -> None:
    """Delete an adapter of a layer, and undo PEFT's activation of another one."""
    active = list(layer.active_adapters)
    with requires_grad_restored(list(layer.parameters())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that it activates another one
            layer.delete_adapter(adapter_name)
        layer.set_adapter(active)


def _forget_targets(model: nn.Module, removed: Iterable[str]) -> None:
    """Remove layers from PEFT's own lists of what it adapted."""
    names = set(removed)
    for module in model.modules():
        for attribute in ("targeted_module_names", "targeted_parameter_names"):
            if isinstance(module, LoraModel) and attribute in module.__dict__:
                module.__dict__[attribute] = [name for name in module.__dict__[attribute] if name not in names]

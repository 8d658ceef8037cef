"""`LayerState`: what a LoRA layer was before PEFT rebuilt one of its adapters, to carry over or to restore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..config import changes_base_weight
from .lora_layers import rebuilt_together


class LayerState:
    """The state of one LoRA layer before one of its adapters is rebuilt.

    Args:
        layer: The LoRA layer.
        adapter_name: The adapter.
        init_lora_weights: The initialization of the rebuilt adapter; PiSSA and OLoRA change the base weight, too.
    """

    def __init__(self, layer: Any, adapter_name: str, init_lora_weights: bool | str) -> None:
        self.layer = layer
        self._adapter_name = adapter_name
        self._entries = {
            container: entries[adapter_name]
            for container in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
            if adapter_name in (entries := _container(layer, container))
        }
        self._modules, self._parameters = own_parts(layer)
        self._old_parameters = self._parameters
        self._requires_grad = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        self._training = {name: module.training for name, module in self._modules.items()}
        self._base_weight = _BaseWeight.if_changed_by(init_lora_weights, layer)

    def carry_over(self) -> None:
        """Give the rebuilt adapter the device, dtype, mode, dropout and `requires_grad` of the previous one."""
        if "lora_dropout" in self._entries:
            self.layer.lora_dropout[self._adapter_name] = self._entries["lora_dropout"]
        self._modules, self._parameters = own_parts(self.layer)
        for name, parameter in self._parameters.items():
            old = self._old_parameters.get(name)
            if old is None or old is parameter:
                continue
            device = parameter.device if old.device.type == "meta" else old.device
            parameter.data = parameter.data.to(device=device, dtype=old.dtype)
        for container, before in self._entries.items():
            buffers = _container(self.layer, container)
            if isinstance(buffers, BufferDict):
                buffers[self._adapter_name] = buffers[self._adapter_name].to(dtype=before.dtype)
        self._set_flags()

    def keep_parameters(self) -> None:
        """Put the new tensors into the original `nn.Parameter` objects, which an optimizer may hold."""
        for name, parameter in self._parameters.items():
            old = self._old_parameters.get(name)
            if old is None or old is parameter or old.device.type == "meta":
                continue
            old.grad = None
            # An earlier graph, such as that of a loss still in scope, keeps the node that accumulates the gradient,
            # and the node knows the old shape. PyTorch makes a new one only if the dtype changes.
            old.data = old.data.new_empty(0, dtype=torch.complex64)
            old.data = parameter.data
            owner, attribute = name
            setattr(self._modules[owner], attribute, old)

    def restore(self) -> None:
        """Restore the layer."""
        for container, entry in self._entries.items():
            getattr(self.layer, container)[self._adapter_name] = entry
        if self._base_weight is not None:
            self._base_weight.restore()
        self._modules, self._parameters = own_parts(self.layer)
        self._set_flags()

    def _set_flags(self) -> None:
        for name, parameter in self._parameters.items():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        for module_name, module in self._modules.items():
            training = self._training.get(module_name, self.layer.training)
            if module.training != training:
                module.training = training


class _BaseWeight:
    """A base weight before PiSSA or OLoRA takes the adapter out of it."""

    def __init__(self, base_layer: Any, values: Tensor) -> None:
        self._base_layer = base_layer
        self._parameter = base_layer.weight
        self._values = values
        self._quant_state = getattr(base_layer, "quant_state", None)

    @classmethod
    def if_changed_by(cls, init_lora_weights: bool | str, layer: Any) -> _BaseWeight | None:
        base_layer = layer.get_base_layer()
        weight = base_layer._parameters.get("weight")
        if weight is None or not changes_base_weight(init_lora_weights):
            return None
        # OLoRA subtracts from float32 weights in place; all other weights are replaced.
        in_place = init_lora_weights == "olora" and weight.dtype == torch.float32
        return cls(base_layer, weight.data.clone() if in_place else weight.data)

    def restore(self) -> None:
        # OLoRA replaces the parameter of a bitsandbytes layer, and with it the statistics of the quantization.
        self._base_layer.weight = self._parameter
        self._parameter.data = self._values
        if hasattr(self._base_layer, "quant_state"):
            self._base_layer.quant_state = self._quant_state


def layer_states(layer: LoraLayer, adapter_name: str, init_lora_weights: bool | str) -> list[LayerState]:
    """The states of a LoRA layer and of the one that PEFT rebuilds with it."""
    return [LayerState(one, adapter_name, init_lora_weights) for one in rebuilt_together(layer)]


def own_parts(layer: LoraLayer) -> tuple[dict[str, nn.Module], dict[tuple[str, str], nn.Parameter]]:
    """A layer's modules by name, and their parameters by the name of the module and their own.

    The base layer is left out, because it may contain other LoRA layers.
    """
    modules = dict(_own_modules(layer))
    parameters = {
        (name, own_name): parameter
        for name, module in modules.items()
        for own_name, parameter in module._parameters.items()
        if parameter is not None
    }
    return modules, parameters


def _own_modules(layer: LoraLayer) -> Iterator[tuple[str, nn.Module]]:
    base = layer.base_layer
    waiting: list[tuple[str, nn.Module]] = [("", cast(nn.Module, layer))]
    for name, module in waiting:  # the list grows on the way
        yield name, module
        children = ((key, child) for key, child in module._modules.items() if child is not None and child is not base)
        waiting.extend((f"{name}.{key}", child) for key, child in children)


def _container(layer: LoraLayer, name: str) -> Any:
    """One of PEFT's per-adapter dictionaries of a layer; some attributes that PEFT lists with them are not one."""
    container = getattr(layer, name, None)
    return container if isinstance(container, (dict, nn.ModuleDict, nn.ParameterDict, BufferDict)) else {}

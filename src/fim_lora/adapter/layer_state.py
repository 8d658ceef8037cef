"""`LayerState`: a LoRA layer before PEFT rebuilds one of its adapters, to carry over to the new one or to restore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraLayer
from torch import nn

from ..config import changes_base_weight
from .lora_layers import layers_rebuilt_together


def layer_states(layer: LoraLayer, adapter_name: str, init_lora_weights: bool | str) -> list[LayerState]:
    """The states of a LoRA layer and of the one that PEFT rebuilds with it."""
    return [LayerState(part, adapter_name, init_lora_weights) for part in layers_rebuilt_together(layer)]


class LayerState:
    """The state of one LoRA layer before one of its adapters is rebuilt with `init_lora_weights`."""

    def __init__(self, layer: Any, adapter_name: str, init_lora_weights: bool | str) -> None:
        self.layer = layer
        self._adapter_name = adapter_name
        self._entries = {
            container: entries[adapter_name]
            for container in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant")
            if adapter_name in (entries := _container(layer, container))
        }
        self._modules, self._parameters = own_modules_and_parameters(layer)
        self._old_parameters = self._parameters
        self._requires_grad = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        self._training = {name: module.training for name, module in self._modules.items()}
        self._restore_base_weight = _base_weight_restorer(layer.get_base_layer(), init_lora_weights)

    def carry_over(self) -> None:
        """Give the rebuilt adapter the device, dtype, mode, dropout and `requires_grad` of the previous one."""
        if "lora_dropout" in self._entries:
            self.layer.lora_dropout[self._adapter_name] = self._entries["lora_dropout"]
        self._modules, self._parameters = own_modules_and_parameters(self.layer)
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
            # and the node stores the old shape. PyTorch makes a new one only if the dtype changes.
            old.data = old.data.new_empty(0, dtype=torch.complex64)
            old.data = parameter.data
            owner, attribute = name
            setattr(self._modules[owner], attribute, old)

    def restore(self) -> None:
        """Put back the previous adapter and base weight."""
        for container, entry in self._entries.items():
            getattr(self.layer, container)[self._adapter_name] = entry
        self._restore_base_weight()
        self._modules, self._parameters = own_modules_and_parameters(self.layer)
        self._set_flags()

    def _set_flags(self) -> None:
        for name, parameter in self._parameters.items():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        for module_name, module in self._modules.items():
            training = self._training.get(module_name, self.layer.training)
            if module.training != training:
                module.training = training


def own_modules_and_parameters(layer: LoraLayer) -> tuple[dict[str, nn.Module], dict[tuple[str, str], nn.Parameter]]:
    """A layer's modules by name, and their parameters by the name of the module and their own.

    The base layer is left out, because it may contain other LoRA layers.
    """
    # Not `layer.named_modules`, with which PEFT's nn.MultiheadAttention registers its base weights again.
    modules = dict(nn.Module.named_modules(layer, memo={layer.base_layer}))
    parameters = {
        (name, own_name): parameter
        for name, module in modules.items()
        for own_name, parameter in module.named_parameters(recurse=False)
    }
    return modules, parameters


def _base_weight_restorer(base_layer: Any, init_lora_weights: bool | str) -> Callable[[], None]:
    """A function that restores the base weight after PiSSA or OLoRA has subtracted the adapter from it."""
    weight = base_layer._parameters.get("weight")
    if weight is None or not changes_base_weight(init_lora_weights):
        return lambda: None
    # OLoRA subtracts from float32 weights in place; all other weights are replaced.
    in_place = init_lora_weights == "olora" and weight.dtype == torch.float32
    values = weight.data.clone() if in_place else weight.data
    quant_state = getattr(base_layer, "quant_state", None)

    def restore() -> None:
        base_layer.weight = weight
        weight.data = values
        # OLoRA replaces the parameter of a bitsandbytes layer, and with it the statistics of the quantization.
        if hasattr(base_layer, "quant_state"):
            base_layer.quant_state = quant_state

    return restore


def _container(layer: LoraLayer, name: str) -> Any:
    """One of PEFT's per-adapter dictionaries of a layer; empty for an attribute of another type."""
    container = getattr(layer, name, None)
    return container if isinstance(container, (dict, nn.ModuleDict, nn.ParameterDict, BufferDict)) else {}

"""The LoRA layers of an adapter, by the names that PEFT matches with the keys of `rank_pattern`."""

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import nn

from ..runtime.wrappers import strip_wrapper_names


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Name, as in the base model, to LoRA layer of an adapter; `model` is a `PeftModel` or has injected adapters.

    A parameter is named by its module and its own name. The output projection of `nn.MultiheadAttention` has no
    entry, because PEFT gives it the rank of the whole attention. Raises `ValueError` if there is no LoRA layer.
    """
    layers = {
        _name_of(name, module): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }
    for name, layer in list(layers.items()):
        if isinstance(layer, MultiheadAttention):
            layers.pop(f"{name}.base_layer.out_proj", None)
    if not layers:
        raise ValueError(
            f"The model has no LoRA layer of an adapter {adapter_name!r}: check its name and its `target_modules`."
        )
    return layers


def layers_rebuilt_together(layer: LoraLayer) -> list[LoraLayer]:
    """A LoRA layer, and the one that PEFT rebuilds with it: the output projection of an attention."""
    return [layer, layer.base_layer.out_proj] if isinstance(layer, MultiheadAttention) else [layer]


def name_in_base_model(name: str) -> str:
    """A layer's name without the prefix that `PeftModel` adds."""
    return name.removeprefix("base_model.model.")


def _name_of(name: str, layer: LoraLayer) -> str:
    name = name_in_base_model(strip_wrapper_names(name))
    if not isinstance(layer, ParamWrapper):
        return name
    # The wrappers of several parameters of one module are nested.
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}"

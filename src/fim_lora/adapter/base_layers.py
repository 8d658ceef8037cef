"""The layers of a base model whose weights can be measured element by element, with or without LoRA layers on them."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..fisher.layers.entries_registry import entries_type
from ..fisher.layers.registry import TargetLayer, base_layer_of, target_layer
from ..runtime.wrappers import strip_wrapper_names, unwrap
from .lora_layers import name_in_base_model


def select_base_layers(model: nn.Module, parameters: Iterable[str] | None) -> dict[str, TargetLayer]:
    """The layers that `parameters` names, by name in the base model; see `get_fim_diagonals`.

    Raises:
        TypeError: If `parameters` is a single string.
        ValueError: If a name is neither that of a supported layer or of its weight, nor that of a module that contains
            such layers; if there is no such layer at all; or if the model has adapters other than LoRA.
    """
    modules = dict(_modules_by_name(model, ""))
    layers = _supported(modules)
    if not layers:
        raise ValueError(
            "The model contains no linear layer, embedding or convolution, so there is no diagonal to measure."
        )
    if parameters is None:
        return _without_aliases(layers)
    if isinstance(parameters, str):
        raise TypeError(f"`parameters` must be a list of names, got the string {parameters!r}: pass [{parameters!r}].")
    selected: dict[str, TargetLayer] = {}
    for name in parameters:
        selected |= _layers_of(name, layers, modules)
    if not selected:
        raise ValueError("`parameters` is empty: name at least one layer, or pass `None` for all layers.")
    return selected


def tied_layers(model: nn.Module, selected: Collection[str]) -> list[str]:
    """The selected layers whose weight is also that of another layer, such as a tied embedding."""
    layers = _without_aliases(_supported(dict(_modules_by_name(model, ""))))
    weights = {name: layer.module._parameters.get("weight") for name, layer in layers.items()}
    shared = [id(weight) for weight in weights.values() if weight is not None]
    return [name for name in selected if name in weights and shared.count(id(weights[name])) > 1]


def _modules_by_name(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules by their names in the base model: base layers, and PEFT's LoRA layers around them.

    The inside of a LoRA layer, and of a module that PEFT trains as a whole, is left out. So is that of a layer of a
    registered type, because `nn.MultiheadAttention` uses the weights of its children without calling them.
    """
    module = unwrap(module)
    if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
        raise ValueError(
            f"Layer {name_in_base_model(name)!r} has an adapter of the class {type(module).__name__}, which is not "
            "LoRA and would take part in the loss: pass the base model, or a model with LoRA adapters."
        )
    yield name_in_base_model(name), module
    is_whole = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    if is_whole or (name and _target(name, module) is not None):
        return
    for child_name, child in module._modules.items():  # with aliases, which `named_children` leaves out
        if child is not None:
            yield from _modules_by_name(child, f"{name}.{child_name}" if name else child_name)


def _target(name: str, module: nn.Module) -> TargetLayer | None:
    try:
        return target_layer(name, module)
    except TypeError:  # its class has no layer type
        return None


def _supported(modules: Mapping[str, nn.Module]) -> dict[str, TargetLayer]:
    targets = {name: _target(name, module) for name, module in modules.items() if name}
    return {name: target for name, target in targets.items() if target is not None and entries_type(target)}


def _without_aliases(layers: Mapping[str, TargetLayer]) -> dict[str, TargetLayer]:
    """Each module under its first name."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        first.setdefault(id(layer.module), name)
    return {name: layers[name] for name in first.values()}


def _layers_of(
    given: str, layers: Mapping[str, TargetLayer], modules: Mapping[str, nn.Module]
) -> dict[str, TargetLayer]:
    name = name_in_base_model(strip_wrapper_names(given))
    for candidate in (name, name.removesuffix(".weight")):
        if candidate in layers:
            return {candidate: layers[candidate]}
    inside = {inner: layer for inner, layer in layers.items() if inner.startswith(f"{name}.")}
    if inside:
        return inside
    parent, _, attribute = name.rpartition(".")
    module = modules.get(name)
    if module is None and hasattr(base_layer_of(modules.get(parent)), attribute):
        module = modules[parent]
    if name and module is not None:
        raise ValueError(
            f"{given!r} of `parameters` belongs to a {type(module).__name__} and cannot be measured: only the weights "
            "of linear layers, embeddings and convolutions can. Leave it out."
        )
    similar = difflib.get_close_matches(name, layers, n=1, cutoff=0) or list(layers)
    raise ValueError(
        f"{given!r} of `parameters` is not a layer of the model: pass full names, such as {similar[0]!r}."
    )

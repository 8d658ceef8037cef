"""The registry of adapter types: how the gradients of an adapter's components are read from the calls of its layer.

A trained adapter adds `ΔW = s · B M A` to a weight, with the core `M = I` (r × r). A component is a direction of the
core, so all that can be known about components is in the gradient of the core, `s · Bᵀ G Aᵀ`, and in the r × r moments
of its two factors, `h = A x` and `u = s · Bᵀ g`. Nothing of the size of the weight is needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.products import compute_dtype, product, without_autocast
from .attribution import concatenate_calls
from .call import LayerCall
from .registry import Observed, TargetLayer, base_layer_of, target_layer


@dataclass(frozen=True)
class ComponentMoments:
    """Moments of the adapter of one layer in one batch, for the loss as it was back-propagated.

    An adapter has P parts of the same rank r: one for most layers, one for each expert, two for an attention.

    Attributes:
        inputs: `Σ h hᵀ` over positions (P × r × r), with `h = A x`.
        gradients: `Σ u uᵀ` over positions (P × r × r), with `u = s · Bᵀ g`.
        core_gradients: `Γ_t = Σ u hᵀ` over the positions of example t (B × P × r × r): the gradient of the core.
        inputs_have_gradients: Whether `inputs` are computed from gradients, too, and depend on the scale of the loss.
    """

    inputs: Tensor
    gradients: Tensor
    core_gradients: Tensor
    inputs_have_gradients: bool = False


MeasureComponents = Callable[["AdaptedLayer", Sequence[LayerCall], int], ComponentMoments]


@dataclass(frozen=True)
class ComponentType:
    """How the adapters of a class of LoRA layers are measured. `register_component_type` creates it.

    Attributes:
        measure: Function of the adapted layer, its calls in one forward pass and the number of examples B. It raises
            `UnattributableError` if rows do not belong to an example.
        observed: What is kept of each call; see `TargetLayer.observed`.
        module: Function of the LoRA layer and the name of the adapter, which returns the module whose calls are
            observed.
    """

    measure: MeasureComponents
    observed: Observed
    module: Callable[[Any, str], Any]


@dataclass(frozen=True)
class AdaptedLayer(TargetLayer):
    """A LoRA layer with a trained adapter. `module` is the module whose calls are observed."""

    lora: Any = None
    adapter_name: str = "default"
    component_type: ComponentType | None = None

    @property
    def observed(self) -> Observed:
        """What is kept of each call, according to the type of the adapter."""
        assert self.component_type is not None
        return self.component_type.observed

    @property
    def base_layer(self) -> Any:
        """The layer inside the LoRA layer."""
        return base_layer_of(self.lora)


def a_of(layer: Any, adapter_name: str) -> Any:
    """`ComponentType.module` of layers that call their A as a module."""
    return layer.lora_A[adapter_name]


def whole_layer(layer: Any, adapter_name: str) -> Any:
    """`ComponentType.module` of layers that are run again."""
    return layer


_COMPONENT_TYPES: dict[str, ComponentType] = {}


def register_component_type(
    *classes: str, observed: Observed, module: Callable[[Any, str], Any]
) -> Callable[[MeasureComponents], MeasureComponents]:
    """Decorator that registers a function as `ComponentType.measure` of some classes of LoRA layers, by full name."""

    def register(function: MeasureComponents) -> MeasureComponents:
        for name in classes:
            _COMPONENT_TYPES[name] = ComponentType(function, observed, module)
        return function

    return register


def adapted_layer(name: str, lora: nn.Module, adapter_name: str, outermost: nn.Module | None = None) -> AdaptedLayer:
    """The adapted layer of PEFT's LoRA layer, looked up by its class, most derived class first.

    `outermost` is the module whose call runs the LoRA layer as it is used, if that is not the LoRA layer itself.
    Raises `TypeError` if neither the layer's class nor a base class of it is registered.
    """
    target = target_layer(name, lora)
    for layer_class in type(lora).__mro__:
        found = _COMPONENT_TYPES.get(f"{layer_class.__module__}.{layer_class.__qualname__}")
        if found is not None:
            module = found.module(lora if outermost is None else outermost, adapter_name)
            return AdaptedLayer(
                name, module, target.layer_type, target.weight_shape, target.parameter_name, lora, adapter_name, found
            )
    raise TypeError(
        f"Layer {name!r} has a {type(lora).__name__}, for which no components are defined. Remove the layer from the "
        "adapter, or register its class with `register_component_type`."
    )


def moments_of_positions(parts: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> ComponentMoments:
    """Moments from h (B × T × r) and u (B × T × r): for each part, one pair for each call."""
    moments = [_moments_of_part(*concatenate_calls(pairs)) for pairs in parts]
    return ComponentMoments(
        torch.stack([inputs for inputs, _, _ in moments]),
        torch.stack([gradients for _, gradients, _ in moments]),
        torch.stack([core for _, _, core in moments], dim=1),
    )


def _moments_of_part(h: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(h, u)
    h_rows, u_rows = h.flatten(0, 1)[None], u.flatten(0, 1)[None]
    with torch.no_grad(), without_autocast(h.device.type):
        inputs = product(h_rows.mT, h_rows, dtype)[0]
        gradients = product(u_rows.mT, u_rows, dtype)[0]
        return inputs, gradients, product(u.mT, h, dtype)


def moments_of_core_gradients(core_gradients: Tensor) -> ComponentMoments:
    """Moments from the core gradients `Γ_t` (B × P × r × r) alone, where positions are not available.

    The two factors are `Σ_t Γ_tᵀ Γ_t` and `Σ_t Γ_t Γ_tᵀ`, whose Kronecker product is the first step of a power
    iteration towards the best approximation of `Σ_t vec(Γ_t) vec(Γ_t)ᵀ` (Morwani et al. 2024, arXiv:2406.17748).
    """
    inputs = (core_gradients.mT @ core_gradients).sum(0)
    gradients = (core_gradients @ core_gradients.mT).sum(0)
    return ComponentMoments(inputs, gradients, core_gradients, inputs_have_gradients=True)

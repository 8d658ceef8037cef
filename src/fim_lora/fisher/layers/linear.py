"""Linear layers, quantized or not: `nn.Linear`, `Conv1D` of transformers, and PEFT's layers for quantized ones."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..gradients.entries import add_squared_entries
from ..gradients.norms import squared_norms
from .attribution import by_example, concatenate_calls, flatten_positions
from .call import LayerCall
from .components import AdaptedLayer, ComponentMoments, a_of, moments_of_positions, register_component_type
from .entries_registry import register_entries
from .registry import TENSOR_PARALLELISM, TargetLayer, WeightShape, base_layer_of, register_layer_type


def _linear_shape(layer: Any) -> WeightShape:
    return WeightShape(layer.out_features, layer.in_features)


def _conv1d_shape(layer: Any) -> WeightShape:
    base = base_layer_of(layer)
    return WeightShape(base.nf, base.nx)


# Quantized layers that are not a subclass of nn.Linear are recognized by PEFT's class for them.
@register_layer_type(
    nn.Linear,
    "peft.tuners.lora.aqlm.AqlmLoraLinear",
    "peft.tuners.lora.awq.AwqLoraLinear",
    "peft.tuners.lora.eetq.EetqLoraLinear",
    "peft.tuners.lora.gptq.GPTQLoraLinear",
    "peft.tuners.lora.hqq.HqqLoraLinear",
    "peft.tuners.lora.inc.IncLoraLinear",
    "peft.tuners.lora.te.TeLinear",
    weight_shape=_linear_shape,
)
@register_layer_type(Conv1D, weight_shape=_conv1d_shape)
def measure_linear(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """`‖G_t‖²_F` (B) with `G_t = g_tᵀ x_t`, from inputs (B × … × d_in) and gradients (B × … × d_out).

    All dimensions between are positions. Long examples are read through `LayerCall.sketch`, if it is given. Raises
    `UnattributableError`, and `ValueError` if only a part of the layer is in this process.
    """
    x, g = _positions(target, calls, batch_size)
    return squared_norms(x, g, sketch=calls[0].sketch)


@register_component_type(
    "peft.tuners.lora.layer.LoraLayer",  # every layer that calls its A and has no type of its own
    observed="output",
    module=a_of,
)
def measure_linear_components(target: AdaptedLayer, calls: Sequence[LayerCall], batch_size: int) -> ComponentMoments:
    """Moments of one part, from the outputs h of A and their gradients u (B × … × r). May raise `UnattributableError`.

    All dimensions between are positions. A and B are not read, so they may be sharded.
    """
    pairs = [by_example(call.input, call.gradient, batch_size) for call in calls]
    return moments_of_positions([[(flatten_positions(h), flatten_positions(u)) for h, u in pairs]])


def _linear_entries_shape(target: TargetLayer) -> tuple[int, int]:
    shape = (target.weight_shape.d_out, target.weight_shape.d_in)
    return shape[::-1] if isinstance(target.module, Conv1D) else shape


@register_entries(measure_linear, entries_shape=_linear_entries_shape)
def add_linear_entries(
    total: Tensor, target: TargetLayer, calls: Sequence[LayerCall], batch_size: int, factor: float
) -> None:
    """`total += factor · Σ_t (g_tᵀ x_t) ∘ (g_tᵀ x_t)`, transposed as the weight is in `Conv1D`.

    Arguments and errors are those of `measure_linear`.
    """
    x, g = _positions(target, calls, batch_size)
    first, second = (g, x) if isinstance(target.module, Conv1D) else (x, g)
    add_squared_entries(total, first, second, factor)


def _positions(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> tuple[Tensor, Tensor]:
    """Inputs (B × T × d_in) and gradients (B × T × d_out) of all calls; errors are those of `measure_linear`."""
    shape = (target.weight_shape.d_out, target.weight_shape.d_in)
    for call in calls:
        found = (call.gradient.shape[-1], call.input.shape[-1])
        if found != shape:
            raise ValueError(_shape_error(target, shape, found))
    pairs = [by_example(call.input, call.gradient, batch_size) for call in calls]
    x, g = concatenate_calls([(flatten_positions(x), flatten_positions(g)) for x, g in pairs])
    return x, g


def _shape_error(target: TargetLayer, shape: tuple[int, int], found: tuple[int, int]) -> str:
    kind = type(target.module)
    if isinstance(target.module, nn.Linear) and kind.forward is not nn.Linear.forward:
        return (
            f"Layer {target.name!r} has a weight of shape {shape}, but its {kind.__name__} maps {found[1]} inputs to "
            f"{found[0]} outputs: it is not a linear layer, but for example one of several groups. Remove it from "
            "`target_modules`, add it to `exclude_modules`, or register its class with `fim_lora.register_layer_type`."
        )
    return f"Layer {target.name!r} is {shape}, but in this process it is {found}. {TENSOR_PARALLELISM}"

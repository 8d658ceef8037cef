"""Linear layers, quantized or not: `nn.Linear`, `Conv1D` of transformers, and PEFT's layers for quantized ones."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..gradients.norms import squared_norms
from .attribution import by_example, concatenate_calls, flatten_positions
from .call import LayerCall
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
    shape = (target.weight_shape.d_out, target.weight_shape.d_in)
    for call in calls:
        found = (call.gradient.shape[-1], call.input.shape[-1])
        if found != shape:
            raise ValueError(
                f"Layer {target.name!r} is {shape}, but in this process it is {found}. {TENSOR_PARALLELISM}"
            )
    pairs = [by_example(call.input, call.gradient, batch_size) for call in calls]
    x, g = concatenate_calls([(flatten_positions(x), flatten_positions(g)) for x, g in pairs])
    return squared_norms(x, g, sketch=calls[0].sketch)

"""Convolutions with any stride, padding, dilation and groups, by PyTorch's own gradient of the weight."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ..gradients.entries import accumulator
from ..gradients.products import compute_dtype, without_autocast
from .attribution import by_leading_dimension
from .call import LayerCall
from .components import AdaptedLayer, ComponentMoments, a_of, moments_of_positions, register_component_type
from .entries_registry import register_entries
from .registry import TargetLayer, WeightShape, base_layer_of, leading_only, register_layer_type

# By the number of spatial dimensions.
_WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def _convolution_shape(layer: Any) -> WeightShape:
    """In PEFT, A (r × C_in × kernel) does not have groups, but B (C_out × r / groups) does."""
    base = base_layer_of(layer)
    d_in = base.in_channels * math.prod(base.kernel_size)
    return WeightShape(
        d_out=base.out_channels,
        d_in=d_in,
        num_entries=base.out_channels * d_in // base.groups,
        parameters_per_rank=d_in + base.out_channels // base.groups,
        rank_step=base.groups,
    )


@register_layer_type(nn.Conv1d, nn.Conv2d, nn.Conv3d, weight_shape=_convolution_shape, batch_dimensions=leading_only)
def measure_convolution(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """`‖G_t‖²_F` (B), in float32 or float64, from inputs (B × C_in × …) and gradients (B × C_out × …).

    Inputs are not unfolded, and only the gradient of one example exists at a time. Raises `UnattributableError`.
    """
    layer = target.module
    pairs = [_images_by_example(call, len(layer.kernel_size) + 2, batch_size) for call in calls]
    with torch.no_grad(), without_autocast(pairs[0][0].device.type):
        gradients = (_gradient_of_example(layer, pairs, example) for example in range(batch_size))
        return torch.stack([torch.linalg.vector_norm(gradient).square() for gradient in gradients])


def _gradient_of_example(layer: Any, pairs: Sequence[tuple[Tensor, Tensor]], example: int) -> Tensor:
    """The gradient of the weight (C_out × C_in / groups × kernel) for one example, summed over the calls."""
    weight_gradient = _WEIGHT_GRADIENTS[len(layer.kernel_size)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    dtype = compute_dtype(*pairs[0])
    gradients = (
        weight_gradient(
            F.pad(x[example].to(dtype), layer._reversed_padding_repeated_twice, mode=mode),
            _shape_of_weight(layer),
            g[example].to(dtype),
            stride=layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
        )
        for x, g in pairs
    )
    return cast(Tensor, sum(gradients))


def _shape_of_weight(layer: Any) -> tuple[int, ...]:
    """From attributes, because a sharded or offloaded weight may be empty."""
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def _images_by_example(call: LayerCall, num_dimensions: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Input and gradient (B × n × C × …), because an example may have n images; B and n are 1 for a single image."""
    x, g = call.input, call.gradient
    if x.ndim < num_dimensions:
        x, g = x.unsqueeze(0), g.unsqueeze(0)
    x, g = by_leading_dimension(x, g, batch_size)
    image = 1 - num_dimensions  # the dimensions of one image are the last ones
    return x.reshape(batch_size, -1, *x.shape[image:]), g.reshape(batch_size, -1, *g.shape[image:])


@register_component_type("peft.tuners.lora.layer._ConvNd", observed="output", module=a_of)
def measure_convolution_components(
    target: AdaptedLayer, calls: Sequence[LayerCall], batch_size: int
) -> ComponentMoments:
    """Moments of one part for each group, from the outputs h of A and their gradients u (B × r × …).

    The B of a grouped convolution has groups, too, so components of different groups do not mix. Every place of the
    output is a position. Raises `UnattributableError`.
    """
    groups, num_dimensions = target.base_layer.groups, len(target.module.kernel_size) + 2
    pairs = [_images_by_example(call, num_dimensions, batch_size) for call in calls]
    by_group = [(_positions_by_group(h, groups), _positions_by_group(u, groups)) for h, u in pairs]
    return moments_of_positions([[(h[group], u[group]) for h, u in by_group] for group in range(groups)])


def _positions_by_group(value: Tensor, groups: int) -> list[Tensor]:
    """From (B × n × r × …) to (B × T × r / groups) for each group."""
    positions = value.flatten(3).permute(0, 1, 3, 2).flatten(1, 2)
    return list(positions.chunk(groups, dim=-1))


def _convolution_entries_shape(target: TargetLayer) -> tuple[int, ...]:
    return _shape_of_weight(target.module)


@register_entries(measure_convolution, entries_shape=_convolution_entries_shape)
def add_convolution_entries(
    total: Tensor, target: TargetLayer, calls: Sequence[LayerCall], batch_size: int, factor: float
) -> None:
    """`total += factor · Σ_t G_t ∘ G_t`, with arguments and errors of `measure_convolution`.

    The temporary memory is one gradient of the weight, and a second one if `total` is on another device.
    """
    layer = target.module
    pairs = [_images_by_example(call, len(layer.kernel_size) + 2, batch_size) for call in calls]
    device, dtype = pairs[0][0].device, compute_dtype(*pairs[0])
    with torch.no_grad(), without_autocast(device.type), accumulator(total, device, dtype) as block:
        for example in range(batch_size):
            gradient = _gradient_of_example(layer, pairs, example)
            block.addcmul_(gradient, gradient, value=factor)

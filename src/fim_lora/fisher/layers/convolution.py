"""Convolutions with any stride, padding, dilation and groups, by PyTorch's own gradient of the weight."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ..gradients.products import compute_dtype, without_autocast
from .attribution import by_leading_dimension
from .call import LayerCall
from .registry import TargetLayer, WeightShape, base_layer_of, register_layer_type

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


@register_layer_type(nn.Conv1d, nn.Conv2d, nn.Conv3d, weight_shape=_convolution_shape)
def measure_convolution(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """`‖G_t‖²_F` (B), in float32 or float64, from inputs (B × C_in × …) and gradients (B × C_out × …).

    Inputs are not unfolded, and only the gradient of one example exists at a time. Raises `UnattributableError`.
    """
    layer = target.module
    pairs = [_images_by_example(call, layer.weight.ndim, batch_size) for call in calls]
    weight_gradient = _WEIGHT_GRADIENTS[layer.weight.ndim - 2]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    dtype = compute_dtype(*pairs[0])
    norms = []
    with torch.no_grad(), without_autocast(pairs[0][0].device.type):
        for example in range(batch_size):
            gradient = sum(
                weight_gradient(
                    F.pad(x[example].to(dtype), layer._reversed_padding_repeated_twice, mode=mode),
                    layer.weight.shape,
                    g[example].to(dtype),
                    stride=layer.stride,
                    dilation=layer.dilation,
                    groups=layer.groups,
                )
                for x, g in pairs
            )
            norms.append(torch.linalg.vector_norm(gradient).square())
    return torch.stack(norms)


def _images_by_example(call: LayerCall, num_dimensions: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Input and gradient (B × n × C × …), because an example may have n images; B and n are 1 for a single image."""
    x, g = call.input, call.gradient
    if x.ndim < num_dimensions:
        x, g = x.unsqueeze(0), g.unsqueeze(0)
    x, g = by_leading_dimension(x, g, batch_size)
    image = 1 - num_dimensions  # the dimensions of one image are the last ones
    return x.reshape(batch_size, -1, *x.shape[image:]), g.reshape(batch_size, -1, *g.shape[image:])

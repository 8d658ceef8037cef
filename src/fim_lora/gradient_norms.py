"""Per-example squared gradient norms of a frozen weight: one function per layer type, in a registry.

With `x` the input of a layer and `g` the gradient of the loss with respect to its output, the gradient of example
t's share of the loss is `g_tᵀ x_t`, summed over positions. Its squared Frobenius norm needs neither the weight nor
its gradient (Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679), so the weight may be quantised,
sharded or offloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MAX_TEMPORARY_BYTES = 64 * 2**20
"""Bound of the temporary memory of either form below, in bytes, whatever the batch and the length."""

Matrices = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
Shape = Callable[[Any], tuple[int, int]]


@dataclass(frozen=True)
class LayerType:
    """What has to be known of a layer class.

    Attributes:
        matrices: Takes the layer, its input and the gradient of its output, both with the examples first, and
            returns `x` (B × T × d_in) and `g` (B × T × d_out) such that `g_tᵀ x_t` is the gradient of the weight.
        shape: Takes the layer and returns `(d_out, d_in)` of its weight.
    """

    matrices: Matrices
    shape: Shape


_LAYER_TYPES: dict[type[nn.Module], LayerType] = {}


def register_layer_type(layer_class: type[nn.Module], shape: Shape) -> Callable[[Matrices], Matrices]:
    """Decorator: the function below it is `LayerType.matrices` of `layer_class` and its subclasses.

    Args:
        layer_class: Class of the base layer, as it is found in the model without an adapter.
        shape: `LayerType.shape`.

    Returns:
        The decorator.
    """

    def register(matrices: Matrices) -> Matrices:
        _LAYER_TYPES[layer_class] = LayerType(matrices, shape)
        return matrices

    return register


def layer_type(name: str, layer: nn.Module) -> LayerType:
    """Look a layer's type up by its class, the most derived registered class first.

    Args:
        name: Name of the layer, for the error.
        layer: The base layer.

    Returns:
        The registered type.

    Raises:
        TypeError: If neither the class nor a base class of it is registered.
    """
    for layer_class in type(layer).__mro__:
        if layer_class in _LAYER_TYPES:
            return _LAYER_TYPES[layer_class]
    supported = ", ".join(sorted(layer_class.__name__ for layer_class in _LAYER_TYPES))
    raise TypeError(
        f"Layer {name!r} is a {type(layer).__module__}.{type(layer).__qualname__}, for which no eFIM is defined "
        f"(supported: {supported}). Take it out of `target_modules`, or add it with `exclude_modules`."
    )


@register_layer_type(nn.Linear, shape=lambda layer: (layer.out_features, layer.in_features))
@register_layer_type(Conv1D, shape=lambda layer: (layer.weight.shape[1], layer.weight.shape[0]))
def linear_matrices(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer: every dimension between the examples and the features is a position.

    Args:
        layer: The layer; not used.
        x: Input (B × … × d_in).
        g: Gradient of the output (B × … × d_out).

    Returns:
        `x` (B × T × d_in) and `g` (B × T × d_out).
    """
    return x.reshape(x.shape[0], -1, x.shape[-1]), g.reshape(g.shape[0], -1, g.shape[-1])


def squared_norms(x: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES) -> Tensor:
    """`‖g_tᵀ x_t‖²_F` of every example t, in the cheaper of two forms (Bu et al. 2022, arXiv:2205.10683).

    Computed in float32, or in float64 if a tensor is float64, whatever autocast says.

    Args:
        x: Input of the layer (B × T × d_in).
        g: Gradient of its output (B × T × d_out).
        max_temporary_bytes: Bound of the temporary memory, in bytes.

    Returns:
        Squared norms (B), float32 or float64.
    """
    positions, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
    if positions == 0:  # an expert that no token was routed to
        return x.new_zeros(x.shape[0], dtype=_compute_dtype(x, g))
    gram_is_cheaper = positions * (d_in + d_out) < d_in * d_out
    form = gram_squared_norms if gram_is_cheaper else materialised_squared_norms
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return form(x, g, max_temporary_bytes)


def gram_squared_norms(x: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES) -> Tensor:
    """`Σ_{u,v} (x_t x_tᵀ)_{uv} (g_t g_tᵀ)_{uv}`, at most `2 T² (d_in + d_out)` operations per example.

    Args:
        x: Input of the layer (B × T × d_in).
        g: Gradient of its output (B × T × d_out).
        max_temporary_bytes: Bound of the temporary memory, in bytes: blocks of the two Gram matrices, and copies
            of the rows of `x` and `g` that they are made of, in the precision of the computation.

    Returns:
        Squared norms (B), float32 or float64.
    """
    dtype = _compute_dtype(x, g)
    examples, positions = x.shape[:2]
    numbers = max_temporary_bytes // dtype.itemsize
    # A pair of blocks of s positions takes 2 s² numbers for its Gram matrices and 2 s · copied for its copies.
    copied = _copied_features(x, g, dtype)
    size = (math.isqrt(copied**2 + 2 * numbers) - copied) // 2
    size = min(max(size, 1), positions)
    group = max(numbers // (2 * size * (size + copied)), 1)

    norms = x.new_zeros(examples, dtype=dtype)
    for some in _slices(examples, group):
        for rows in _slices(positions, size):
            x_rows, g_rows = x[some, rows].to(dtype), g[some, rows].to(dtype)
            norms[some] += _sum_of_product(x_rows, x_rows, g_rows, g_rows)
            for columns in _slices(positions, size, start=rows.stop):
                x_columns, g_columns = x[some, columns].to(dtype), g[some, columns].to(dtype)
                # The Gram matrices are symmetric, so the block below the diagonal gives the same sum again.
                norms[some] += 2 * _sum_of_product(x_rows, x_columns, g_rows, g_columns)
    return norms


def _sum_of_product(x_rows: Tensor, x_columns: Tensor, g_rows: Tensor, g_columns: Tensor) -> Tensor:
    product = x_rows @ x_columns.mT
    product *= g_rows @ g_columns.mT
    return product.sum(dim=(1, 2))


def materialised_squared_norms(x: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES) -> Tensor:
    """`Σ_{ij} (g_tᵀ x_t)_{ij}²`, `2 T d_in d_out` operations per example.

    Args:
        x: Input of the layer (B × T × d_in).
        g: Gradient of its output (B × T × d_out).
        max_temporary_bytes: Bound of the temporary memory, in bytes: rows of the per-example gradients, and
            copies of the positions of `x` and `g` in the precision of the computation.

    Returns:
        Squared norms (B), float32 or float64.
    """
    dtype = _compute_dtype(x, g)
    examples, positions, d_in, d_out = *x.shape, g.shape[2]
    # Half of the memory for the gradients, half for the copies.
    half = max_temporary_bytes // dtype.itemsize // 2
    rows = min(max(half // d_in, 1), d_out)
    copied = max(_copied_features(x, g, dtype), 1)
    block = min(max(half // copied, 1), positions)
    group = max(min(half // (rows * d_in), half // (block * copied)), 1)

    norms = x.new_zeros(examples, dtype=dtype)
    for some in _slices(examples, group):
        for out in _slices(d_out, rows):
            gradient = x.new_zeros((norms[some].shape[0], out.stop - out.start, d_in), dtype=dtype)
            for span in _slices(positions, block):
                gradient.baddbmm_(g[some, span, out].to(dtype).mT, x[some, span].to(dtype))
            norms[some] += torch.linalg.vector_norm(gradient, dim=(1, 2)).square()
    return norms


def _compute_dtype(x: Tensor, g: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, g.dtype) else torch.float32


def _copied_features(x: Tensor, g: Tensor, dtype: torch.dtype) -> int:
    """Numbers per position that have to be copied to compute in `dtype`."""
    return sum(tensor.shape[2] for tensor in (x, g) if tensor.dtype != dtype)


def _slices(length: int, size: int, start: int = 0) -> Iterator[slice]:
    for first in range(start, length, size):
        yield slice(first, min(first + size, length))

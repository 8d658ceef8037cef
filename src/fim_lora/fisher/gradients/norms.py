"""Per-example squared gradient norms of a frozen matrix: pure functions of tensors.

With `x` the input of a layer and `g` the gradient of the loss with respect to its output, the gradient of example
t's share of the loss is `g_tᵀ x_t`, summed over positions. Its squared Frobenius norm needs neither the weight nor
its gradient (Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679), so the weight may be quantized,
sharded or offloaded.
"""

import math

import torch
from torch import Tensor

from .products import (
    MAX_TEMPORARY_BYTES,
    add_product,
    compute_dtype,
    copied_features,
    copied_if_needed,
    product,
    slices,
    without_autocast,
)
from .sketch import Sketch, max_exact_positions, sketched_squared_norms

_MIN_HALF = 64
"""Fewest positions in a half of a Gram matrix for which the symmetry is used."""


def squared_norms(
    x: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES, sketch: Sketch | None = None
) -> Tensor:
    """`‖g_tᵀ x_t‖²_F` (B) from x (B × T × d_in) and g (B × T × d_out), in the cheaper of two forms.

    The choice is that of Bu et al. 2022, arXiv:2205.10683. Products and sums are in float32, or in float64 if a tensor
    is float64, regardless of autocast, and even if a GPU multiplies in half precision. `max_temporary_bytes` bounds
    the temporary memory. Examples of more than `max_exact_positions` are read through `sketch`, if it is given.
    """
    positions, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
    if positions == 0:  # an expert that no token was routed to
        return x.new_zeros(x.shape[0], dtype=compute_dtype(x, g))
    gram_is_cheaper = positions * (d_in + d_out) < d_in * d_out
    form = gram_squared_norms if gram_is_cheaper else materialized_squared_norms
    with torch.no_grad(), without_autocast(x.device.type):
        if sketch is not None and positions > max_exact_positions(d_in, d_out):
            return sketched_squared_norms(x, g, sketch, max_temporary_bytes)
        return form(x, g, max_temporary_bytes)


def gram_squared_norms(x: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES) -> Tensor:
    """`Σ_{u,v} (x_t x_tᵀ)_{uv} (g_t g_tᵀ)_{uv}`, at most `2 T² (d_in + d_out)` operations per example.

    Both matrices are symmetric, so a CPU does three quarters of these operations if T is even and at least 128, and
    fewer if half of T is, too. Shapes are as in `squared_norms`. The bounded temporary memory consists of blocks of
    the two Gram matrices, and of copies in the computing precision of the rows of `x` and `g` that make them up.
    """
    dtype = compute_dtype(x, g)
    examples, positions = x.shape[:2]
    numbers = max_temporary_bytes // dtype.itemsize
    # A pair of blocks of s positions takes 2 s² numbers for its Gram matrices and 2 s · copied for its copies.
    copied = copied_features((x, x), (g, g), dtype=dtype)
    size = (math.isqrt(copied**2 + 2 * numbers) - copied) // 2
    size = min(max(size, 1), positions)
    group_size = max(numbers // (2 * size * (size + copied)), 1)

    if examples <= group_size and positions <= size:
        # Small layers are numerous; slicing them would take as long as the products.
        return _sum_of_symmetric_product(copied_if_needed(x, dtype), copied_if_needed(g, dtype), dtype)
    norms = x.new_zeros(examples, dtype=dtype)
    for group in slices(examples, group_size):
        for rows in slices(positions, size):
            x_rows, g_rows = copied_if_needed(x[group, rows], dtype), copied_if_needed(g[group, rows], dtype)
            norms[group] += _sum_of_product(x_rows, x_rows, g_rows, g_rows, dtype)
            for columns in slices(positions, size, start=rows.stop):
                x_columns = copied_if_needed(x[group, columns], dtype)
                g_columns = copied_if_needed(g[group, columns], dtype)
                # The Gram matrices are symmetric, so the block below the diagonal gives the same sum again.
                norms[group] += 2 * _sum_of_product(x_rows, x_columns, g_rows, g_columns, dtype)
    return norms


def _sum_of_symmetric_product(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """`_sum_of_product(x, x, g, g, dtype)`, in which the part above the diagonal is computed and counted twice."""
    examples, positions = x.shape[:2]
    half = positions // 2
    # Smaller products lose more than the symmetry saves, and a GPU would wait for the host to start so many of them.
    if not x.is_cpu or positions % 2 or half < _MIN_HALF or not (x.is_contiguous() and g.is_contiguous()):
        return _sum_of_product(x, x, g, g, dtype)
    above_diagonal = _sum_of_product(x[:, :half], x[:, half:], g[:, :half], g[:, half:], dtype)
    x, g = (tensor.reshape(2 * examples, half, -1) for tensor in (x, g))
    return _sum_of_symmetric_product(x, g, dtype).reshape(examples, 2).sum(1) + 2 * above_diagonal


def _sum_of_product(
    x_rows: Tensor, x_columns: Tensor, g_rows: Tensor, g_columns: Tensor, dtype: torch.dtype
) -> Tensor:
    gram = product(x_rows, x_columns.mT, dtype)
    gram *= product(g_rows, g_columns.mT, dtype)
    return gram.sum(dim=(1, 2))


def materialized_squared_norms(x: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES) -> Tensor:
    """`Σ_{ij} (g_tᵀ x_t)_{ij}²`, `2 T d_in d_out` operations per example.

    Shapes are as in `squared_norms`. The bounded temporary memory consists of rows of the per-example gradients, and
    of copies in the computing precision of positions of `x` and `g`.
    """
    dtype = compute_dtype(x, g)
    examples, positions, d_in, d_out = *x.shape, g.shape[2]
    # Half of the memory for the gradients, half for the copies.
    half = max_temporary_bytes // dtype.itemsize // 2
    rows = min(max(half // d_in, 1), d_out)
    copied = max(copied_features((x, g), (g, x), dtype=dtype), 1)
    block = min(max(half // copied, 1), positions)
    group_size = max(min(half // (rows * d_in), half // (block * copied)), 1)

    if examples <= group_size and d_out <= rows and positions <= block:
        # As in `gram_squared_norms`: no slices if one product is enough.
        return torch.linalg.vector_norm(product(g.mT, x, dtype), dim=(1, 2)).square_()
    norms = x.new_zeros(examples, dtype=dtype)
    for group in slices(examples, group_size):
        for outputs in slices(d_out, rows):
            gradient = x.new_zeros((norms[group].shape[0], outputs.stop - outputs.start, d_in), dtype=dtype)
            for span in slices(positions, block):
                add_product(gradient, g[group, span, outputs].mT, x[group, span])
            norms[group] += torch.linalg.vector_norm(gradient, dim=(1, 2)).square()
    return norms

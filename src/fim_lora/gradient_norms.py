"""Per-example squared gradient norms of a frozen matrix: pure functions of tensors.

With `x` the input of a layer and `g` the gradient of the loss with respect to its output, the gradient of example
t's share of the loss is `g_tᵀ x_t`, summed over positions. Its squared Frobenius norm needs neither the weight nor
its gradient (Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679), so the weight may be quantised,
sharded or offloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .products import multiplies_narrow_uncopied, multiplies_uncopied, product, product_with_narrow
from .sketch import WIDTH, Sketch, most_exact_positions, random_signs

MAX_TEMPORARY_BYTES = 64 * 2**20
"""Bound of the temporary memory of the norms of matrices, in bytes, whatever the batch and the length."""

_LEAST_HALF = 64
"""Positions in the smallest block of a Gram matrix that is computed by itself because of its symmetry."""

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

# By the number of spatial dimensions.
_WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def squared_norms(
    x: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES, sketch: Sketch | None = None
) -> Tensor:
    """`‖g_tᵀ x_t‖²_F` of every example t, in the cheaper of two forms (Bu et al. 2022, arXiv:2205.10683).

    Computed in float32, or in float64 if a tensor is float64, whatever autocast says: where a GPU multiplies in half
    precision, products and sums are in float32 all the same. Long examples may be read through a random projection
    instead.

    Args:
        x: Input of the layer (B × T × d_in).
        g: Gradient of its output (B × T × d_out).
        max_temporary_bytes: Bound of the temporary memory, in bytes.
        sketch: The projection for examples of more than `most_exact_positions`; `None` to be exact in any case.

    Returns:
        Squared norms (B), float32 or float64.
    """
    positions, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
    if positions == 0:  # an expert that no token was routed to
        return x.new_zeros(x.shape[0], dtype=_compute_dtype(x, g))
    gram_is_cheaper = positions * (d_in + d_out) < d_in * d_out
    form = gram_squared_norms if gram_is_cheaper else materialised_squared_norms
    with torch.no_grad(), _without_autocast(x.device.type):
        if sketch is not None and positions > most_exact_positions(d_in, d_out):
            return sketched_squared_norms(x, g, sketch, max_temporary_bytes)
        return form(x, g, max_temporary_bytes)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off; where it is off, as it mostly is in a backward pass, without a change of the state."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def gram_squared_norms(x: Tensor, g: Tensor, max_temporary_bytes: int = MAX_TEMPORARY_BYTES) -> Tensor:
    """`Σ_{u,v} (x_t x_tᵀ)_{uv} (g_t g_tᵀ)_{uv}`, at most `2 T² (d_in + d_out)` operations per example.

    Both matrices are symmetric, so on a CPU three quarters of these are done where T is even and at least 128, and
    fewer where half of T is, too.

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
    copied = _copied_features((x, x), (g, g), dtype=dtype)
    size = (math.isqrt(copied**2 + 2 * numbers) - copied) // 2
    size = min(max(size, 1), positions)
    group = max(numbers // (2 * size * (size + copied)), 1)

    if examples <= group and positions <= size:
        # Small layers are many; slicing them would take as long as the products.
        return _sum_of_symmetric_product(_copied(x, dtype), _copied(g, dtype), dtype)
    norms = x.new_zeros(examples, dtype=dtype)
    for some in _slices(examples, group):
        for rows in _slices(positions, size):
            x_rows, g_rows = _copied(x[some, rows], dtype), _copied(g[some, rows], dtype)
            norms[some] += _sum_of_product(x_rows, x_rows, g_rows, g_rows, dtype)
            for columns in _slices(positions, size, start=rows.stop):
                x_columns, g_columns = _copied(x[some, columns], dtype), _copied(g[some, columns], dtype)
                # The Gram matrices are symmetric, so the block below the diagonal gives the same sum again.
                norms[some] += 2 * _sum_of_product(x_rows, x_columns, g_rows, g_columns, dtype)
    return norms


def _sum_of_product(
    x_rows: Tensor, x_columns: Tensor, g_rows: Tensor, g_columns: Tensor, dtype: torch.dtype
) -> Tensor:
    gram = product(x_rows, x_columns.mT, dtype)
    gram *= product(g_rows, g_columns.mT, dtype)
    return gram.sum(dim=(1, 2))


def _sum_of_symmetric_product(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """`_sum_of_product(x, x, g, g, dtype)`, of which the part above the diagonal is computed and counted twice."""
    examples, positions = x.shape[:2]
    half = positions // 2
    # Smaller products are less efficient than they are few, and a GPU would wait for the host to start so many.
    if not x.is_cpu or positions % 2 or half < _LEAST_HALF or not (x.is_contiguous() and g.is_contiguous()):
        return _sum_of_product(x, x, g, g, dtype)
    beside = _sum_of_product(x[:, :half], x[:, half:], g[:, :half], g[:, half:], dtype)
    x, g = (tensor.reshape(2 * examples, half, -1) for tensor in (x, g))
    return _sum_of_symmetric_product(x, g, dtype).reshape(examples, 2).sum(1) + 2 * beside


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
    copied = max(_copied_features((x, g), (g, x), dtype=dtype), 1)
    block = min(max(half // copied, 1), positions)
    group = max(min(half // (rows * d_in), half // (block * copied)), 1)

    if examples <= group and d_out <= rows and positions <= block:
        # As above: no slices where one product is all.
        return torch.linalg.vector_norm(product(g.mT, x, dtype), dim=(1, 2)).square_()
    norms = x.new_zeros(examples, dtype=dtype)
    for some in _slices(examples, group):
        for out in _slices(d_out, rows):
            gradient = x.new_zeros((norms[some].shape[0], out.stop - out.start, d_in), dtype=dtype)
            for span in _slices(positions, block):
                _add_product(gradient, g[some, span, out].mT, x[some, span])
            norms[some] += torch.linalg.vector_norm(gradient, dim=(1, 2)).square()
    return norms


def sketched_squared_norms(
    x: Tensor, g: Tensor, sketch: Sketch, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
) -> Tensor:
    """`(1/k) Σ_j ‖G_t ω_j‖²` with random signs ω, `2 T k (d_in + d_out)` operations per example.

    An estimate without bias (Hutchinson 1990, of the trace of `G_tᵀ G_t`), of which the variance is at most
    `2/k · ‖G_tᵀ G_t‖²_F`, so its standard deviation is at most `sqrt(2/k)` of the value; equality is approached
    where `G_t` has rank one, and r equal singular values divide it by `sqrt(r)`. Every example has signs of its own,
    so the standard error over examples has this noise in it.

    Args:
        x: Input of the layer (B × T × d_in).
        g: Gradient of its output (B × T × d_out).
        sketch: Draws the signs.
        max_temporary_bytes: Bound of the temporary memory, in bytes: signs, their products with `x` and `g`, and
            copies of positions of `x` and `g` in the precision of the computation.

    Returns:
        Estimates (B), float32 or float64.
    """
    if x.shape[2] > g.shape[2]:
        x, g = g, x  # the norm of the transpose is the same, and the narrower side needs fewer signs
    dtype = _compute_dtype(x, g)
    examples, positions, d_in, d_out = *x.shape, g.shape[2]
    # Half of the memory for the signs and G ω, half for x ω and the copies, with what is there on the way to them.
    numbers = max_temporary_bytes // dtype.itemsize
    per_position = 5 * WIDTH + _copied_features((x, x), dtype=dtype)
    per_position += 0 if multiplies_narrow_uncopied(g, dtype) else d_out
    block = min(max(numbers // 2 // per_position, 1), positions)
    group = max(min(numbers // 2 // (WIDTH * (2 * d_in + 5 * d_out)), numbers // 2 // (block * per_position)), 1)
    generator = sketch.generator(x.device)
    signs_dtype = x.dtype if multiplies_uncopied(x, x, dtype) else dtype

    norms = []
    for some in _slices(examples, group):
        signs = random_signs((some.stop - some.start, d_in, WIDTH), generator, signs_dtype)
        blocks = (
            product_with_narrow(g[some, span].mT, product(x[some, span], signs, dtype))
            for span in _slices(positions, block)
        )
        norms.append(torch.linalg.vector_norm(reduce(Tensor.add_, blocks), dim=(1, 2)))
    return torch.cat(norms).square_() / WIDTH


def _compute_dtype(x: Tensor, g: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, g.dtype) else torch.float32


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, with a second matrix of the size of `total` only where there are no copies."""
    if left.dtype != total.dtype and multiplies_uncopied(left, right, total.dtype):
        total += product(left, right, total.dtype)
    else:
        total.baddbmm_(left.to(total.dtype), right.to(total.dtype))


def _copied_features(*factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> int:
    """Numbers per position that have to be copied to compute in `dtype`: of the first of two factors each."""
    return sum(
        tensor.shape[2]
        for tensor, other in factors
        if tensor.dtype != dtype and not multiplies_uncopied(tensor, other, dtype)
    )


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What is multiplied with others of its kind, in `dtype` where it has to be copied."""
    return tensor if multiplies_uncopied(tensor, tensor, dtype) else tensor.to(dtype)


def _slices(length: int, size: int, start: int = 0) -> Iterator[slice]:
    for first in range(start, length, size):
        yield slice(first, min(first + size, length))


def embedding_squared_norms(
    ids: Tensor, g: Tensor, padding_idx: int | None = None, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
) -> Tensor:
    """`‖G_t‖²_F` where row i of `G_t` is the sum of `g` over the positions of example t that hold id i.

    Args:
        ids: Ids, of any integer type (B × T).
        g: Gradient of the output (B × T × d).
        padding_idx: Id whose row has no gradient.
        max_temporary_bytes: Bound of the temporary memory, in bytes: sums over positions for some of the features.

    Returns:
        Squared norms (B), float32 or float64.
    """
    dtype = _compute_dtype(g, g)
    examples, positions, features = g.shape
    if positions == 0:
        return g.new_zeros(examples, dtype=dtype)
    span = ids.max() + 1
    owner = torch.arange(examples, device=ids.device).unsqueeze(1)
    pairs, place = torch.unique((owner * span + ids).flatten(), return_inverse=True)
    size = max(max_temporary_bytes // (2 * examples * positions * dtype.itemsize), 1)
    by_pair = g.new_zeros(len(pairs), dtype=dtype)
    for columns in _slices(features, size):
        some = g[:, :, columns].flatten(0, 1).to(dtype)
        sums = some.new_zeros(len(pairs), some.shape[1]).index_add_(0, place, some)
        by_pair += sums.square_().sum(1)
    if padding_idx is not None:
        by_pair[pairs % span == padding_idx] = 0
    return by_pair.new_zeros(examples).index_add_(0, pairs // span, by_pair)


def convolution_squared_norms(layer: Convolution, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`‖G_t‖²_F` of the weight of a convolution, by PyTorch's gradient of the weight, one example at a time.

    Neither unfolded inputs nor more than one gradient of the weight exist at a time.

    Args:
        layer: The layer, of which only the geometry is used.
        pairs: Of every call the input (B × n × C_in × …) and the gradient of the output (B × n × C_out × …).

    Returns:
        Squared norms (B), float32 or float64.
    """
    weight_gradient = _WEIGHT_GRADIENTS[layer.weight.ndim - 2]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    dtype = _compute_dtype(*pairs[0])
    norms = []
    with torch.no_grad(), _without_autocast(pairs[0][0].device.type):
        for example in range(len(pairs[0][0])):
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

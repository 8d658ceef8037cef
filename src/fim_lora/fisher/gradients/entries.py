"""Squared per-example gradients of a frozen matrix, entry by entry and summed over examples: functions of tensors.

With `x` the input of a layer and `g` the gradient of the loss with respect to its output, the gradient of example t's
share of the loss is `g_tᵀ x_t`, summed over positions, and the eFIM diagonal is the mean over examples of
`(g_tᵀ x_t) ∘ (g_tᵀ x_t)`. Norms can do without these matrices (`norms.py`), single entries cannot. All functions add
to a running sum, which may be on another device, so that it is the only tensor of the size of the weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .products import (
    MAX_TEMPORARY_BYTES,
    add_product,
    compute_dtype,
    copied_features,
    slices,
    without_autocast,
)


def add_squared_entries(
    total: Tensor, x: Tensor, g: Tensor, factor: float = 1.0, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
) -> None:
    """`total += factor · Σ_t (g_tᵀ x_t) ∘ (g_tᵀ x_t)`, with `2 T d_in d_out` operations per example.

    Products and squares are in float32, or in float64 if a tensor is float64, regardless of autocast. The bounded
    temporary memory consists of rows of the per-example gradients and of their squares, and of copies in the computing
    precision of positions of `x` and `g`.

    Args:
        total: The running sum (d_out × d_in), in float32 or float64, on any device.
        x: Inputs (B × T × d_in).
        g: Gradients of the outputs (B × T × d_out).
        factor: Factor of the squares.
        max_temporary_bytes: Bound of the temporary memory, in bytes.
    """
    positions, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
    if positions == 0:  # an expert that no token was routed to
        return
    dtype = compute_dtype(x, g)
    add_rows = _add_squares_of_products if positions > 1 else _add_products_of_squares
    numbers = max_temporary_bytes // dtype.itemsize
    # A third of the memory for rows of the sum, a third for rows of gradients, a third for copies.
    rows = min(max(numbers // 3 // d_in, 1), d_out)
    with torch.no_grad(), without_autocast(x.device.type):
        for outputs in slices(d_out, rows):
            with accumulator(total[outputs], x.device, dtype) as block:
                add_rows(block, x, g[..., outputs], factor, numbers // 3)


@contextmanager
def accumulator(total: Tensor, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a tensor to add to, on `device` and in `dtype`: `total` itself, or a temporary one that is added to it."""
    if total.device == device and total.dtype == dtype:
        yield total
        return
    block = torch.zeros(total.shape, device=device, dtype=dtype)
    yield block
    total.add_(block.to(total.device))


def _add_squares_of_products(block: Tensor, x: Tensor, g: Tensor, factor: float, numbers: int) -> None:
    """`block += factor · Σ_t (g_tᵀ x_t) ∘ (g_tᵀ x_t)`, with `numbers` each for gradients and for copies."""
    (examples, positions), (d_out, d_in) = x.shape[:2], block.shape
    copied = max(copied_features((x, g), (g, x), dtype=block.dtype), 1)
    length = min(max(numbers // copied, 1), positions)
    group_size = max(min(numbers // (d_out * d_in), numbers // (length * copied)), 1)
    for group in slices(examples, group_size):
        _add_squares_of_group(block, x[group], g[group], factor, length)


def _add_squares_of_group(block: Tensor, x: Tensor, g: Tensor, factor: float, length: int) -> None:
    """As `_add_squares_of_products`, for some examples at once, and for `length` positions in a product."""
    gradients = block.new_zeros(len(x), *block.shape)
    for span in slices(x.shape[1], length):
        add_product(gradients, g[:, span].mT, x[:, span])
    for gradient in gradients:
        block.addcmul_(gradient, gradient, value=factor)


def _add_products_of_squares(block: Tensor, x: Tensor, g: Tensor, factor: float, numbers: int) -> None:
    """`block += factor · (g ∘ g)ᵀ (x ∘ x)` over examples of one position each: one product for all of them."""
    # A copy in the computing precision and its square exist at the same time.
    for group in slices(len(x), max(numbers // (2 * sum(block.shape)), 1)):
        x_squares, g_squares = (tensor[group, 0].to(block.dtype).square() for tensor in (x, g))
        block.addmm_(g_squares.mT, x_squares, alpha=factor)


def add_squared_embedding_entries(
    total: Tensor,
    ids: Tensor,
    g: Tensor,
    factor: float = 1.0,
    padding_idx: int | None = None,
    max_temporary_bytes: int = MAX_TEMPORARY_BYTES,
) -> None:
    """`total += factor · Σ_t G_t ∘ G_t`, where row i of `G_t` is the sum of `g` over the positions that hold id i.

    Only rows of ids that occur are read and written.

    Args:
        total: The running sum (number of ids × d), in float32 or float64, on any device.
        ids: Ids of any integer type (B × T).
        g: Gradients of the outputs (B × T × d).
        factor: Factor of the squares.
        padding_idx: The id whose row has no gradient; `None` for none.
        max_temporary_bytes: Bound of the temporary memory, in bytes: sums over positions for some of the features.
    """
    examples, positions, features = g.shape
    if examples * positions == 0:
        return
    dtype = compute_dtype(g, g)
    example_index = torch.arange(examples, device=ids.device).unsqueeze(1)
    # In the order of the ids, so that the pairs of an id are neighbors.
    pairs, pair_of_position = torch.unique((ids.long() * examples + example_index).flatten(), return_inverse=True)
    rows, row_of_pair = torch.unique_consecutive(pairs // examples, return_inverse=True)
    size = max(max_temporary_bytes // (3 * examples * positions * dtype.itemsize), 1)
    with torch.no_grad():
        for columns in slices(features, size):
            block = g[:, :, columns].flatten(0, 1).to(dtype)
            sums = block.new_zeros(len(pairs), block.shape[1]).index_add_(0, pair_of_position, block)
            squares = block.new_zeros(len(rows), block.shape[1]).index_add_(0, row_of_pair, sums.square_())
            if padding_idx is not None:
                squares[rows == padding_idx] = 0
            target = total[:, columns]
            target.index_add_(0, rows.to(total.device), squares.to(total.device, total.dtype), alpha=factor)

"""Matrix products of half-precision factors in float32, without a copy of the factors where a GPU allows it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MAX_TEMPORARY_BYTES = 64 * 2**20
"""Bound of the temporary memory of the norms of matrices, in bytes, for any batch size and length."""

_HALF_PRECISION = (torch.float16, torch.bfloat16)

# In PyTorch 2.8 and newer, with NVIDIA's library.
_GPU_SUMS_IN_FLOAT32 = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` (B × m × k, B × k × n), computed in float32 or float64, at least as precise as the factors."""
    if left.dtype != dtype and multiplies_uncopied(left, right, dtype):
        return torch.bmm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`; a second matrix of the size of `total` exists only if the factors are not copied."""
    if left.dtype != total.dtype and multiplies_uncopied(left, right, total.dtype):
        total += product(left, right, total.dtype)
    else:
        total.baddbmm_(left.to(total.dtype), right.to(total.dtype))


def product_with_small_right(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` (B × m × k, B × k × n) in the precision of `right`, float32 or float64.

    `right` is much smaller than `left` and may be more precise. If that avoids a copy of `left`, `right` is multiplied
    as two matrices in bfloat16 beside each other. Their sum has 16 bits of every number of `right`, so its relative
    error is at most 4e-6.
    """
    if left.dtype == right.dtype or not multiplies_small_right_uncopied(left, right.dtype):
        return product(left, right, right.dtype)
    high = right.to(left.dtype)
    low = (right - high).to(left.dtype)
    return product(left, torch.cat([high, low], dim=-1), right.dtype).unflatten(-1, (2, -1)).sum(-2)


def multiplies_uncopied(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether `product` does not copy its factors.

    A product of two half-precision numbers is exact in float32, and a GPU sums such products in float32 at the rate of
    half precision, which is many times that of float32.
    """
    if left.dtype != right.dtype:
        return False
    if left.dtype == dtype:
        return True
    return _GPU_SUMS_IN_FLOAT32 and left.is_cuda and left.dtype in _HALF_PRECISION and dtype == torch.float32


def multiplies_small_right_uncopied(left: Tensor, dtype: torch.dtype) -> bool:
    """Whether `product_with_small_right` does not copy `left`, if the right factor has this dtype.

    It copies float16, whose range is too small for the two parts of a number.
    """
    return left.dtype in (dtype, torch.bfloat16) and multiplies_uncopied(left, left, dtype)


def copied_features(*factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> int:
    """How many numbers per position of the first factor of each pair are copied to compute in `dtype`."""
    return sum(
        tensor.shape[2]
        for tensor, other in factors
        if tensor.dtype != dtype and not multiplies_uncopied(tensor, other, dtype)
    )


def copied_if_needed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, as a copy in `dtype` if its product with a tensor of its own dtype needs one."""
    return tensor if multiplies_uncopied(tensor, tensor, dtype) else tensor.to(dtype)


def compute_dtype(x: Tensor, g: Tensor) -> torch.dtype:
    """float64 if a tensor is float64, otherwise float32."""
    return torch.float64 if torch.float64 in (x.dtype, g.dtype) else torch.float32


def slices(length: int, size: int, start: int = 0) -> list[slice]:
    """Consecutive slices from `start` to `length`, each of at most `size`."""
    return [slice(first, min(first + size, length)) for first in range(start, length, size)]


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switch autocast off. If it is off already, as in most backward passes, its state is not touched."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()

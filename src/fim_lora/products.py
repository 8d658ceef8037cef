"""Matrix products in float32 of factors in half precision, without copies of these where a GPU can do so."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_PRECISION = (torch.float16, torch.bfloat16)

# In PyTorch 2.8 and newer, and of NVIDIA's library.
_GPU_SUMS_IN_FLOAT32 = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None


def multiplies_uncopied(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether `product` makes no copies of its factors.

    A product of two numbers in half precision is exact in float32, and a GPU sums such products in float32 at the rate
    of half precision, which is many times that of float32.

    Args:
        left: Left factor.
        right: Right factor.
        dtype: Of the product.

    Returns:
        Whether it does.
    """
    if left.dtype != right.dtype:
        return False
    if left.dtype == dtype:
        return True
    return _GPU_SUMS_IN_FLOAT32 and left.is_cuda and left.dtype in HALF_PRECISION and dtype == torch.float32


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right`, in which every product and every sum is in `dtype`.

    Args:
        left: Matrices (B × m × k).
        right: Matrices (B × k × n).
        dtype: float32 or float64, no less precise than the factors.

    Returns:
        Matrices (B × m × n).
    """
    if left.dtype != dtype and multiplies_uncopied(left, right, dtype):
        return torch.bmm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def multiplies_narrow_uncopied(left: Tensor, dtype: torch.dtype) -> bool:
    """Whether `product_with_narrow` makes no copy of `left`.

    Args:
        left: Left factor.
        dtype: Of the right factor.

    Returns:
        Whether it does. The range of float16 is too small for the parts of a number.
    """
    return left.dtype in (dtype, torch.bfloat16) and multiplies_uncopied(left, left, dtype)


def product_with_narrow(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in the precision of `right`, which is much smaller than `left` and may be more precise.

    Where that saves a copy of `left`, `right` is multiplied as two matrices in bfloat16 beside each other, whose sum
    has 16 bits of every number of it: to 4e-6.

    Args:
        left: Matrices (B × m × k).
        right: Matrices (B × k × n) in float32 or float64.

    Returns:
        Matrices (B × m × n).
    """
    if left.dtype == right.dtype or not multiplies_narrow_uncopied(left, right.dtype):
        return product(left, right, right.dtype)
    high = right.to(left.dtype)
    low = (right - high).to(left.dtype)
    return product(left, torch.cat([high, low], dim=-1), right.dtype).unflatten(-1, (2, -1)).sum(-2)

"""`obd_saliency`: the predicted increase of the loss when a single weight is set to zero."""

import torch
from torch import Tensor


def obd_saliency(weight: Tensor, diagonal: Tensor) -> Tensor:
    """`½ w² F` of every element: the increase of the loss when this element alone is set to zero, to second order.

    This is the saliency of Optimal Brain Damage (LeCun, Denker and Solla 1989, step 4 of the procedure), with the
    diagonal of the empirical Fisher information in the place of the diagonal of the Hessian. Both agree in expectation
    for a model that fits its data, trained by a log-likelihood; the first-order term is left out.

    Args:
        weight: A weight of any shape, in a floating-point dtype. A quantized weight has to be dequantized before.
        diagonal: Its eFIM diagonal from `get_fim_diagonals`, of the same shape, in float32 or float64, on any device.

    Returns:
        The saliencies, of the same shape, on the device of the weight, in units of the loss: in float64 if one of the
        two tensors is float64, otherwise in float32.

    Raises:
        TypeError: If `weight` is not a tensor of a floating-point dtype, or `diagonal` not one in float32 or float64.
        ValueError: If the shapes differ.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(
            f"weight must be a tensor of a floating-point dtype of at least 16 bits, got {_described(weight)}. "
            "Dequantize a quantized weight before."
        )
    if not isinstance(diagonal, Tensor) or diagonal.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"diagonal must be a tensor in float32 or float64, got {_described(diagonal)}.")
    if weight.shape != diagonal.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but diagonal has shape {tuple(diagonal.shape)}: pass the "
            "diagonal of the same layer."
        )
    dtype = torch.promote_types(weight.dtype, diagonal.dtype)
    squares = weight.detach().to(dtype).square()
    return squares.mul_(diagonal.to(weight.device, dtype)).div_(2)


def _described(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__

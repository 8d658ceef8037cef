"""A and B of a LoRA layer as plain matrices, and linear maps of their ranks, in the shapes of PEFT's weights.

PEFT stores A and B in five forms. Each form says how to read the matrices of an adapter's parts, A_p (r × d_in) and
B_p (d_out × r), from a tensor of the shape of A or B, and how to write them. The same functions apply to gradients and
to the state of an optimizer, which have the shapes of the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper, _ConvNd
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..fisher.gradients.products import without_autocast
from .lora_layers import layers_rebuilt_together


@dataclass(frozen=True)
class Form:
    """How PEFT stores the adapter of one layer that holds P parts.

    Attributes:
        num_parts: P: experts of a parameter, groups of a convolution, otherwise 1.
        read_a: From a tensor of the shape of A to P matrices (P × r × d_in).
        read_b: From a tensor of the shape of B to P matrices (P × d_out × r).
        write_a: The inverse of `read_a`, also for another rank.
        write_b: The inverse of `read_b`, also for another rank.
    """

    num_parts: int
    read_a: Callable[[Tensor], Tensor]
    read_b: Callable[[Tensor], Tensor]
    write_a: Callable[[Tensor], Tensor]
    write_b: Callable[[Tensor], Tensor]


def form_of(layer: Any, adapter_name: str) -> Form:
    """The form of the adapter of a LoRA layer that PEFT rebuilds by itself; see `layers_rebuilt_together`."""
    if isinstance(layer, ParamWrapper):
        return _stacked(layer.num_experts)
    if isinstance(layer, _ConvNd):
        return _convolution(layer.get_base_layer().groups, tuple(layer.lora_A[adapter_name].weight.shape[1:]))
    return Form(1, lambda a: a[None], lambda b: b[None], lambda a: a[0], lambda b: b[0])


def _stacked(experts: int) -> Form:
    """A is (E·r × d_in) with the experts outermost, B is (d_out × r·E) with the experts innermost."""
    return Form(
        experts,
        lambda a: a.reshape(experts, -1, a.shape[-1]),
        lambda b: b.reshape(b.shape[0], -1, experts).permute(2, 0, 1),
        lambda a: a.flatten(0, 1),
        lambda b: b.permute(1, 2, 0).flatten(1),
    )


def _convolution(groups: int, kernel: tuple[int, ...]) -> Form:
    """A is (r × C_in × …) without groups, B is (C_out × r / groups × 1 …) with them."""
    ones = (1,) * (len(kernel) - 1)
    return Form(
        groups,
        lambda a: a.reshape(groups, a.shape[0] // groups, -1),
        lambda b: b.reshape(groups, b.shape[0] // groups, -1),
        lambda a: a.reshape(-1, *kernel),
        lambda b: b.reshape(-1, b.shape[-1], *ones),
    )


@dataclass(frozen=True)
class Weights:
    """The weights A and B of an adapter in one LoRA layer, and their form.

    Attributes:
        a: PEFT's weight A.
        b: PEFT's weight B.
        form: How they are stored.
    """

    a: nn.Parameter
    b: nn.Parameter
    form: Form

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (P × r × d_in) and B (P × d_out × r), in float32 or float64, not sharded."""
        a, b = (_whole(weight.detach()) for weight in (self.a, self.b))
        dtype = torch.promote_types(a.dtype, torch.float32)
        return self.form.read_a(a.to(dtype)), self.form.read_b(b.to(dtype))

    def grams(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """`A Aᵀ` and `BᵀB` (P × r × r), in float64, which not every device has, and therefore on the host."""
        a, b = (matrices.cpu().double() for matrices in self.matrices())
        return (a @ a.mT).numpy(), (b.mT @ b).numpy()

    def triangles(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The triangles R of `Aᵀ = Q R` and of `B = Q R` (P × r × r), in float64 on the host, as `grams`."""
        a, b = (matrices.cpu().double() for matrices in self.matrices())
        triangles = (torch.linalg.qr(tall, mode="r").R for tall in (a.mT, b))
        in_a, in_b = (_square(triangle).numpy() for triangle in triangles)
        return in_a, in_b

    def is_zero(self) -> bool:
        """Whether A or B is zero, so that the adapter adds nothing, or has no values on the meta device."""
        return any(weight.is_meta or not bool(weight.detach().any()) for weight in (self.a, self.b))

    def with_rows(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """A tensor in the shape of A after `rows · A_p` (P × k × r), computed in float32 at least."""
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        with without_autocast(wide.device.type):
            return self.form.write_a(rows.to(wide) @ self.form.read_a(wide)).to(tensor.dtype)

    def with_columns(self, tensor: Tensor, columns: Tensor) -> Tensor:
        """A tensor in the shape of B after `B_p · columns` (P × r × k), computed in float32 at least."""
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        with without_autocast(wide.device.type):
            return self.form.write_b(self.form.read_b(wide) @ columns.to(wide)).to(tensor.dtype)


def weights_of(layer: LoraLayer, adapter_name: str) -> list[Weights]:
    """The weights of an adapter in a LoRA layer and in the one that PEFT rebuilds with it."""
    return [_weights_of_one(one, adapter_name) for one in layers_rebuilt_together(layer)]


def _weights_of_one(layer: Any, adapter_name: str) -> Weights:
    form = form_of(layer, adapter_name)
    if isinstance(layer, Embedding):
        return Weights(layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name], form)
    return Weights(layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight, form)


def outermost_wrappers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Wrapper of a parameter that another wrapper contains, to the outermost wrapper, whose call runs all of them."""
    outer = {module.base_layer: module for module in model.modules() if isinstance(module, ParamWrapper)}
    return {module: _end_of(module, outer) for module in outer.values()}


def _end_of(module: nn.Module, outer: dict[Any, Any]) -> nn.Module:
    while module in outer:
        module = outer[module]
    return module


@contextmanager
def gathered(layers: Sequence[LoraLayer], adapter_name: str) -> Iterator[None]:
    """Gather the adapter's weights that DeepSpeed's ZeRO-3 has sharded, until the block ends."""
    parameters = [weight for layer in layers for one in weights_of(layer, adapter_name) for weight in (one.a, one.b)]
    # DeepSpeed keeps some of the weights gathered after a pass, and must not gather these again.
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id") and parameter.numel() == 0]
    if not sharded:
        yield
        return
    # Not PEFT's function, which does nothing unless transformers has configured DeepSpeed.
    import deepspeed  # optional, and slow to import

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def _square(triangle: Tensor) -> Tensor:
    """Add rows of zeros to the triangle of a matrix with fewer rows than columns."""
    return nn.functional.pad(triangle, (0, 0, 0, triangle.shape[-1] - triangle.shape[-2]))


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight

"""`PlainAdapter`: what the weights of a trained adapter say without data."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.lora import LoraLayer

from ..fisher.basis import Basis, basis_of, root_of_triangle
from .factors import Weights, gathered, weights_of

# Half of a SHA-256 is enough, and short enough to read in a file.
_FINGERPRINT_LENGTH = 32


@dataclass(frozen=True)
class PlainAdapter:
    """What the weights of one layer's adapter say without data.

    Attributes:
        triangles_a: R of `Aᵀ = Q R` for every part (P × k × k).
        triangles_b: R of `s · B = Q R` for every part (P × k × k).
        scaling: The layer's scaling s.
        fingerprint: Of A, B and s.
    """

    triangles_a: npt.NDArray[np.float64]
    triangles_b: npt.NDArray[np.float64]
    scaling: float
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int]:
        """Number of parts and their rank."""
        return self.triangles_a.shape[0], self.triangles_a.shape[1]

    @property
    def basis(self) -> Basis:
        """The components of the singular value decomposition of `ΔW`."""
        return basis_of(root_of_triangle(self.triangles_b), root_of_triangle(self.triangles_a))

    @property
    def metrics(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The plain metrics `s² BᵀB` and `A Aᵀ` for every part (P × k × k)."""
        b, a = (np.swapaxes(triangles, -1, -2) @ triangles for triangles in (self.triangles_b, self.triangles_a))
        return b, a


def plain_adapters(layers: Mapping[str, LoraLayer], adapter_name: str) -> dict[str, PlainAdapter]:
    """Layer name to its adapter. Every process has to call this, because weights may be sharded."""
    return {name: _plain_adapter(layer, adapter_name) for name, layer in layers.items()}


def _plain_adapter(layer: LoraLayer, adapter_name: str) -> PlainAdapter:
    with gathered([layer], adapter_name):
        weights, scaling = weights_of(layer, adapter_name), float(layer.scaling[adapter_name])
        triangles = [one.triangles() for one in weights]
        return PlainAdapter(
            np.concatenate([a for a, _ in triangles]),
            scaling * np.concatenate([b for _, b in triangles]),
            scaling,
            _fingerprint(weights, scaling),
        )


def _fingerprint(weights: list[Weights], scaling: float) -> str:
    """Of the values, not of their dtype: an adapter in half precision is loaded in float32."""
    digest = hashlib.sha256(f"{scaling:.9g}".encode())
    for one in weights:
        for matrices in one.matrices():
            digest.update(matrices.to(torch.float32).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:_FINGERPRINT_LENGTH]

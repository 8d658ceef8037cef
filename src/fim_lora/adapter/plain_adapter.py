"""`PlainAdapter`: what the weights of a trained adapter say without data."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from peft.tuners.lora import LoraLayer

from ..config import FINGERPRINT_LENGTH
from ..fisher.basis import Basis, Root, basis_of, root_of_metric, root_of_triangle
from .factors import Weights, gathered, weights_of


@dataclass(frozen=True)
class PlainAdapter:
    """What the weights of one layer's adapter say without data. P is the number of its parts, k their rank.

    Attributes:
        metrics: The plain metrics `s² BᵀB` and `A Aᵀ` (P × k × k each).
        scaling: The layer's scaling s.
        fingerprint: Of A, B and s.
        roots: Roots of the two metrics by QR of the factors, which keep the small singular values; `None` if they
            were not asked for.
    """

    metrics: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
    scaling: float
    fingerprint: str
    roots: tuple[Root, Root] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of parts and their rank."""
        parts, rank, _ = self.metrics[0].shape
        return parts, rank

    @cached_property
    def basis(self) -> Basis:
        """The components of the singular value decomposition of `ΔW`."""
        root_u, root_h = self.roots or map(root_of_metric, self.metrics)
        return basis_of(root_u, root_h)


def plain_adapters(
    layers: Mapping[str, LoraLayer], adapter_name: str, *, with_roots: bool = False
) -> dict[str, PlainAdapter]:
    """Layer name to its adapter. Every process has to call this, because weights may be sharded.

    Raises `ValueError` if a weight is not finite.
    """
    return {name: _plain_adapter(name, layer, adapter_name, with_roots) for name, layer in layers.items()}


def fingerprints(layers: Mapping[str, LoraLayer], adapter_name: str) -> dict[str, str]:
    """Layer name to the fingerprint of its adapter; see `PlainAdapter`."""
    return {
        name: _fingerprint(weights_of(layer, adapter_name), float(layer.scaling[adapter_name]))
        for name, layer in layers.items()
    }


def _plain_adapter(name: str, layer: LoraLayer, adapter_name: str, with_roots: bool) -> PlainAdapter:
    with gathered([layer], adapter_name):
        weights, scaling = weights_of(layer, adapter_name), float(layer.scaling[adapter_name])
        grams = [one.grams() for one in weights]
        metrics = (scaling**2 * np.concatenate([b for _, b in grams]), np.concatenate([a for a, _ in grams]))
        if not all(np.isfinite(metric).all() for metric in metrics):
            raise ValueError(f"The adapter of layer {name!r} has weights that are not finite: its training diverged.")
        roots = _roots(weights, scaling) if with_roots else None
        return PlainAdapter(metrics, scaling, _fingerprint(weights, scaling), roots)


def _roots(weights: Sequence[Weights], scaling: float) -> tuple[Root, Root]:
    triangles = [one.triangles() for one in weights]
    root_u = root_of_triangle(scaling * np.concatenate([b for _, b in triangles]))
    return root_u, root_of_triangle(np.concatenate([a for a, _ in triangles]))


def _fingerprint(weights: Sequence[Weights], scaling: float) -> str:
    """Of the values, not of their dtype: an adapter in half precision is loaded in float32."""
    digest = hashlib.sha256(f"{scaling:.9g}".encode())
    for one in weights:
        for matrices in one.matrices():
            digest.update(matrices.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:FINGERPRINT_LENGTH]

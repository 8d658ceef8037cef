"""Gates on the components of a layer: their basis from the moments of a calibration, their gradients and gains."""

from typing import Any

import numpy as np

from .basis import Basis, basis_of, damped, gate_gradients, root_of_metric
from .factors import PATH_SCALE, PathMoments

Array = np.ndarray[Any, Any]


def measured_basis(plain_metrics: tuple[Array, Array], moments: PathMoments, name: str, damping: float) -> Basis:
    """The basis of a layer in the metric of the Fisher information.

    It is damped towards `plain_metrics`, which are `BᵀB` and `A Aᵀ` (P × r × r); see `damped`.
    """
    measured, (plain_u, plain_h) = moments.whole.of(name), plain_metrics
    return basis_of(
        root_of_metric(damped(measured.gradients, plain_u, damping)),
        root_of_metric(damped(measured.inputs, plain_h, damping)),
    )


def gates_of(basis: Basis, moments: PathMoments, name: str, half: int | None = None) -> Array:
    """Gradients of the gates (N × P × k) for the examples' summed losses, divided by the root of their mean length."""
    core_gradients = np.concatenate(moments.whole.of(name, half).core_gradients)
    return gate_gradients(basis, core_gradients) / np.sqrt(moments.terms_per_example)


def gains_of(basis: Basis, moments: PathMoments, name: str, half: int | None = None) -> Array | None:
    """How much the loss falls per gate where the adapter has a part of its scaling (P × k), if that was measured."""
    core_gradients = moments.scaled.of(name, half).core_gradients
    if not core_gradients:
        return None
    # The measured gradients are those of gates on the scaled components.
    gradients = gate_gradients(basis, np.concatenate(core_gradients).mean(0, keepdims=True, dtype=np.float64))[0]
    return -gradients / PATH_SCALE / moments.terms_per_example

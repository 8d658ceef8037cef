"""The best components of a trained adapter in a metric: pure functions of r × r matrices, in float64.

An adapter adds `ΔW = s · B M A` with the core `M = I`. With Kronecker factors `C_u` and `C_h` of the Fisher
information of the core (K-FAC, Martens and Grosse 2015, arXiv:1503.05671, equation 1) and their roots
`C = L Lᵀ`, the singular value decomposition `L_uᵀ L_h = U S Vᵀ` gives components `M_j = (L_u⁻ᵀ U_j S_j) (V_jᵀ L_h⁻¹)`
of the core whose sum is `I`. Their first k are the best approximation of rank k in that metric.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Eigenvalues below this part of the largest one are rounding errors of moments in float32.
_RELATIVE_CUT = 1e-9


class Basis(NamedTuple):
    """Components of the core of each of P parts, in the order of their singular values.

    Attributes:
        left: Columns `L_u⁻ᵀ U_j √S_j` (P × r × r): the new B is `B · left`.
        right: Rows `√S_j V_jᵀ L_h⁻¹` (P × r × r): the new A is `right · A`.
        singular_values: `S_j` (P × r).
    """

    left: Array
    right: Array
    singular_values: Array


class Root(NamedTuple):
    """A root `L` of a metric `C = L Lᵀ`, and its pseudo-inverse (P × r × r each)."""

    matrix: Array
    inverse: Array


def root_of_metric(metric: Array) -> Root:
    """A root of a symmetric positive semidefinite metric (P × r × r), by its eigenvalues.

    A metric of zero has the root of the identity; see `_or_identity`.
    """
    values, vectors = np.linalg.eigh(_or_identity((metric + np.swapaxes(metric, -1, -2)) / 2))
    is_kept = values > _RELATIVE_CUT * np.maximum(values[..., -1:], 0)
    roots = np.sqrt(np.where(is_kept, values, 0))
    inverses = np.divide(1.0, roots, out=np.zeros_like(roots), where=is_kept)
    return Root(vectors * roots[..., None, :], np.swapaxes(vectors * inverses[..., None, :], -1, -2))


def root_of_triangle(triangle: Array) -> Root:
    """The root `Rᵀ` of the plain metric `A Aᵀ`, from the triangle of `Aᵀ = Q R` (P × r × r).

    The metric itself is not formed, which would lose the small singular values. As in `root_of_metric`, the root of
    zero is the identity.
    """
    root = _or_identity(np.swapaxes(triangle, -1, -2))
    return Root(root, np.linalg.pinv(root))


def _or_identity(matrices: Array) -> Array:
    """The identity in the place of zero (P × r × r).

    The B of a layer or of an expert that was never trained is zero. With it, all components would get an A of zero,
    too, and could never be trained again.
    """
    is_zero = ~matrices.any(axis=(-2, -1), keepdims=True)
    return np.where(is_zero, np.eye(matrices.shape[-1]), matrices)


def basis_of(root_u: Root, root_h: Root) -> Basis:
    """The basis for the metrics of `u` and `h`.

    Where a metric is singular, the components sum to the identity on its range only.
    """
    u, singular_values, vt = np.linalg.svd(np.swapaxes(root_u.matrix, -1, -2) @ root_h.matrix)
    size = np.sqrt(singular_values)
    left = np.swapaxes(root_u.inverse, -1, -2) @ (u * size[..., None, :])
    right = (size[..., :, None] * vt) @ root_h.inverse
    return Basis(left, right, singular_values)


def damped(metric: Array, plain: Array, damping: float) -> Array:
    """`C + λ · tr(C) / tr(P) · P`: the metric, damped towards the plain one of the same size (P × r × r).

    With the plain metrics `BᵀB` and `A Aᵀ` alone the components are those of the singular value decomposition of
    `ΔW`. A metric of zero, of a layer that no loss depends on, is replaced by the plain one.
    """
    trace, plain_trace = (np.trace(one, axis1=-2, axis2=-1)[..., None, None] for one in (metric, plain))
    ratio = np.divide(trace, plain_trace, out=np.zeros_like(trace), where=plain_trace > 0)
    return np.where(trace > 0, metric + damping * ratio * plain, plain)


def gate_gradients(basis: Basis, core_gradients: Array) -> Array:
    """`q_tj = ⟨Γ_t, M_j⟩` (B × P × r): the gradients of gates of value 1 on the components (Optimal Brain Damage).

    `core_gradients` is `Γ_t` (B × P × r × r).
    """
    return np.einsum("pij,bpik,pjk->bpj", basis.left, core_gradients, basis.right, optimize=True)


def squared_norms(basis: Basis, plain_u: Array, plain_h: Array) -> Array:
    """`‖ΔW_j‖²_F` of every component (P × r), from the plain metrics `s² BᵀB` and `A Aᵀ`."""
    of_left = np.einsum("pij,pik,pkj->pj", basis.left, plain_u, basis.left, optimize=True)
    of_right = np.einsum("pji,pik,pjk->pj", basis.right, plain_h, basis.right, optimize=True)
    return np.maximum(of_left, 0) * np.maximum(of_right, 0)


def reordered(basis: Basis, order: Array) -> Basis:
    """The basis with the components of each part in another order, given by indices (P × r)."""
    return Basis(
        np.take_along_axis(basis.left, order[:, None, :], axis=2),
        np.take_along_axis(basis.right, order[:, :, None], axis=1),
        np.take_along_axis(basis.singular_values, order, axis=1),
    )

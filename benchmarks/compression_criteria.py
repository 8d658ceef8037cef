"""The criteria that `compression.py` compares: which components of which basis each one keeps at a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fim_lora.adapter.plain_adapter import PlainAdapter
from fim_lora.fisher.basis import Basis, squared_norms
from fim_lora.fisher.factors import PathMoments
from fim_lora.fisher.gates import gains_of, gates_of, measured_basis
from fim_lora.ranks.truncation import by_layer, keep_within, order_of_components, priorities
from fim_lora.spectrum import DAMPING

Kept = dict[str, list[int]]


@dataclass(frozen=True)
class Adapter:
    """What the criteria know of a trained adapter. All its layers are linear, so each has one part.

    Attributes:
        plain: Layer name to what its weights say.
        moments: What the calibration data say.
        costs: Layer name to the parameters of one component.
    """

    plain: Mapping[str, PlainAdapter]
    moments: PathMoments
    costs: Mapping[str, int]

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole adapter."""
        return sum(self.costs[name] * one.shape[1] for name, one in self.plain.items())

    def plain_bases(self) -> dict[str, Basis]:
        """Components of the singular value decomposition of `ΔW`."""
        return {name: one.basis for name, one in self.plain.items()}

    def measured_bases(self, damping: float) -> dict[str, Basis]:
        """Components in the metric of the Fisher information, damped towards the plain one."""
        return {name: measured_basis(one.metrics, self.moments, name, damping) for name, one in self.plain.items()}

    def gate_saliencies(self, bases: Mapping[str, Basis]) -> dict[str, list[float]]:
        """`½ E_t[q_tj²]` of every component."""
        return {
            name: (np.square(gates_of(basis, self.moments, name)[:, 0]).mean(0) / 2).tolist()
            for name, basis in bases.items()
        }

    def gains(self, bases: Mapping[str, Basis]) -> dict[str, list[float]]:
        """The gain of every component where the adapter has a part of its scaling."""
        gains = {}
        for name, basis in bases.items():
            of_layer = gains_of(basis, self.moments, name)
            assert of_layer is not None
            gains[name] = of_layer[0].tolist()
        return gains

    def squared_norms(self, bases: Mapping[str, Basis]) -> dict[str, list[float]]:
        """`‖ΔW_j‖²_F` of every component."""
        return {name: squared_norms(basis, *self.plain[name].metrics)[0].tolist() for name, basis in bases.items()}


@dataclass(frozen=True)
class Selection:
    """The components that a criterion works with, and a function from a number of parameters to those it keeps."""

    bases: Mapping[str, Basis]
    keep: Callable[[int], Kept]


def _by_saliency(
    adapter: Adapter,
    bases: Mapping[str, Basis],
    saliencies: Mapping[str, Sequence[float]],
    per_parameter: bool = True,
    cap: int = 1,
) -> Selection:
    """Components by falling saliency, at most one part in `cap` of those of each layer."""
    costs = adapter.costs if per_parameter else dict.fromkeys(adapter.costs, 1)
    order = order_of_components(saliencies, costs)
    largest = {name: len(of_layer) // cap for name, of_layer in saliencies.items()}
    return Selection(bases, lambda budget: by_layer(keep_within(order, adapter.costs, budget, largest), list(bases)))


def fim_lora(adapter: Adapter, bases: Mapping[str, Basis] | None = None, cap: int = 1) -> Selection:
    """Gains and gate saliencies, by default in the damped K-FAC basis; `cap` is `r / r_max` of `compress_lora`."""
    bases = bases or adapter.measured_bases(DAMPING)
    saliencies, gains = adapter.gate_saliencies(bases), adapter.gains(bases)
    values = {name: priorities(saliencies[name], 0.0, gains[name]).tolist() for name in bases}
    return _by_saliency(adapter, bases, values, cap=cap)


def gates_and_norms(adapter: Adapter) -> Selection:
    """Gate saliencies and norms in the K-FAC basis: the order without batches at a part of the scaling."""
    bases = adapter.measured_bases(DAMPING)
    saliencies, norms = adapter.gate_saliencies(bases), adapter.squared_norms(bases)
    return _by_saliency(adapter, bases, {name: priorities(saliencies[name], norms[name]).tolist() for name in bases})


def gates_alone(adapter: Adapter) -> Selection:
    """Gate saliencies in the K-FAC basis."""
    bases = adapter.measured_bases(DAMPING)
    return _by_saliency(adapter, bases, adapter.gate_saliencies(bases))


def gains_alone(adapter: Adapter) -> Selection:
    """Gains in the K-FAC basis."""
    bases = adapter.measured_bases(DAMPING)
    return _by_saliency(adapter, bases, adapter.gains(bases))


def kfac_alone(adapter: Adapter) -> Selection:
    """K-FAC's own singular values, squared, without gates."""
    bases = adapter.measured_bases(0.0)
    return _by_saliency(adapter, bases, _squared(bases))


def para(adapter: Adapter) -> Selection:
    """One threshold on the singular values of `ΔW` over all layers (PARA, arXiv:2604.27796)."""
    bases = adapter.plain_bases()
    return _by_saliency(adapter, bases, _squared(bases), per_parameter=False)


def weights_per_parameter(adapter: Adapter) -> Selection:
    """fim-lora without data: squared singular values of `ΔW` per parameter."""
    bases = adapter.plain_bases()
    return _by_saliency(adapter, bases, _squared(bases))


def energy_per_layer(adapter: Adapter) -> Selection:
    """A share of the squared singular values for every layer, as PEFT's `convert_to_lora(rank=share)`.

    The share is the largest one with which the adapter has at most the parameters.
    """
    bases = adapter.plain_bases()
    values = _squared(bases)

    def keep(budget: int) -> Kept:
        shares = sorted({share for of_layer in values.values() for share in np.cumsum(of_layer) / sum(of_layer)})
        low, high = 0, len(shares)
        while high - low > 1:
            middle = (low + high) // 2
            kept = _kept_by_energy(values, shares[middle])
            fits = sum(len(kept[name]) * cost for name, cost in adapter.costs.items()) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return _kept_by_energy(values, shares[low])

    return Selection(bases, keep)


def uniform(adapter: Adapter) -> Selection:
    """The same rank for every layer, by the singular value decomposition, as PEFT's `convert_to_lora(rank=number)`."""
    bases = adapter.plain_bases()
    cost = sum(adapter.costs.values())
    return Selection(bases, lambda budget: {name: list(range(budget // cost)) for name in bases})


def _squared(bases: Mapping[str, Basis]) -> dict[str, list[float]]:
    return {name: np.square(basis.singular_values[0]).tolist() for name, basis in bases.items()}


def _kept_by_energy(values: Mapping[str, Sequence[float]], share: float) -> Kept:
    kept = {}
    for name, of_layer in values.items():
        cumulated = np.cumsum(of_layer)
        # The first component with which the share is reached is kept, and at least one.
        number = int(np.searchsorted(cumulated, share * cumulated[-1] * (1 - 1e-12))) + 1
        kept[name] = list(range(min(number, len(of_layer))))
    return kept


OURS = "fim-lora"
PARA = "PARA"

CRITERIA: dict[str, Callable[[Adapter], Any]] = {
    OURS: fim_lora,
    "r_max = r / 2": lambda adapter: fim_lora(adapter, cap=2),
    "r_max = r / 4": lambda adapter: fim_lora(adapter, cap=4),
    "gains alone": gains_alone,
    "gates alone": gates_alone,
    "gates and norms": gates_and_norms,
    "without damping": lambda adapter: fim_lora(adapter, adapter.measured_bases(0.0)),
    "plain components": lambda adapter: fim_lora(adapter, adapter.plain_bases()),
    "K-FAC alone": kfac_alone,
    "fim-lora without data": weights_per_parameter,
    PARA: para,
    "energy per layer": energy_per_layer,
    "uniform SVD": uniform,
}
"""The criteria by name. `OURS` is what `compress_lora` keeps; a test compares them."""

"""The criteria that `compression.py` compares: which components of which basis each one keeps at a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fim_lora.adapter.plain_adapter import PlainAdapter
from fim_lora.fisher.basis import Basis, basis_of, damped, gate_gradients, root_of_metric, squared_norms
from fim_lora.fisher.factors import AdapterMoments
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
    moments: AdapterMoments
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
        bases = {}
        for name, one in self.plain.items():
            measured, (plain_u, plain_h) = self.moments.of(name), one.metrics
            root_u = root_of_metric(damped(measured.gradients, plain_u, damping))
            bases[name] = basis_of(root_u, root_of_metric(damped(measured.inputs, plain_h, damping)))
        return bases

    def gate_saliencies(self, bases: Mapping[str, Basis]) -> dict[str, list[float]]:
        """`½ E_t[q_tj²]` of every component, up to a common factor."""
        saliencies = {}
        for name, basis in bases.items():
            gates = gate_gradients(basis, np.concatenate(self.moments.of(name).core_gradients))
            saliencies[name] = np.square(gates[:, 0]).mean(0).tolist()
        return saliencies


@dataclass(frozen=True)
class Selection:
    """The components that a criterion works with, and a function from a number of parameters to those it keeps."""

    bases: Mapping[str, Basis]
    keep: Callable[[int], Kept]


def _by_saliency(
    adapter: Adapter, bases: Mapping[str, Basis], saliencies: Mapping[str, Sequence[float]], per_parameter: bool = True
) -> Selection:
    costs = adapter.costs if per_parameter else dict.fromkeys(adapter.costs, 1)
    order = order_of_components(saliencies, costs)
    return Selection(bases, lambda budget: by_layer(keep_within(order, adapter.costs, budget), list(bases)))


def fim_lora(adapter: Adapter, damping: float = DAMPING) -> Selection:
    """Gates and norms in the K-FAC basis of some damping."""
    bases = adapter.measured_bases(damping)
    gates = adapter.gate_saliencies(bases)
    norms = {name: squared_norms(basis, *adapter.plain[name].metrics).sum(0) for name, basis in bases.items()}
    return _by_saliency(adapter, bases, {name: priorities(gates[name], norms[name]).tolist() for name in bases})


def gates_in_measured_basis(adapter: Adapter) -> Selection:
    """Gates in the K-FAC basis, without the norms."""
    bases = adapter.measured_bases(DAMPING)
    return _by_saliency(adapter, bases, adapter.gate_saliencies(bases))


def gates_alone(adapter: Adapter) -> Selection:
    """Gates on the components of the plain singular value decomposition."""
    bases = adapter.plain_bases()
    return _by_saliency(adapter, bases, adapter.gate_saliencies(bases))


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
    "without norms": gates_in_measured_basis,
    "without damping": lambda adapter: fim_lora(adapter, 0.0),
    "gates alone": gates_alone,
    "K-FAC alone": kfac_alone,
    "fim-lora without data": weights_per_parameter,
    PARA: para,
    "energy per layer": energy_per_layer,
    "uniform SVD": uniform,
}
"""The criteria by name. `OURS` is what `compress_lora` keeps; a test compares them."""

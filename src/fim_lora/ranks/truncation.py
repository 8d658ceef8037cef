"""Which components of a trained adapter to keep: pure functions of saliencies, gains, norms and costs.

A component is one rank of one layer. Dropping it raises the loss by its saliency, as far as a second-order model
knows (LeCun, Denker and Solla 1989, Optimal Brain Damage, equation 5), and saves its parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike

Array = npt.NDArray[Any]


class Component(NamedTuple):
    """One component: the name of its layer, and its number there, from 0."""

    layer: str
    number: int


Kept = dict[str, list[int]]
"""Layer name to the numbers of its kept components, in rising order; an empty list for a layer without any."""


def priorities(saliencies: ArrayLike, squared_norms: ArrayLike, gains: ArrayLike | None = None) -> Array:
    """What components are ordered by: the sum of gain and saliency.

    Both estimate what a component is worth, in units of the loss. The saliency is that of Optimal Brain Damage, at the
    trained adapter. The gain is the gradient where the adapter has a part of its scaling, as in the integral of the
    gradient along the path from the base model to the trained one (Sundararajan et al. 2017, Integrated Gradients,
    equation 1). A deep cut leads towards that point. At the trained adapter the mean gradient is about zero, because
    training has minimized the loss. The sum is an order and not a prediction. A gain may be negative.

    Without gains, the geometric mean of the saliency and of the squared norm `‖ΔW_j‖²_F`. The norm, which PARA
    (arXiv:2604.27796) uses alone, measures how far a cut moves the weights. `benchmarks/compression.py` compares all
    of these. Without data the saliency is the squared norm.
    """
    saliencies = np.asarray(saliencies, np.float64)
    if gains is None:
        return np.sqrt(saliencies * np.asarray(squared_norms, np.float64))
    return saliencies + np.asarray(gains, np.float64)


def order_of_components(
    values: Mapping[str, Sequence[float]], costs: Mapping[str, int], at_least: Mapping[str, int] | None = None
) -> list[Component]:
    """All components in the order in which they should be kept: by falling value per parameter.

    Taking them in this order until a budget is used is optimal up to one component (Dantzig 1957, for the knapsack
    problem), if the loss rises by the sum of the values that are dropped and none of them is negative. Ties go to the
    layer that is named first.

    Args:
        values: Layer name to the value of each of its components, such as its priority.
        costs: Layer name to the parameters of one of its components.
        at_least: Layer name to the number of components that it has to keep, which come first. By default 0.

    Returns:
        The components.
    """
    order = []
    for position, (name, of_layer) in enumerate(values.items()):
        by_value = sorted(range(len(of_layer)), key=[-value for value in of_layer].__getitem__)
        required = set(by_value[: (at_least or {}).get(name, 0)])
        order += [
            ((number not in required, -of_layer[number] / costs[name], position, number), Component(name, number))
            for number in by_value
        ]
    return [component for _, component in sorted(order)]


def keep_within(
    order: Sequence[Component],
    costs: Mapping[str, int],
    budget: int,
    max_components: Mapping[str, int] | None = None,
) -> list[Component]:
    """The components that are kept under a budget: each one, in their order, for which there is room.

    Args:
        order: From `order_of_components`.
        costs: Layer name to the parameters of one of its components.
        budget: Parameters that all kept components may have together.
        max_components: Layer name to the largest number of components that it may keep. By default all.

    Returns:
        The kept components, in their order.
    """
    kept: list[Component] = []
    counts: dict[str, int] = {}
    for component in order:
        count = counts.get(component.layer, 0)
        cost = costs[component.layer]
        if cost > budget or (max_components is not None and count >= max_components[component.layer]):
            continue
        kept.append(component)
        counts[component.layer] = count + 1
        budget -= cost
    return kept


def by_layer(kept: Sequence[Component], names: Sequence[str]) -> Kept:
    """The kept components of each layer, for all layers of these names."""
    found: Kept = {name: [] for name in names}
    for component in kept:
        found[component.layer].append(component.number)
    return {name: sorted(numbers) for name, numbers in found.items()}


def agreement(first: Mapping[str, int], second: Mapping[str, int], costs: Mapping[str, int]) -> float:
    """The share of the parameters that two choices of ranks have in common, from 0 to 1; 1 if both are empty."""
    common = sum(min(rank, second.get(name, 0)) * costs[name] for name, rank in first.items())
    larger = max(sum(rank * costs[name] for name, rank in ranks.items()) for ranks in (first, second))
    return common / larger if larger else 1.0

"""Water filling: the continuous ranks that use up a budget under bounds, and their rounding to integers."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Continuous ranks closer than this to each other or to an integer count as equal. It is far above the rounding error
# of the solution and far below any meaningful difference.
_RANK_TOLERANCE = 1e-9


def integer_ranks(weights: Floats, costs: Ints, lower: Ints, upper: Ints, steps: Ints, total: int) -> Ints:
    """Integer ranks that cost at most `total`; `fim_lora.ranks.allocate.allocate_ranks` states what they guarantee.

    All arrays have one element for each layer, sorted by layer name. The largest step is handled first, so that
    smaller steps can use up what larger ones leave.
    """
    ranks = lower.copy()
    undecided = np.arange(len(weights))
    for step in np.unique(steps)[::-1].tolist():
        continuous = _continuous_ranks(weights[undecided], costs[undecided], lower[undecided], upper[undecided], total)
        in_group = steps[undecided] == step
        group, undecided = undecided[in_group], undecided[~in_group]
        share = total
        if len(undecided):
            share = _whole_budget((costs[group] * continuous[in_group]).tolist())
            # In exact integers, so that a rounding error above cannot take what the undecided layers need for their
            # lower bounds.
            share = min(share, total - int((costs * lower)[undecided].sum()))
        ranks[group] = step * _round_by_largest_remainder(
            continuous[in_group] / step, weights[group], costs[group] * step, upper[group] // step, share
        )
        total -= int((costs * ranks)[group].sum())
    return ranks


def _continuous_ranks(weights: Floats, costs: Ints, lower: Ints, upper: Ints, total: int) -> Floats:
    """Ranks `clamp(λ w_i, lower_i, upper_i)` that cost `total`; all bounds if that is not possible."""
    ranks = lower.astype(np.float64)
    positive = weights > np.finfo(np.float64).tiny
    zero = ~positive
    left_for_positive = total - float((costs * lower)[zero].sum())
    ranks[positive] = _solve_level(
        weights[positive], costs[positive], lower[positive], upper[positive], left_for_positive
    )
    # The limit of equal scores that go to zero: such layers get nothing until all other layers are full.
    left_for_zero = total - float((costs * ranks)[positive].sum())
    ranks[zero] = _solve_level(np.ones(int(zero.sum())), costs[zero], lower[zero], upper[zero], left_for_zero)
    return ranks


def _solve_level(weights: Floats, costs: Ints, lower: Ints, upper: Ints, total: float) -> Floats:
    """Find λ by bisection, which also finds the layers at a bound; then solve for λ among the rest exactly."""
    low_cost, high_cost = float((costs * lower).sum()), float((costs * upper).sum())
    if total <= low_cost:
        return lower.astype(np.float64)
    if total >= high_cost:
        return upper.astype(np.float64)

    # In logarithms, because λ spans as many orders of magnitude as the scores.
    log_weights = np.log(weights)
    below = float(np.log(np.maximum(lower, 0.5)).min() - log_weights.max()) - 1.0
    while _cost_at(below, log_weights, costs, lower, upper) > total:
        below -= 16.0
    above = float((np.log(upper) - log_weights).max())
    for _ in range(64):
        middle = (below + above) / 2
        if _cost_at(middle, log_weights, costs, lower, upper) > total:
            above = middle
        else:
            below = middle

    level = np.exp(below + log_weights)
    at_lower, at_upper = level <= lower, level >= upper
    free = ~(at_lower | at_upper)
    ranks = np.where(at_lower, lower, upper).astype(np.float64)
    if free.any():
        left = total - math.fsum((costs * ranks)[~free])
        ranks[free] = weights[free] * (left / math.fsum((costs * weights)[free]))
    return cast(Floats, np.clip(ranks, lower, upper))


def _cost_at(log_level: float, log_weights: Floats, costs: Ints, lower: Ints, upper: Ints) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float((costs * np.clip(np.exp(log_level + log_weights), lower, upper)).sum())


def _whole_budget(costs: Sequence[float]) -> int:
    """The largest integer not above the sum, up to rounding errors."""
    exact = math.fsum(costs)
    return math.floor(exact + _RANK_TOLERANCE * max(exact, 1.0))


def _round_by_largest_remainder(continuous: Floats, weights: Floats, costs: Ints, upper: Ints, total: int) -> Ints:
    ranks = np.floor(continuous + _RANK_TOLERANCE).astype(np.int64)
    if (costs * ranks).sum() > total:
        ranks = np.floor(continuous).astype(np.int64)
    left = total - int((costs * ranks).sum())
    remainders = np.maximum(continuous - ranks, 0)
    remainders = np.where(remainders > _RANK_TOLERANCE, np.round(remainders / _RANK_TOLERANCE), 0)
    # Largest remainder first, then higher score, then name (arrays are sorted by name and the sort is stable).
    for index in np.lexsort((-weights, -remainders)).tolist():
        if left <= 0 or remainders[index] == 0:
            break
        if ranks[index] < upper[index] and costs[index] <= left:
            ranks[index] += 1
            left -= int(costs[index])
    return ranks

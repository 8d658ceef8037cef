"""Scores to ranks: exact water-filling under a budget, then rounding by largest remainder.

Pure functions of numbers: no torch, no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt

Budget = Literal["rank", "parameters"]
BUDGETS: tuple[str, ...] = get_args(Budget)

# Plain proportionality, as in the proposal; every default of a score exponent refers to this one.
DEFAULT_SCORE_EXPONENT = 1.0
# The proposal's r_max=32 for r=8.
DEFAULT_R_MAX_FACTOR = 4

# Continuous ranks closer than this to each other or to an integer count as equal: it is far above the rounding
# error of the solution and far below any difference that means something.
_RANK_TOLERANCE = 1e-9

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


def allocate_ranks(
    scores: Mapping[str, float],
    r: int | Mapping[str, int],
    *,
    r_min: int = 1,
    r_max: int | None = None,
    budget: Budget = "rank",
    score_exponent: float = DEFAULT_SCORE_EXPONENT,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    parameters_per_rank: Mapping[str, int] | None = None,
    rank_steps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Divide the budget that uniform LoRA would spend among the layers, by their scores.

    The continuous solution is `r_i = clamp(λ · score_i ** score_exponent, r_min_i, r_max_i)` with the one λ for
    which `Σ c_i r_i` equals the budget. `c_i` is 1 for `budget="rank"`; for `budget="parameters"` it is what one more
    rank costs, which is `d_in + d_out` for a d_out × d_in matrix. Ranks are then rounded down, and what is left of the
    budget is given out by largest remainder, one rank a layer. So every rank is within one of the continuous solution
    (but for layers of score zero, see below), and:

    - a rank budget is used up exactly whenever the bounds allow it; a parameter budget is never exceeded, and
      what is left of it is less than the cost of one more rank for any layer that was rounded down;
    - among layers of equal shape and bounds a higher score never gets a lower rank;
    - scaling all scores by a constant changes nothing; ties are broken by name, whatever the order of `scores`.

    Layers of score zero get `r_min`. Only when every other layer is at its upper bound do they share what is left
    equally. The time is O(n log n).

    Where the rank of a layer must be a multiple of a step, the distinct steps are handled from the largest to the
    smallest: the budget left is divided among all layers not yet decided, and those of the largest step among them
    are rounded to multiples of it, within what they got together. What the rounding saves goes to the layers of
    smaller steps. Then a rank need not be within one of the continuous solution, but:

    - every rank is a multiple of its step, within the bounds, and the budget is never exceeded;
    - what is left of a rank budget is less than one more step of any layer below its upper bound, so a layer of
      step 1 with room means that nothing is left; what is left of a parameter budget is less than the most
      expensive step of a layer, unless all layers are at their upper bounds;
    - a higher score never gets a lower rank among layers of equal bounds, cost and step.

    Args:
        scores: Non-negative sensitivity of each layer, for example `mean(F)` of its eFIM.
        r: The rank that uniform LoRA would use, or the base rank r_i⁰ of each layer. The budget is `Σ r_i⁰`,
            or `Σ r_i⁰ c_i`.
        r_min: Smallest rank of a layer, not below 0; rounded up to a multiple of its step.
        r_max: Largest rank of a layer; `None` means four times its base rank. Rounded down to a multiple of its
            step.
        budget: `"rank"` or `"parameters"`; the latter needs `parameters_per_rank` or `shapes`.
        score_exponent: Positive. If the marginal value of the k-th rank of layer i falls like `score_i · k^-p`,
            the optimum is `r_i ∝ score_i ** (1/p)`, so a value below 1 is the principled softening.
        shapes: `(d_out, d_in)` of each layer. If given, no rank exceeds `min(d_out, d_in)`.
        parameters_per_rank: Adapter parameters that one more rank of each layer costs; `None` means
            `d_in + d_out`. Only a parameter budget reads it.
        rank_steps: Number that the rank of each layer must be a multiple of; `None` means 1 for all.

    Returns:
        The rank of each layer, in the order of `scores`.

    Raises:
        ValueError: If there are no layers; if a score is negative, NaN or infinite; if `r`, the bounds, the shapes
            and the steps cannot be satisfied together; if a base rank is not a multiple of its step; if `r`,
            `shapes`, `parameters_per_rank` or `rank_steps` does not name exactly the layers of `scores`; or if an
            option is out of its range.
    """
    if not scores:
        raise ValueError("There are no layers to allocate ranks to: `scores` is empty.")
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {BUDGETS}, got {budget!r}.")
    if not (math.isfinite(score_exponent) and score_exponent > 0):
        raise ValueError(f"score_exponent must be positive and finite, got {score_exponent!r}.")

    # Sorted by name once, so that no later step can depend on the order of the dictionary.
    names = sorted(scores)
    base_ranks = _base_ranks(names, r)
    steps = _positive_integers(names, rank_steps, "rank_steps")
    lower, upper = _bounds(names, base_ranks, r_min, r_max, shapes, steps)
    if parameters_per_rank is None and shapes is not None:
        parameters_per_rank = {name: sum(shape) for name, shape in shapes.items()}
    costs = _costs(names, budget, parameters_per_rank)
    weights = _weights(names, scores, score_exponent)
    total = int((costs * base_ranks).sum())

    ranks = _integer_ranks(weights, costs, lower, upper, steps, total)
    by_name = dict(zip(names, ranks.tolist(), strict=True))
    return {name: by_name[name] for name in scores}


def budget_of(ranks: Mapping[str, int], budget: Budget, parameters_per_rank: Mapping[str, int] | None = None) -> int:
    """What these ranks cost: `Σ r_i`, or `Σ r_i c_i` adapter parameters.

    Args:
        ranks: Rank of each layer.
        budget: `"rank"` or `"parameters"`.
        parameters_per_rank: Adapter parameters that one rank of each layer costs, needed for `"parameters"`.

    Returns:
        The sum, in ranks or in parameters.

    Raises:
        ValueError: If `parameters_per_rank` is needed and missing, or does not name exactly the layers of `ranks`.
    """
    names = list(ranks)
    costs = _costs(names, budget, parameters_per_rank).tolist()
    return sum(cost * ranks[name] for name, cost in zip(names, costs, strict=True))


def _base_ranks(names: Sequence[str], r: int | Mapping[str, int]) -> _Ints:
    if isinstance(r, Mapping):
        _require_same_names(names, r, "r")
        base_ranks = {name: r[name] for name in names}
    else:
        base_ranks = dict.fromkeys(names, r)
    for name, rank in base_ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
            raise ValueError(f"The base rank of layer {name!r} must be a positive integer, got {rank!r}.")
    return np.array(list(base_ranks.values()), dtype=np.int64)


def _bounds(
    names: Sequence[str],
    base_ranks: _Ints,
    r_min: int,
    r_max: int | None,
    shapes: Mapping[str, tuple[int, int]] | None,
    steps: _Ints,
) -> tuple[_Ints, _Ints]:
    if r_min < 0:
        raise ValueError(f"r_min must not be negative, got {r_min}.")
    lower = np.full(len(names), r_min, dtype=np.int64)
    upper = DEFAULT_R_MAX_FACTOR * base_ranks if r_max is None else np.full(len(names), r_max, dtype=np.int64)
    for name, rank, most, step in zip(names, base_ranks.tolist(), upper.tolist(), steps.tolist(), strict=True):
        if rank < r_min:
            raise ValueError(f"Layer {name!r} has base rank {rank}, below r_min={r_min}: lower r_min or raise r.")
        if rank > most:
            raise ValueError(f"Layer {name!r} has base rank {rank}, above r_max={most}: raise r_max or lower r.")
        if rank % step:
            raise ValueError(
                f"Layer {name!r} has base rank {rank}, but its rank must be a multiple of {step}: choose such an r, "
                "or give the layer one by an entry in rank_pattern."
            )
    if shapes is not None:
        _require_same_names(names, shapes, "shapes")
        upper = np.minimum(upper, np.array([min(shapes[name]) for name in names], dtype=np.int64))
    # Both stay on their side of the base rank, which is a multiple; only a shape can leave nothing between them.
    lower, upper = -(-lower // steps) * steps, upper // steps * steps
    if shapes is not None:
        _require_room(names, np.maximum(lower, steps), upper, steps, shapes)
    return lower, upper


def _require_room(
    names: Sequence[str], least: _Ints, upper: _Ints, steps: _Ints, shapes: Mapping[str, tuple[int, int]]
) -> None:
    for name, rank, most, step in zip(names, least.tolist(), upper.tolist(), steps.tolist(), strict=True):
        if most < rank:
            step_text = f" in steps of {step}" if step > 1 else ""
            raise ValueError(
                f"Layer {name!r} of shape {tuple(shapes[name])} cannot have rank {rank} or more{step_text}: "
                "lower r_min or exclude the layer."
            )


def _costs(names: Sequence[str], budget: Budget, parameters_per_rank: Mapping[str, int] | None) -> _Ints:
    if budget == "rank":
        return np.ones(len(names), dtype=np.int64)
    if parameters_per_rank is None:
        raise ValueError(
            'budget="parameters" needs `parameters_per_rank` or `shapes`: pass what one more rank of every layer '
            "costs, or (d_out, d_in) of every layer."
        )
    return _positive_integers(names, parameters_per_rank, "parameters_per_rank")


def _positive_integers(names: Sequence[str], given: Mapping[str, int] | None, argument: str) -> _Ints:
    if given is None:
        return np.ones(len(names), dtype=np.int64)
    _require_same_names(names, given, argument)
    for name in names:
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"`{argument}` of layer {name!r} must be a positive integer, got {value!r}.")
    return np.array([given[name] for name in names], dtype=np.int64)


def _weights(names: Sequence[str], scores: Mapping[str, float], score_exponent: float) -> _Floats:
    """`(score / largest score) ** score_exponent`, so that the scale of the scores cannot matter."""
    values = np.array([float(scores[name]) for name in names], dtype=np.float64)
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        name = names[int(bad.argmax())]
        raise ValueError(f"The score of layer {name!r} is {scores[name]!r}; scores must be finite and not negative.")
    largest = values.max()
    if largest == 0:
        return values
    return cast(_Floats, (values / largest) ** score_exponent)


def _integer_ranks(weights: _Floats, costs: _Ints, lower: _Ints, upper: _Ints, steps: _Ints, total: int) -> _Ints:
    """Fill and round, the largest step first, so that smaller steps can use up what larger ones leave."""
    ranks = lower.copy()
    open_layers = np.arange(len(weights))
    for step in np.unique(steps)[::-1].tolist():
        continuous = _water_fill(
            weights[open_layers], costs[open_layers], lower[open_layers], upper[open_layers], total
        )
        in_group = steps[open_layers] == step
        group, open_layers = open_layers[in_group], open_layers[~in_group]
        share = total
        if len(open_layers):
            share = _whole_budget((costs[group] * continuous[in_group]).tolist())
            # Exact integers, so that a rounding error above cannot take what others need for their lower bounds.
            share = min(share, total - int((costs * lower)[open_layers].sum()))
        ranks[group] = step * _round_by_largest_remainder(
            continuous[in_group] / step, weights[group], costs[group] * step, upper[group] // step, share
        )
        total -= int((costs * ranks)[group].sum())
    return ranks


def _whole_budget(spent: Sequence[float]) -> int:
    """The largest integer not above the sum, but for rounding errors."""
    exact = math.fsum(spent)
    return math.floor(exact + _RANK_TOLERANCE * max(exact, 1.0))


def _water_fill(weights: _Floats, costs: _Ints, lower: _Ints, upper: _Ints, total: int) -> _Floats:
    """Continuous ranks `clamp(λ w_i, lower_i, upper_i)` that cost `total`, or all bounds if that cannot be."""
    ranks = lower.astype(np.float64)
    positive = weights > np.finfo(np.float64).tiny
    zero = ~positive
    left_for_positive = total - float((costs * lower)[zero].sum())
    ranks[positive] = _solve_level(
        weights[positive], costs[positive], lower[positive], upper[positive], left_for_positive
    )
    # The limit of a vanishing but equal score: nothing, until everybody else is full.
    left_for_zero = total - float((costs * ranks)[positive].sum())
    ranks[zero] = _solve_level(np.ones(int(zero.sum())), costs[zero], lower[zero], upper[zero], left_for_zero)
    return ranks


def _solve_level(weights: _Floats, costs: _Ints, lower: _Ints, upper: _Ints, total: float) -> _Floats:
    """Find λ by bisection, which also tells who is at a bound; then solve for λ among the others exactly."""
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
    return cast(_Floats, np.clip(ranks, lower, upper))


def _cost_at(log_level: float, log_weights: _Floats, costs: _Ints, lower: _Ints, upper: _Ints) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float((costs * np.clip(np.exp(log_level + log_weights), lower, upper)).sum())


def _round_by_largest_remainder(
    continuous: _Floats, weights: _Floats, costs: _Ints, upper: _Ints, total: int
) -> _Ints:
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


def _require_same_names(names: Sequence[str], given: Mapping[str, object], argument: str) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"`{argument}` lacks layer {missing[0]!r} ({len(missing)} layers in all).")
    if len(given) > len(names):
        known = set(names)
        unknown = [name for name in given if name not in known]
        raise ValueError(f"`{argument}` names {unknown[0]!r}, which has no score ({len(unknown)} in all).")

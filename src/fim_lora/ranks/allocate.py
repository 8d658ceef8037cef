"""`allocate_ranks`: checks its input and divides a budget among layers by their scores."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from ..config import BUDGETS, DEFAULT_R_MAX_FACTOR, Budget
from .water_filling import Floats, Ints, integer_ranks


def allocate_ranks(
    scores: Mapping[str, float],
    r: int | Mapping[str, int],
    *,
    r_min: int = 1,
    r_max: int | None = None,
    budget: Budget = "rank",
    score_exponent: float = 1.0,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    parameters_per_rank: Mapping[str, int] | None = None,
    rank_steps: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Divide the budget that uniform LoRA would spend among the layers, by their scores.

    The continuous solution is `r_i = clamp(λ · score_i ** score_exponent, r_min_i, r_max_i)`, with the one λ for which
    `Σ c_i r_i` equals the budget. `c_i` is 1 for `budget="rank"`. For `budget="parameters"` it is the cost of one more
    rank, which is `d_in + d_out` for a d_out × d_in matrix. The ranks are then rounded down, and the rest of the
    budget is distributed by largest remainder, one rank per layer. So every rank is within one of the continuous
    solution (except for layers of score zero, see below), and:

    - A rank budget is used up exactly whenever the bounds allow it. A parameter budget is never exceeded, and
      the unused rest is less than the cost of one more rank for any layer that was rounded down.
    - Among layers of equal shape and bounds, a higher score never gets a lower rank.
    - Scaling all scores by a constant changes nothing. Ties are broken by name, whatever the order of `scores`.

    Layers of score zero get `r_min`. They share the rest of the budget equally only if all other layers are at their
    upper bounds. The time is O(n log n).

    If ranks must be multiples of a step, the steps are handled from the largest to the smallest: the remaining budget
    is divided among all undecided layers, and those with the largest step are rounded to multiples of it, within the
    sum of their shares. Layers of smaller steps get what the rounding leaves. Then a rank can differ from the
    continuous solution by more than one, but:

    - Every rank is a multiple of its step and within the bounds, and the budget is never exceeded.
    - The unused rest of a rank budget is less than one more step of any layer below its upper bound, so nothing is
      left if a layer of step 1 is below its upper bound. The unused rest of a parameter budget is less than the most
      expensive step of a layer, unless all layers are at their upper bounds.
    - Among layers of equal bounds, cost and step, a higher score never gets a lower rank.

    Args:
        scores: Non-negative sensitivity of each layer, for example `mean(F)` of its eFIM.
        r: The rank that uniform LoRA would use, or the base rank r_i⁰ of each layer. The budget is `Σ c_i r_i⁰`.
        r_min: Smallest rank of a layer, at least 0. It is rounded up to a multiple of the layer's step.
        r_max: Largest rank of a layer, rounded down to such a multiple. `None` means four times its base rank.
        budget: `"rank"` or `"parameters"`, the default of `FimConfig`, which needs `parameters_per_rank` or `shapes`.
        score_exponent: Positive. If the marginal value of the k-th rank of layer i falls like `score_i · k^-p`,
            the optimum is `r_i ∝ score_i ** (1/p)`, so a value below 1 is the principled way to soften the allocation.
        shapes: `(d_out, d_in)` of each layer. If given, no rank exceeds `min(d_out, d_in)`.
        parameters_per_rank: c_i of a parameter budget; `None` means `d_in + d_out`. A rank budget does not use it.
        rank_steps: Number of which the rank of each layer must be a multiple; `None` means 1 for all layers.

    Returns:
        The rank of each layer, in the order of `scores`.

    Raises:
        ValueError: If there are no layers; if a score is negative, NaN or infinite; if `r`, the bounds, the shapes
            and the steps cannot be satisfied together; if a base rank is not a multiple of its step; if a mapping
            does not name exactly the layers of `scores`; or if an option is out of its range.
    """
    if not scores:
        raise ValueError("There are no layers to allocate ranks to: `scores` is empty.")
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {BUDGETS}, got {budget!r}.")
    if not (math.isfinite(score_exponent) and score_exponent > 0):
        raise ValueError(f"score_exponent must be positive and finite, got {score_exponent!r}.")

    # Sorted by name once, so that no later step can depend on the order of the dictionary.
    names = sorted(scores)
    given_ranks = r if isinstance(r, Mapping) else dict.fromkeys(names, r)
    given_steps = dict.fromkeys(names, 1) if rank_steps is None else rank_steps
    base_ranks = _positive_integers(names, given_ranks, "r", "The base rank")
    steps = _positive_integers(names, given_steps, "rank_steps", "`rank_steps`")
    lower, upper = _bounds(names, base_ranks, r_min, r_max, shapes, steps)
    if parameters_per_rank is None and shapes is not None:
        parameters_per_rank = {name: sum(shape) for name, shape in shapes.items()}
    costs = _costs(names, budget, parameters_per_rank)
    weights = _weights(names, scores, score_exponent)
    total = int((costs * base_ranks).sum())

    ranks = integer_ranks(weights, costs, lower, upper, steps, total)
    by_name = dict(zip(names, ranks.tolist(), strict=True))
    return {name: by_name[name] for name in scores}


def budget_of(ranks: Mapping[str, int], budget: Budget, parameters_per_rank: Mapping[str, int] | None = None) -> int:
    """The cost of these ranks: `Σ r_i`, or `Σ r_i c_i` adapter parameters with c_i of `parameters_per_rank`.

    A parameter budget raises ValueError unless `parameters_per_rank` names exactly the layers of `ranks`.
    """
    costs = _costs(list(ranks), budget, parameters_per_rank).tolist()
    return sum(cost * rank for cost, rank in zip(costs, ranks.values(), strict=True))


def _bounds(
    names: Sequence[str],
    base_ranks: Ints,
    r_min: int,
    r_max: int | None,
    shapes: Mapping[str, tuple[int, int]] | None,
    steps: Ints,
) -> tuple[Ints, Ints]:
    """Smallest and largest rank of each layer, as multiples of its step."""
    for name, bound in (("r_min", r_min), ("r_max", r_max)):
        if bound is not None and not _is_integer(bound):
            raise ValueError(f"{name} must be an integer, got {bound!r}.")
    if r_min < 0:
        raise ValueError(f"r_min must not be negative, got {r_min}.")
    lower = np.full(len(names), r_min, dtype=np.int64)
    upper = DEFAULT_R_MAX_FACTOR * base_ranks if r_max is None else np.full(len(names), r_max, dtype=np.int64)
    for name, rank, largest, step in zip(names, base_ranks.tolist(), upper.tolist(), steps.tolist(), strict=True):
        if rank < r_min:
            raise ValueError(f"Layer {name!r} has base rank {rank}, below r_min={r_min}: lower r_min or raise r.")
        if rank > largest:
            raise ValueError(f"Layer {name!r} has base rank {rank}, above r_max={largest}: raise r_max or lower r.")
        if rank % step:
            raise ValueError(
                f"Layer {name!r} has base rank {rank}, but its rank must be a multiple of {step}: choose such an r, "
                "or set the rank of this layer in rank_pattern."
            )
    if shapes is not None:
        _require_same_names(names, shapes, "shapes")
        upper = np.minimum(upper, np.array([min(shapes[name]) for name in names], dtype=np.int64))
    # The base rank is a multiple of the step, so it stays between the rounded bounds. Only a shape can leave no rank
    # between them.
    lower, upper = -(-lower // steps) * steps, upper // steps * steps
    smallest = np.maximum(lower, steps)
    if shapes is not None and (upper < smallest).any():
        index = int((upper < smallest).argmax())
        step_text = f" in steps of {steps[index]}" if steps[index] > 1 else ""
        raise ValueError(
            f"Layer {names[index]!r} of shape {tuple(shapes[names[index]])} cannot have rank {smallest[index]} or "
            f"more{step_text}: lower r_min or exclude the layer."
        )
    return lower, upper


def _costs(names: Sequence[str], budget: Budget, parameters_per_rank: Mapping[str, int] | None) -> Ints:
    """The cost c_i of one more rank of each layer."""
    if budget == "rank":
        return np.ones(len(names), dtype=np.int64)
    if parameters_per_rank is None:
        raise ValueError(
            'budget="parameters" needs `parameters_per_rank` or `shapes`: pass the cost of one more rank of each '
            "layer, or (d_out, d_in) of each layer."
        )
    return _positive_integers(names, parameters_per_rank, "parameters_per_rank", "`parameters_per_rank`")


def _weights(names: Sequence[str], scores: Mapping[str, float], score_exponent: float) -> Floats:
    """`(score / largest score) ** score_exponent`, so that the scale of the scores cannot matter."""
    values = np.array([float(scores[name]) for name in names], dtype=np.float64)
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        name = names[int(bad.argmax())]
        raise ValueError(f"The score of layer {name!r} is {scores[name]!r}; scores must be finite and not negative.")
    largest = values.max()
    if largest == 0:
        return values
    return cast(Floats, (values / largest) ** score_exponent)


def _positive_integers(names: Sequence[str], given: Mapping[str, int], argument: str, subject: str) -> Ints:
    """The integer of each layer; `subject` begins the error message."""
    _require_same_names(names, given, argument)
    for name in names:
        value = given[name]
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{subject} of layer {name!r} must be a positive integer, got {value!r}.")
    return np.array([given[name] for name in names], dtype=np.int64)


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _require_same_names(names: Sequence[str], given: Mapping[str, object], argument: str) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"`{argument}` lacks layer {missing[0]!r} ({len(missing)} missing in total): pass a value for each layer."
        )
    unknown = sorted(set(given).difference(names))
    if unknown:
        raise ValueError(
            f"`{argument}` names {unknown[0]!r}, which has no score ({len(unknown)} in total): remove such names."
        )

"""What a rank map says besides the ranks: where they come from, and which ranks they are compared with."""

from __future__ import annotations

from ..config import DEFAULT_R_MAX_FACTOR
from ..ranks.allocation import Allocation
from ..ranks.compressed import Compression

Result = Allocation | Compression


def uniform_rank(result: Result) -> float:
    """The rank of uniform LoRA: `r` of an allocation, or the one that has the parameters of a compression.

    It has three digits, as it is shown, so that no rank is above a uniform one that looks equal.
    """
    if isinstance(result, Allocation):
        return result.r
    return float(f"{result.num_parameters / sum(result.parameters_per_rank.values()):.3g}")


def largest_allowed_rank(result: Result) -> int | None:
    """`r_max`; `None` for a compression without it."""
    if isinstance(result, Allocation):
        return result.fim_config.r_max or DEFAULT_R_MAX_FACTOR * result.r
    return result.r_max


def size_line(result: Result) -> str:
    """The size of the adapter, for people to read."""
    if isinstance(result, Allocation):
        if result.budget_used == result.budget:
            return f"{result.budget:,} {result.budget_unit}, as with uniform rank {result.r}"
        return f"{result.budget_used:,} of the {result.budget:,} {result.budget_unit} of uniform rank {result.r}"
    return f"{result.num_parameters:,} of {result.num_parameters_before:,} parameters kept ({result.share:.1%})"


def before_line(compression: Compression) -> str:
    """The ranks before a compression, for people to read."""
    before = sorted(set(compression.ranks_before.values()))
    return (
        f"before: rank {before[0]} in all layers" if len(before) == 1 else f"before: ranks {before[0]} to {before[-1]}"
    )


def measured_line(result: Result) -> str:
    """What the ranks were measured on, for people to read."""
    return result.scores.measured if isinstance(result, Allocation) else result.criterion

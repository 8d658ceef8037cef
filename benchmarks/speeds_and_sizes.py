"""How many steps, and how many adapter parameters, each method needs to reach uniform LoRA's loss."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gains import REFERENCE, group_by_setting, paired_gains, seeds_needed
from intervals import interval_of_seeds
from learning_rates import chosen_runs

REFERENCE_RANK = 8
"""The rank of uniform LoRA whose loss methods of other sizes are compared with."""

_MIN_RANKS_OF_A_CURVE = 3


def first_reached(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where a curve first falls to a loss, by linear interpolation.

    Args:
        points: Position and loss of each point, in the order of the positions.
        loss: The loss to reach.

    Returns:
        The position: that of the first point if its loss is low enough, and `None` if the loss is never reached.
    """
    if points[0][1] <= loss:
        return float(points[0][0])
    for (position, before), (next_position, after) in itertools.pairwise(points):
        if after <= loss:
            return position + (next_position - position) * (before - loss) / (before - after)
    return None


class Speed(NamedTuple):
    """How soon a method reaches the loss that uniform LoRA has at the end of training.

    Attributes:
        end: The last step at which all runs of the setting were measured.
        steps: Steps until the method reaches uniform LoRA's loss at step `end`, mean over seeds. A seed that does not
            reach it counts as `end`.
        reached: Number of seeds that reach it.
        seeds: Number of seeds.
        calibration_steps: Time before training in units of the training steps of the same run. It is `None` for runs
            on a GPU, which several runs may have shared.
    """

    end: int
    steps: float
    reached: int
    seeds: int
    calibration_steps: float | None


def speeds_by_method(results: Sequence[Mapping[str, Any]]) -> dict[str, Speed]:
    """The speed of each method, from the runs of one setting."""
    chosen = chosen_runs(results)
    end = min(run["curve"][-1][0] for by_seed in chosen.values() for run in by_seed.values())
    speeds = {}
    for method, by_seed in chosen.items():
        seeds = sorted(by_seed.keys() & chosen[REFERENCE].keys())
        goals = [dict(chosen[REFERENCE][seed]["curve"])[end] for seed in seeds]
        steps = [first_reached(by_seed[seed]["curve"], goal) for seed, goal in zip(seeds, goals, strict=True)]
        # Not every run was measured after the last common step.
        reached = [step for step in steps if step is not None and step <= end]
        if seeds:
            mean_steps = (sum(reached) + end * (len(seeds) - len(reached))) / len(seeds)
            calibration_steps = _calibration_steps(list(by_seed.values()))
            speeds[method] = Speed(end, mean_steps, len(reached), len(seeds), calibration_steps)
    return speeds


def _calibration_steps(runs: Sequence[Mapping[str, Any]]) -> float | None:
    if any(run.get("environment", {}).get("gpu") for run in runs):
        return None
    return mean(run["calibration_seconds"] * run["run"]["steps"] / run["training_seconds"] for run in runs)


class Size(NamedTuple):
    """One method at one rank.

    Attributes:
        parameters: Number of adapter parameters, mean over seeds.
        losses: Test loss of each seed, in the order of the seeds.
        accuracy: Mean test accuracy.
    """

    parameters: float
    losses: tuple[float, ...]
    accuracy: float

    @property
    def loss(self) -> float:
        """Mean test loss."""
        return mean(self.losses)

    @property
    def error(self) -> float:
        """Standard error over seeds of the mean test loss."""
        return stdev(self.losses) / math.sqrt(len(self.losses)) if len(self.losses) > 1 else 0.0


def sizes_by_setting(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, Size]]]:
    """Loss by number of adapter parameters, for settings in which uniform LoRA was run with at least three ranks.

    Returns:
        For each setting without its rank, each method and each rank: the size. Only methods with enough seeds at two
        or more ranks are included.
    """
    needed = seeds_needed(paired_gains(results))
    found: dict[str, dict[str, dict[int, Size]]] = defaultdict(lambda: defaultdict(dict))
    for setting, runs in group_by_setting(results).items():
        for method, by_seed in chosen_runs(runs).items():
            if len(by_seed) >= needed:
                found[setting.without_rank][method][setting.rank] = _size([by_seed[seed] for seed in sorted(by_seed)])
    return {
        name: {method: sizes for method, sizes in methods.items() if len(sizes) > 1}
        for name, methods in found.items()
        if len(methods.get(REFERENCE, ())) >= _MIN_RANKS_OF_A_CURVE
    }


def _size(runs: Sequence[Mapping[str, Any]]) -> Size:
    parameters = mean(run["adapter_parameters"] for run in runs)
    losses = tuple(run["test"]["loss"] for run in runs)
    return Size(parameters, losses, mean(run["test"]["accuracy"] for run in runs))


def parameters_to_reach(points: Iterable[tuple[float, float]], loss: float) -> float | None:
    """The number of adapter parameters a method needs to reach a loss, interpolated in their logarithm.

    Args:
        points: Number of parameters and loss of each adapter of the method.
        loss: The loss to reach.

    Returns:
        The number: that of the smallest adapter if its loss is low enough, and `None` if no adapter reaches the loss.
    """
    reached = first_reached(sorted((math.log(parameters), own_loss) for parameters, own_loss in points), loss)
    return None if reached is None else math.exp(reached)


def parameter_share_interval(sizes: Sequence[Size], reference: Size) -> tuple[float, float]:
    """95 % interval of `parameters_to_reach` divided by the parameters of uniform LoRA.

    The bootstrap draws the same seeds for all sizes.

    Args:
        sizes: The sizes of one method, with the same seeds.
        reference: The size of uniform LoRA whose loss is to be reached.

    Returns:
        Lower and upper end, which are infinite if the loss is not reached.
    """

    def share(drawn: NDArray[np.int64]) -> float:
        points = [(size.parameters, float(np.take(size.losses, drawn).mean())) for size in sizes]
        reached = parameters_to_reach(points, float(np.take(reference.losses, drawn).mean()))
        return math.inf if reached is None else reached / reference.parameters

    return interval_of_seeds(min(len(size.losses) for size in (*sizes, reference)), share)

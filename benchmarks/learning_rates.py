"""How the learning rate of each method is chosen: the lowest loss on the development split, with one seed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

TUNED_BY = "loss"
"""The development metric that selects the learning rate. On a few hundred examples the loss separates learning rates
that have the same accuracy."""


def best_rate(losses: Mapping[float, float]) -> float:
    """The learning rate with the lowest development loss; the smaller one if two are equal.

    A run that diverged has the loss NaN and is never the best one.
    """
    return min(sorted(losses), key=lambda rate: math.inf if math.isnan(losses[rate]) else losses[rate])


def tuned_rate(
    known: Mapping[float, float], grid: Sequence[float], extra_rates: int, loss_of: Callable[[float], float]
) -> float:
    """Run a grid of learning rates, extend it while the best rate is at one of its ends, and return the best rate.

    Args:
        known: Development loss of each learning rate that was run before, in the grid or not.
        grid: The learning rates to start with.
        extra_rates: The largest number of rates outside the grid, including those that were run before.
        loss_of: Runs a learning rate and returns its development loss.

    Returns:
        The learning rate with the lowest development loss.
    """
    losses = dict(known)
    for rate in grid:
        losses[rate] = losses[rate] if rate in losses else loss_of(rate)
    while len(losses.keys() - set(grid)) < extra_rates:
        rate = best_rate(losses)
        if rate not in (min(losses), max(losses)):
            break
        next_rate = 2 * rate if rate == max(losses) else rate / 2
        losses[next_rate] = loss_of(next_rate)
    return best_rate(losses)


class Sweep(NamedTuple):
    """All learning rates of one method in one setting.

    Attributes:
        runs: The run of each seed, for each learning rate.
        first_seed: The seed that was run with the most learning rates; the smallest one if several were.
        best: The learning rate with the lowest development loss with that seed.
    """

    runs: dict[float, dict[int, Mapping[str, Any]]]
    first_seed: int
    best: float

    @property
    def at_an_end(self) -> bool:
        """Whether the best learning rate is the smallest or the largest that was run, so that it is not tuned."""
        return self.best in (min(self.test_losses), max(self.test_losses))

    @property
    def test_losses(self) -> dict[float, float]:
        """Test loss with the first seed, for each learning rate."""
        return {
            rate: by_seed[self.first_seed]["test"]["loss"]
            for rate, by_seed in sorted(self.runs.items())
            if self.first_seed in by_seed
        }

    def rise(self, factor: float) -> float | None:
        """Test loss at `factor` times the best rate minus the loss at the best rate; `None` if it was not run."""
        losses = self.test_losses
        rate = factor * self.best
        return losses[rate] - losses[self.best] if rate in losses else None


def sweeps_by_method(results: Iterable[Mapping[str, Any]]) -> dict[str, Sweep]:
    """Collect the learning rates of each method from the runs of one setting."""
    runs_by_method: dict[str, dict[float, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        run = result["run"]
        runs_by_method[run["method"]][run["learning_rate"]][run["seed"]] = result
    return {method: _sweep(dict(runs)) for method, runs in runs_by_method.items()}


def _sweep(runs: dict[float, dict[int, Mapping[str, Any]]]) -> Sweep:
    rates_per_seed = Counter(seed for by_seed in runs.values() for seed in by_seed)
    first = min(rates_per_seed, key=lambda seed: (-rates_per_seed[seed], seed))
    losses = {rate: by_seed[first]["development"][TUNED_BY] for rate, by_seed in runs.items() if first in by_seed}
    return Sweep(runs, first, best_rate(losses))


def chosen_runs(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The run of each seed at the best learning rate, for each method, from the runs of one setting."""
    return {method: sweep.runs[sweep.best] for method, sweep in sweeps_by_method(results).items()}

"""`fim-lora allocate --dry-run`: the targets, the size of the adapter and the expected time. Nothing is written."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from peft import LoraConfig
from torch.utils.data import DataLoader

from ..rank_allocation import RankAllocation
from ..ranks.allocate import budget_of
from ..ranks.layer_grid import layer_grids
from ..scoring import get_fim_scores
from .json_output import print_json
from .run_facts import timed
from .summary import new_console, print_facts


def dry_run(
    model: Any,
    batches: DataLoader[Any],
    config: LoraConfig,
    facts: Mapping[str, str],
    seconds: dict[str, float],
    as_json: bool,
) -> None:
    """Run the first batch of the calibration, and print what all of it would take and give.

    `facts` are those of the inputs. `seconds` has the durations of the stages so far.
    """
    num_batches = min(config.fim_config.fim_calibration_batches, len(batches))
    config = copy.copy(config)
    config.fim_config = replace(config.fim_config, fim_calibration_batches=1)
    with timed(seconds, "first batch"):
        scores = get_fim_scores(model, islice(batches, 1), config, show_progress_bar=False)
    allocation = RankAllocation.from_scores(scores, config)  # refuses bounds that cannot be satisfied
    uniform = budget_of(dict.fromkeys(scores, config.r), "parameters", scores.parameters_per_rank)
    expected = seconds["first batch"] * num_batches
    if as_json:
        print_json(_document(allocation, uniform, num_batches, seconds, expected))
        return
    print_facts(
        new_console(),
        {
            "Targets": f"{len(scores):,} layers: {_kinds(allocation)}",
            "Adapter": f"{uniform:,} parameters with uniform rank {config.r}",
            "Budget": f"{allocation.budget:,} {allocation.budget_unit} for the allocated ranks",
            **facts,
            "Calibration": f"about {expected:.0f} s: {num_batches:,} batches like the first, which took "
            f"{seconds['first batch']:.1f} s; the first one is often the slowest",
        },
    )
    print("Nothing was written. Next: the same command without --dry-run")


def _document(
    allocation: RankAllocation, uniform: int, num_batches: int, seconds: Mapping[str, float], expected: float
) -> dict[str, Any]:
    return {
        "kind": "dry-run",
        "targets": list(allocation.scores),
        "r": allocation.r,
        "num_parameters_uniform": uniform,
        "budget": allocation.budget,
        "budget_unit": allocation.budget_unit,
        "num_batches": num_batches,
        "seconds": dict(seconds),
        "expected_calibration_seconds": expected,
    }


def _kinds(allocation: RankAllocation) -> str:
    """How many layers of each kind there are."""
    counts: dict[str, int] = {}
    for grid in layer_grids(allocation.ranks):
        for _, kind in grid.cells:
            counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())

"""`FimConfig`: how ranks are decided from the eFIM; what several packages know of its results and of PEFT."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Budget = Literal["rank", "parameters"]
Score = Literal["norm", "mean"]

BUDGETS: tuple[str, ...] = get_args(Budget)
SCORES: tuple[str, ...] = get_args(Score)

ALLOCATION_FILE = "fim_allocation.json"
"""Name of the file in an output folder that holds the ranks."""

FINGERPRINT_LENGTH = 32
"""Digits of the fingerprint of an adapter: half of a SHA-256 is enough, and short enough to read in a file."""

# The proposal's r_max=32 for r=8.
DEFAULT_R_MAX_FACTOR = 4

# PEFT's own names. PEFT's other names need a separate preparation or create a different layer.
INITIALIZATIONS = ("gaussian", "orthogonal", "pissa", "olora", "eva")

_PISSA_WITH_ITERATIONS = re.compile(r"pissa_niter_[1-9]\d*")


@dataclass
class FimConfig:
    """The sub-configuration of `LoraConfig(init_lora_weights="fim", fim_config=...)`.

    By default ranks are proportional to the norm of each layer's gradient, under a budget of parameters. The proposal
    to PEFT divides a budget of ranks in proportion to the mean of the eFIM: `FimConfig(score="mean", budget="rank")`.
    That lost to uniform ranks on SST-2 and GSM8K (`docs/evidence.md`), so it is not the default. The other defaults
    are those of the proposal.

    Args:
        fim_calibration_batches: Number of batches over which the eFIM is averaged; at least 1.
        r_min: Smallest rank of a layer; at least 0. At 0, a layer can lose its adapter. It is then removed from
            `target_modules`, as with EVA.
        r_max: Largest rank of a layer; at least 1 and `r_min`. `None` means four times the layer's base rank
            (32 for `r=8`).
        adjust_scaling_factors: If `True`, each layer keeps its scaling: when its rank changes from r to r_i, its
            `lora_alpha` is multiplied by `r_i / r`, as with EVA, or by `sqrt(r_i / r)` with `use_rslora`. (EVA
            multiplies by `r_i / r` also with `use_rslora`, which changes the scaling.) If `False`, `lora_alpha` is
            not changed, and the scaling follows from the new rank.
        budget: What stays the same as with uniform ranks: `"rank"`, the sum of ranks, or `"parameters"`, the number
            of entries of A and B.
        score: What ranks are proportional to. `"norm"`: the root of the sum of the eFIM over the entries of the
            weight, which is the norm of an example's gradient (root mean square over examples). `"mean"`: the mean of
            the eFIM over the entries.
        score_exponent: Ranks are proportional to `score ** score_exponent`. It must be positive; 1 is plain
            proportionality, and a value below 1 softens the allocation.
        init_lora_weights: PEFT's initialization, applied at the final ranks: `True`, `False`, `"gaussian"`,
            `"orthogonal"` (all ranks are then even), `"pissa"`, `"pissa_niter_[number of iterations]"`, `"olora"`, or
            `"eva"`, which takes only the directions from EVA and needs the dataloader for them.
        exact: Whether the gradients of linear layers are read exactly for examples of any length. If `False`, they are
            exact for examples of up to 128 positions, or up to an eighth of the width of a wider layer (512 positions
            at a width of 4,096). Longer examples are read through a random projection of width 16, at a small part of
            the cost. The estimate is unbiased. Its standard deviation is at most 35 % of the value for one example
            and falls with the square root of the number of examples; the reported standard error includes it.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range.
    """

    fim_calibration_batches: int = field(default=8, metadata={"help": "Number of batches for the eFIM"})
    r_min: int = field(default=1, metadata={"help": "Smallest rank of a layer"})
    r_max: int | None = field(default=None, metadata={"help": "Largest rank of a layer; None means 4 * r"})
    adjust_scaling_factors: bool = field(default=True, metadata={"help": "Each layer keeps its scaling"})
    budget: Budget = field(default="parameters", metadata={"help": "What stays as with uniform ranks"})
    score: Score = field(default="norm", metadata={"help": "Ranks by the norm of the gradient or the mean eFIM"})
    score_exponent: float = field(default=1.0, metadata={"help": "Exponent of the scores"})
    init_lora_weights: bool | str = field(default=True, metadata={"help": "PEFT's initialization at the final ranks"})
    exact: bool = field(default=False, metadata={"help": "Read the gradients of long examples exactly, too"})

    def __post_init__(self) -> None:
        _require_int("fim_calibration_batches", self.fim_calibration_batches, at_least=1)
        _require_int("r_min", self.r_min, at_least=0)
        if self.r_max is not None:
            _require_int("r_max", self.r_max, at_least=1)
            if self.r_max < self.r_min:
                raise ValueError(f"r_max={self.r_max} is below r_min={self.r_min}: swap or widen the bounds.")
        _require_bool("adjust_scaling_factors", self.adjust_scaling_factors)
        _require_bool("exact", self.exact)
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {BUDGETS}, got {self.budget!r}.")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {self.score!r}.")
        if isinstance(self.score_exponent, bool) or not isinstance(self.score_exponent, (int, float)):
            raise TypeError(f"score_exponent must be a number, got {self.score_exponent!r}.")
        if not (math.isfinite(self.score_exponent) and self.score_exponent > 0):
            raise ValueError(f"score_exponent must be positive and finite, got {self.score_exponent!r}.")
        _require_initialization(self.init_lora_weights)


# Beginnings of the names in PEFT.
_BASE_CHANGING_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base_weight(init_lora_weights: bool | str) -> bool:
    """Whether this initialization of PEFT subtracts something of the adapter's rank from the base weights.

    PEFT does it again whenever the adapter is loaded.
    """
    # PEFT accepts OLoRA in any case.
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(_BASE_CHANGING_INITIALIZATIONS)


# Scalings closer than this count as equal. It is far above rounding errors, and far below differences that matter.
_SCALING_TOLERANCE = 1e-6


def unequal_scalings(
    ranks: Mapping[str, int], alphas: Mapping[str, float], use_rslora: bool
) -> list[tuple[str, float]]:
    """Two layers of different scaling, by name, a layer of the largest rank first; empty if all share one scaling.

    Layers of rank 0 have no scaling.
    """
    scalings = {
        name: alphas[name] / (math.sqrt(rank) if use_rslora else rank) for name, rank in ranks.items() if rank > 0
    }
    largest = max(scalings, key=lambda name: ranks[name])
    for other, scaling in scalings.items():
        if not math.isclose(scaling, scalings[largest], rel_tol=_SCALING_TOLERANCE):
            return [(largest, scalings[largest]), (other, scaling)]
    return []


def integer_if_whole(alpha: float) -> float:
    """PEFT documents `lora_alpha` as an integer, and some readers of the config require one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _require_int(name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def _require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def _require_initialization(value: object) -> None:
    if isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise TypeError(f"init_lora_weights must be True, False or a name, got {value!r}.")
    if value not in INITIALIZATIONS and not _PISSA_WITH_ITERATIONS.fullmatch(value):
        names = ", ".join(map(repr, INITIALIZATIONS))
        raise ValueError(
            f"init_lora_weights of FimConfig must be True, False, {names} or 'pissa_niter_[number of iterations]', "
            f"got {value!r}."
        )

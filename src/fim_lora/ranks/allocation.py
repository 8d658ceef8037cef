"""`Allocation`: the ranks, the scores and settings that they came from, and the JSON file of all of these."""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from typing_extensions import Self

from ..config import ALLOCATION_FILE as ALLOCATION_FILE
from ..config import FimConfig, integer_if_whole
from ..fisher.scores import FimScores
from ..runtime.atomic import write_json
from ..runtime.checked_json import read_json, require_boolean, require_integer, require_number
from .allocate import allocate_ranks, budget_of
from .layer_grid import format_grid

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Allocation:
    """One rank and one `lora_alpha` per layer, with the scores and settings that they came from.

    Its subclass `fim_lora.RankAllocation` adds the conversion from and to a `LoraConfig`.

    Attributes:
        ranks: Layer name, as in the base model, to rank. 0 means that the layer loses its adapter.
        alphas: Layer name to `lora_alpha` of the layer; of a layer of rank 0, its base `lora_alpha`.
        scores: The scores, with counts of batches and examples.
        fim_config: How ranks were decided.
        r: Global rank of the LoRA config.
        lora_alpha: Global `lora_alpha` of the LoRA config.
        use_rslora: Whether the scaling is `lora_alpha / sqrt(r_i)` and not `lora_alpha / r_i`.
        budget: What uniform LoRA would spend, in ranks or in parameters, as `fim_config.budget` says.
        budget_used: What `ranks` spends.
    """

    ranks: dict[str, int]
    alphas: dict[str, float]
    scores: FimScores
    fim_config: FimConfig
    r: int
    lora_alpha: float
    use_rslora: bool
    budget: int
    budget_used: int

    @classmethod
    def allocate(
        cls,
        scores: FimScores,
        fim_config: FimConfig,
        base_ranks: Mapping[str, int],
        base_alphas: Mapping[str, float],
        *,
        r: int,
        lora_alpha: float,
        use_rslora: bool,
    ) -> Self:
        """Divide the budget of the base ranks, those of uniform LoRA, among the layers of `scores`.

        `base_alphas` has the `lora_alpha` of each layer at its base rank; the other arguments are those of the class.
        Raises `ValueError` if the bounds cannot be satisfied; see `allocate_ranks`.
        """
        ranks = allocate_ranks(
            _layer_scores(scores, fim_config),
            base_ranks,
            r_min=fim_config.r_min,
            r_max=fim_config.r_max,
            budget=fim_config.budget,
            score_exponent=fim_config.score_exponent,
            shapes=scores.shapes,
            parameters_per_rank=scores.parameters_per_rank,
            rank_steps=_rank_steps(scores, fim_config),
        )
        alphas = dict(base_alphas)
        if fim_config.adjust_scaling_factors:
            alphas = {
                name: _alpha_with_same_scaling(base_alphas[name], base_ranks[name], rank, use_rslora)
                for name, rank in ranks.items()
            }
        return cls(
            ranks=ranks,
            alphas=alphas,
            scores=scores,
            fim_config=copy.copy(fim_config),
            r=r,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            budget=budget_of(base_ranks, fim_config.budget, scores.parameters_per_rank),
            budget_used=budget_of(ranks, fim_config.budget, scores.parameters_per_rank),
        )

    @property
    def layer_scores(self) -> dict[str, float]:
        """Layer name to what its rank was decided by: a norm or a mean, as `fim_config.score` says."""
        return _layer_scores(self.scores, self.fim_config)

    @property
    def dropped_layers(self) -> list[str]:
        """The layers of rank 0, which get no adapter."""
        return [name for name, rank in self.ranks.items() if rank == 0]

    @property
    def num_batches(self) -> int:
        """Number of calibration batches."""
        return self.scores.num_batches

    @property
    def num_examples(self) -> int:
        """Number of calibration examples."""
        return self.scores.num_examples

    @property
    def num_parameters(self) -> int:
        """Entries of A and B over all layers: `Σ r_i c_i`, with c_i = d_in + d_out for a linear layer.

        Parameters that are trained besides A and B are not counted: biases (`bias`, `lora_bias`), the magnitudes of
        DoRA and other vectors of variants of LoRA, `modules_to_save` and `trainable_token_indices`. QALoRA's A, which
        is narrower by its group size, counts at full width.
        """
        return budget_of(self.ranks, "parameters", self.scores.parameters_per_rank)

    @property
    def budget_unit(self) -> str:
        """Unit of `budget` and `budget_used`, for people to read: `ranks` or `parameters`."""
        return "ranks" if self.fim_config.budget == "rank" else "parameters"

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {
            "ranks": self.ranks,
            "alphas": self.alphas,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "budget": self.budget,
            "budget_used": self.budget_used,
            "fim_config": asdict(self.fim_config),
            "scores": self.scores.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises `KeyError` if an entry is missing, `TypeError` or `AttributeError` if a value has the wrong type,
        `ValueError` if a value is out of its range or layers are missing, and `OverflowError` if an integer is too
        large for a float.
        """
        scores = FimScores.from_dict(content["scores"])
        ranks = {name: require_integer(rank, 0) for name, rank in content["ranks"].items()}
        alphas = {name: integer_if_whole(require_number(alpha)) for name, alpha in content["alphas"].items()}
        if not set(ranks) == set(alphas) == set(scores):
            raise ValueError("ranks, alphas and scores name different layers")
        if not ranks:
            raise ValueError("there are no layers")
        return cls(
            ranks=ranks,
            alphas=alphas,
            scores=scores,
            fim_config=FimConfig(**content["fim_config"]),
            r=require_integer(content["r"], 1),
            lora_alpha=integer_if_whole(require_number(content["lora_alpha"])),
            use_rslora=require_boolean(content["use_rslora"]),
            budget=require_integer(content["budget"], 0),
            budget_used=require_integer(content["budget_used"], 0),
        )

    def save(self, path: str | PathLike[str], **provenance: Any) -> None:
        """Write the allocation as JSON, completely or not at all.

        `provenance` has JSON values to write with it, such as versions or the data used; `load` ignores them.
        Raises `OSError` if the file cannot be written, and `TypeError` or `ValueError` if `provenance` is not JSON.
        """
        header = {"format": "fim_allocation", "schema_version": SCHEMA_VERSION}
        write_json(path, header | {"provenance": provenance} | self.to_dict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises `OSError` if the file cannot be read, and `InvalidFileError` if it is damaged, not an allocation, or
        from a newer version of fim-lora.
        """
        return read_json(path, "fim_allocation", SCHEMA_VERSION, cls.from_dict, "Allocate again.")

    def __str__(self) -> str:
        used = f"{self.budget_used:,} of {self.budget:,} {self.budget_unit}"
        return f"{len(self.ranks)} layers, budget {used}, {self.scores.measured}\n\n{format_grid(self.ranks)}"


def _layer_scores(scores: FimScores, fim_config: FimConfig) -> dict[str, float]:
    return scores.means if fim_config.score == "mean" else scores.norms


def _rank_steps(scores: FimScores, fim_config: FimConfig) -> dict[str, int]:
    """Orthogonal initialization in PEFT accepts only even ranks."""
    step_of_init = 2 if fim_config.init_lora_weights == "orthogonal" else 1
    return {name: math.lcm(step, step_of_init) for name, step in scores.rank_steps.items()}


def _alpha_with_same_scaling(alpha: float, base_rank: int, rank: int, use_rslora: bool) -> float:
    scaled = alpha * math.sqrt(rank / base_rank) if use_rslora else alpha * rank / base_rank
    return alpha if rank == 0 else integer_if_whole(scaled)

"""`RankAllocation`: the ranks, why they are what they are, and the patterns that carry them into PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from peft import LoraConfig

from .allocation import allocate_ranks, budget_of
from .config import FimConfig
from .json_files import InvalidFileError, boolean, integer, number, read_json, write_json
from .layer_grid import format_grid
from .patterns import Value, resolve_pattern, resolver, write_pattern, write_targets
from .scores import FimScores

SCHEMA_VERSION = 1

# Scalings closer than this are one scaling: far above rounding errors, far below what a trained adapter notices.
_SCALING_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RankAllocation:
    """The result: one rank and one `lora_alpha` per layer, and what they came from.

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
    def from_scores(cls, scores: FimScores, config: LoraConfig) -> RankAllocation:
        """Allocate ranks to the layers of `scores` as `config` asks.

        A `rank_pattern` or `alpha_pattern` of the config sets the base rank and base `lora_alpha` of a layer. A
        parameter into which PEFT fuses two targets of the config has twice the global ones, as PEFT has it.

        Args:
            scores: From `get_fim_scores`, for exactly the layers that `config` targets.
            config: A LoRA config; without a `fim_config` the defaults of `FimConfig` hold.

        Returns:
            The allocation.

        Raises:
            ValueError: If the bounds cannot be satisfied; see `allocate_ranks`.
        """
        fim_config = getattr(config, "fim_config", None) or FimConfig()
        base_ranks = _base_values(scores, config.rank_pattern, config.r)
        base_alphas = _base_values(scores, config.alpha_pattern, config.lora_alpha)
        ranks = allocate_ranks(
            scores.means,
            base_ranks,
            r_min=fim_config.r_min,
            r_max=fim_config.r_max,
            budget=fim_config.budget,
            score_exponent=fim_config.score_exponent,
            shapes=scores.shapes,
            parameters_per_rank=scores.parameters_per_rank,
            rank_steps=_rank_steps(scores, fim_config),
        )
        alphas = base_alphas
        if fim_config.adjust_scaling_factors:
            alphas = {
                name: _alpha_with_same_scaling(base_alphas[name], base_ranks[name], rank, config.use_rslora)
                for name, rank in ranks.items()
            }
        return cls(
            ranks=ranks,
            alphas=alphas,
            scores=scores,
            fim_config=copy.copy(fim_config),
            r=config.r,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            budget=budget_of(base_ranks, fim_config.budget, scores.parameters_per_rank),
            budget_used=budget_of(ranks, fim_config.budget, scores.parameters_per_rank),
        )

    @property
    def rank_pattern(self) -> dict[str, int]:
        """`rank_pattern` for PEFT: an entry for each adapted layer whose rank is not the global `r`."""
        return write_pattern(self._kept(self.ranks), self.r)

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """`alpha_pattern` for PEFT: an entry for each adapted layer whose `lora_alpha` is not the global one."""
        return write_pattern(self._kept(self.alphas), self.lora_alpha)

    @property
    def dropped_layers(self) -> list[str]:
        """The layers of rank 0, which get no adapter."""
        return [name for name, rank in self.ranks.items() if rank == 0]

    @property
    def num_batches(self) -> int:
        """Calibration batches."""
        return self.scores.num_batches

    @property
    def num_examples(self) -> int:
        """Calibration examples."""
        return self.scores.num_examples

    @property
    def num_parameters(self) -> int:
        """Entries of A and B over all layers: `Σ r_i c_i`, with c_i = d_in + d_out for a linear layer.

        What is trained beside A and B is not counted: biases (`bias`, `lora_bias`), the magnitudes of DoRA and other
        vectors of variants of LoRA, `modules_to_save` and `trainable_token_indices`. QALoRA's A, which is narrower by
        its group size, counts at full width.
        """
        return budget_of(self.ranks, "parameters", self.scores.parameters_per_rank)

    def to_lora_config(self, base_config: LoraConfig, *, serving: bool = False) -> LoraConfig:
        """The config of an ordinary LoRA adapter with these ranks, for stock PEFT and any trainer.

        If layers lose their adapter, `target_modules` and `target_parameters` name those that keep one. If PEFT
        converts the targets for the model, as it does for modules that transformers 5 has fused, they are those that
        it makes of them.

        Servers such as vLLM and TensorRT-LLM read no patterns. They read `r`, which no rank may exceed, and scale
        every layer by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`. With `serving=True` these
        numbers are right for all layers, and the patterns make it the same adapter for PEFT. Ranks, scalings and
        tensors are the same, so it can also replace the config of a trained adapter:
        `allocation.to_lora_config(model.peft_config["default"], serving=True).save_pretrained(folder)`.

        Args:
            base_config: The config that the scores were allocated with, or that of the adapter made from it; it is
                not changed.
            serving: Whether the global `r` is the largest rank, and the global `lora_alpha` the one that gives
                every layer its scaling. Otherwise both are those of `base_config`.

        Returns:
            A copy without any trace of `"fim"`, with `rank_pattern` and `alpha_pattern`.

        Raises:
            ValueError: If `base_config` has another `r`, `lora_alpha` or `use_rslora` than the allocation, which
                would give other ranks or scalings than the ones decided; if no layer keeps an adapter; if a layer
                that keeps its adapter cannot be told from one that loses it; if `serving` is asked for
                and the layers do not share one scaling, or the initialisation changed the base weights; or if
                directions are to come from EVA, which needs the model.
        """
        for field in ("r", "lora_alpha", "use_rslora"):
            if getattr(base_config, field) != getattr(self, field):
                raise ValueError(
                    f"base_config has {field}={getattr(base_config, field)!r}, but the ranks were allocated with "
                    f"{field}={getattr(self, field)!r}: pass the same config, or allocate again."
                )
        config = copy.deepcopy(base_config)
        if config.init_lora_weights == "fim":
            config.init_lora_weights = self._initialisation()
        if serving and str(config.init_lora_weights).startswith(("pissa", "olora")):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} takes the adapter out of the base weights, which a "
                "server does not do: convert it with save_pretrained(..., path_initial_model_for_weight_conversion="
                "...) of PEFT, or merge it."
            )
        if getattr(config, "fim_config", None) is not None:
            config.fim_config = None
        if serving:
            config.r, config.lora_alpha = self._global_rank_and_alpha()
        config.rank_pattern = write_pattern(self._kept(self.ranks), config.r)
        config.alpha_pattern = write_pattern(self._kept(self.alphas), config.lora_alpha)
        self._write_targets(config)
        return config

    def _write_targets(self, config: LoraConfig) -> None:
        converted = self.scores.converted_targets
        if converted is not None:
            converted.write(config)
        if not self.dropped_layers:
            return
        write_targets(config, list(self._kept(self.ranks)), self.dropped_layers)
        if converted is not None and isinstance(config.target_modules, str):
            raise ValueError(
                f"Layer {self.dropped_layers[0]!r} should lose its adapter, and only a regular expression can say so "
                "here, of which PEFT takes the last parts of the names that it matches for this model: set r_min=1."
            )

    def _initialisation(self) -> bool | str:
        if self.fim_config.init_lora_weights == "eva":
            raise ValueError(
                "Directions from EVA are in no config: let `initialize_lora_fim_ranks` initialise the adapter, or "
                "choose another init_lora_weights."
            )
        return self.fim_config.init_lora_weights

    def _kept(self, values: Mapping[str, Value]) -> dict[str, Value]:
        return {name: value for name, value in values.items() if self.ranks[name] > 0}

    def _global_rank_and_alpha(self) -> tuple[int, float]:
        """`r` and `lora_alpha` of a layer of the largest rank, if their scaling is that of every layer."""
        kept = self._kept(self.ranks)
        largest = max(kept, key=lambda name: kept[name], default=None)
        if largest is None:
            raise ValueError("No layer keeps an adapter: there is nothing to serve.")
        shared = self._scaling(largest)
        for name in kept:
            scaling = self._scaling(name)
            if not math.isclose(scaling, shared, rel_tol=_SCALING_TOLERANCE):
                raise ValueError(
                    f"Layer {largest!r} has scaling {shared:.6g}, layer {name!r} has {scaling:.6g}, but a server "
                    "knows one scaling for all layers: allocate with adjust_scaling_factors=True and without "
                    "rank_pattern and alpha_pattern in the base config."
                )
        return self.ranks[largest], self.alphas[largest]

    def _scaling(self, name: str) -> float:
        rank = self.ranks[name]
        return self.alphas[name] / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
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
    def from_dict(cls, content: Mapping[str, Any]) -> RankAllocation:
        """The inverse of `to_dict`.

        Args:
            content: What `to_dict` returned.

        Returns:
            The allocation.

        Raises:
            KeyError: If something is missing.
            TypeError: If something has the wrong type.
            ValueError: If a value is out of its range, or layers are missing.
        """
        scores = FimScores.from_dict(content["scores"])
        ranks = {name: integer(rank, 0) for name, rank in content["ranks"].items()}
        alphas = {name: _integer_if_whole(number(alpha)) for name, alpha in content["alphas"].items()}
        if not set(ranks) == set(alphas) == set(scores):
            raise ValueError("ranks, alphas and scores name different layers")
        if not ranks:
            raise ValueError("there are no layers")
        return cls(
            ranks=ranks,
            alphas=alphas,
            scores=scores,
            fim_config=FimConfig(**content["fim_config"]),
            r=integer(content["r"], 1),
            lora_alpha=_integer_if_whole(number(content["lora_alpha"])),
            use_rslora=boolean(content["use_rslora"]),
            budget=integer(content["budget"], 0),
            budget_used=integer(content["budget_used"], 0),
        )

    def save(self, path: str | PathLike[str], **provenance: Any) -> None:
        """Write the allocation as JSON, completely or not at all.

        Args:
            path: The file.
            provenance: JSON values to write beside it, such as versions or the data used; `load` ignores them.

        Raises:
            OSError: If the file cannot be written.
        """
        header = {"format": "fim_allocation", "schema_version": SCHEMA_VERSION}
        write_json(path, header | {"provenance": provenance} | self.to_dict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RankAllocation:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The allocation.

        Raises:
            OSError: If the file cannot be read.
            InvalidFileError: If it is not an allocation, or one of a newer version of fim-lora.
        """
        content = read_json(path, "fim_allocation", SCHEMA_VERSION)
        try:
            return cls.from_dict(content)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise InvalidFileError(f"{path} is damaged: {error!r}. Allocate again.") from error

    def __str__(self) -> str:
        unit = "ranks" if self.fim_config.budget == "rank" else "parameters"
        heading = (
            f"{len(self.ranks)} layers, budget {self.budget_used:,} of {self.budget:,} {unit}, {self.scores.measured}"
        )
        return f"{heading}\n\n{format_grid(self.ranks)}"


def verify_patterns(config: LoraConfig, allocation: RankAllocation) -> None:
    """Resolve every adapted layer through PEFT's own matching; refuse if one gets another value than was meant.

    Args:
        config: The config with the patterns written.
        allocation: What was meant.

    Raises:
        RuntimeError: If a pattern resolves to another value. It names the layer.
    """
    checks = (
        ("rank_pattern", resolver(config.rank_pattern, config.r), allocation.ranks),
        ("alpha_pattern", resolver(config.alpha_pattern, config.lora_alpha), allocation.alphas),
    )
    # Layer by layer, because both patterns have mostly the same keys, and Python keeps the last compiled ones.
    for name in (name for name, rank in allocation.ranks.items() if rank > 0):
        for attribute, value_of, meant in checks:
            if (value := value_of(name)) != meant[name]:
                raise RuntimeError(
                    f"PEFT would give layer {name!r} the value {value!r} of {attribute}, not {meant[name]!r}. "
                    "Please report this together with the names of the model's layers."
                )


def _base_values(scores: FimScores, pattern: Mapping[str, Value] | None, default: Value) -> dict[str, Value]:
    """What PEFT would give every layer."""
    if scores.converted_targets is not None:
        pattern = scores.converted_targets.extended(pattern, default)
    return resolve_pattern(pattern, scores, default)


def _rank_steps(scores: FimScores, fim_config: FimConfig) -> dict[str, int]:
    """Orthogonal initialisation in PEFT takes only even ranks."""
    least = 2 if fim_config.init_lora_weights == "orthogonal" else 1
    return {name: math.lcm(step, least) for name, step in scores.rank_steps.items()}


def _alpha_with_same_scaling(alpha: float, base_rank: int, rank: int, use_rslora: bool) -> float:
    if rank == 0:
        return alpha
    ratio = rank / base_rank
    if use_rslora:
        return _integer_if_whole(alpha * math.sqrt(ratio))
    return _integer_if_whole(alpha * rank / base_rank)


def _integer_if_whole(value: float) -> float:
    """PEFT documents `lora_alpha` as an integer, and some readers of the config insist on it."""
    return int(value) if float(value).is_integer() else value

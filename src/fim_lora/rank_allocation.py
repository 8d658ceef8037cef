"""`RankAllocation`: from scores and a `LoraConfig` to ranks, and from ranks to the config of an ordinary adapter."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from peft import LoraConfig

from .adapter.config_writer import config_with_ranks
from .adapter.patterns import base_values, write_pattern
from .config import FimConfig
from .fisher.scores import FimScores
from .ranks.allocation import Allocation
from .report.html import html_allocation
from .report.matplotlib_extra import plot_ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RankAllocation(Allocation):
    """An `Allocation` with PEFT's `rank_pattern` and `alpha_pattern`, and its conversion to a `LoraConfig`.

    Attributes and files are those of `Allocation`. Notebooks show it as a table of ranks, and `plot` draws it.
    """

    @classmethod
    def from_scores(cls, scores: FimScores, config: LoraConfig) -> RankAllocation:
        """Allocate ranks to the layers of `scores` by the `fim_config` of `config`.

        A `rank_pattern` or `alpha_pattern` of the config sets the base rank and base `lora_alpha` of a layer. A
        parameter into which PEFT fuses two targets of the config has twice the global values, as in PEFT.

        Args:
            scores: From `get_fim_scores`, for exactly the layers that `config` targets.
            config: A LoRA config. Without a `fim_config`, the defaults of `FimConfig` apply.

        Returns:
            The allocation.

        Raises:
            ValueError: If the bounds cannot be satisfied; see `allocate_ranks`.
        """
        converted = scores.converted_targets
        return cls.allocate(
            scores,
            getattr(config, "fim_config", None) or FimConfig(),
            base_values(config.rank_pattern, scores, config.r, converted),
            base_values(config.alpha_pattern, scores, config.lora_alpha, converted),
            r=config.r,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
        )

    @property
    def rank_pattern(self) -> dict[str, int]:
        """`rank_pattern` for PEFT: an entry for each adapted layer whose rank is not the global `r`."""
        return write_pattern({name: rank for name, rank in self.ranks.items() if rank > 0}, self.r)

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """`alpha_pattern` for PEFT: an entry for each adapted layer whose `lora_alpha` is not the global one."""
        alphas = {name: self.alphas[name] for name, rank in self.ranks.items() if rank > 0}
        return write_pattern(alphas, self.lora_alpha)

    def to_lora_config(self, base_config: LoraConfig, *, serving: bool = False) -> LoraConfig:
        """The config of an ordinary LoRA adapter with these ranks, for stock PEFT and any trainer.

        If layers lose their adapter, `target_modules` and `target_parameters` name those that keep one. If PEFT
        converts the targets for the model, as it does for modules that transformers 5 has fused, the config has the
        converted ones.

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
            A copy without `fim_config`, with PEFT's own initialization, `rank_pattern` and `alpha_pattern`.

        Raises:
            ValueError: If `base_config` has another `r`, `lora_alpha` or `use_rslora` than the allocation, which
                would give other ranks or scalings; if no layer keeps an adapter; if a layer that keeps its adapter
                cannot be distinguished from one that loses it; if `serving` is true and the layers do not share
                one scaling, or the initialization changes the base weights; or if directions come from EVA, which
                needs the model.
            RuntimeError: If PEFT's matching of the patterns gives a layer another value than the allocated one.
        """
        for field in ("r", "lora_alpha", "use_rslora"):
            if getattr(base_config, field) != getattr(self, field):
                raise ValueError(
                    f"base_config has {field}={getattr(base_config, field)!r}, but the ranks were allocated with "
                    f"{field}={getattr(self, field)!r}: pass the same config, or allocate again."
                )
        config = copy.copy(base_config)
        if config.init_lora_weights == "fim":
            if self.fim_config.init_lora_weights == "eva":
                raise ValueError(
                    "No config can hold directions from EVA: let `initialize_lora_fim_ranks` initialize the adapter, "
                    "or choose another init_lora_weights."
                )
            config.init_lora_weights = self.fim_config.init_lora_weights
        if getattr(config, "fim_config", None) is not None:
            config.fim_config = None
        converted = self.scores.converted_targets
        return config_with_ranks(config, self.ranks, self.alphas, converted_targets=converted, serving=serving)

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw the rank of every layer as a map. Notebooks show the result.

        Args:
            path: Where to write the picture, too. Its suffix, such as `.png` or `.svg`, determines the format.

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is not installed.
            OSError: If the file cannot be written.
            ValueError: If the table of layers is too large, or the suffix is not a known format.
        """
        return plot_ranks(self, path)

    def _repr_html_(self) -> str:
        return html_allocation(self)

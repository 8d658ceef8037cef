"""Ranks and alphas, as plain dictionaries, into a `LoraConfig`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

from peft import LoraConfig

from ..config import changes_base_weight
from ..fisher.converted_targets import ConvertedTargets
from .converted_targets import write_converted_targets
from .patterns import resolver, write_pattern
from .target_modules import write_targets

# Scalings closer than this count as one scaling: far above rounding errors, far below what matters to an adapter.
_SCALING_TOLERANCE = 1e-6


def config_with_ranks(
    base_config: LoraConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    converted_targets: ConvertedTargets | None = None,
    serving: bool = False,
) -> LoraConfig:
    """A copy of a config in which every layer has its rank and `lora_alpha`, verified by PEFT's own matching.

    Args:
        base_config: A config without `"fim"`, whose targets match exactly the layers of `ranks`.
        ranks: Layer name, as in the base model, to rank. A layer of rank 0 disappears from the targets.
        alphas: Layer name to `lora_alpha`.
        converted_targets: What PEFT makes of the targets for the model, if it converts them.
        serving: Whether the global `r` and `lora_alpha` have to be right for every layer: the largest rank, and the
            `lora_alpha` that gives every layer its scaling.

    Returns:
        The config, with `rank_pattern` and `alpha_pattern`.

    Raises:
        ValueError: If no layer keeps an adapter; if the targets cannot separate the layers that keep one; or if
            `serving` is asked for, and the layers do not share one scaling or the initialization changes base weights.
        RuntimeError: If PEFT's matching gives a layer another value than the requested one.
    """
    kept = {name: rank for name, rank in ranks.items() if rank > 0}
    kept_alphas = {name: alphas[name] for name in kept}
    removed = [name for name, rank in ranks.items() if rank == 0]
    config = copy.deepcopy(base_config)
    if serving:
        _require_unchanged_base(config)
        config.r, config.lora_alpha = _global_rank_and_alpha(kept, kept_alphas, config.use_rslora)
    config.rank_pattern = write_pattern(kept, config.r)
    config.alpha_pattern = write_pattern(kept_alphas, config.lora_alpha)
    if converted_targets is not None:
        write_converted_targets(converted_targets, config)
    if removed:
        write_targets(config, list(kept), removed)
        if converted_targets is not None and isinstance(config.target_modules, str):
            raise ValueError(
                f"Layer {removed[0]!r} should lose its adapter, which only a regular expression could express here, "
                "and PEFT uses the last parts of the names that it matches for this model: set r_min=1."
            )
    verify_patterns(config, ranks, alphas)
    return config


def _require_unchanged_base(config: LoraConfig) -> None:
    if changes_base_weight(config.init_lora_weights):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} takes the adapter out of the base weights, which a "
            "server does not do: convert the adapter with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) of PEFT, or merge it."
        )


def _global_rank_and_alpha(
    ranks: Mapping[str, int], alphas: Mapping[str, float], use_rslora: bool
) -> tuple[int, float]:
    """`r` and `lora_alpha` of a layer of the largest rank, if their scaling is that of every layer."""
    largest = max(ranks, key=lambda name: ranks[name], default=None)
    if largest is None:
        raise ValueError("No layer keeps an adapter: there is nothing to serve.")
    scalings = {name: alphas[name] / (math.sqrt(rank) if use_rslora else rank) for name, rank in ranks.items()}
    for name, scaling in scalings.items():
        if not math.isclose(scaling, scalings[largest], rel_tol=_SCALING_TOLERANCE):
            raise ValueError(
                f"Layer {largest!r} has scaling {scalings[largest]:.6g}, layer {name!r} has {scaling:.6g}, but a "
                "server knows one scaling for all layers: allocate with adjust_scaling_factors=True and without "
                "rank_pattern and alpha_pattern in the base config."
            )
    return ranks[largest], alphas[largest]


def verify_patterns(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    """Resolve every layer that keeps an adapter through PEFT's own matching, because keys are regular expressions.

    Raises:
        RuntimeError: If a pattern resolves to another value than the requested one. It names the layer.
    """
    checks = (
        ("rank_pattern", resolver(config.rank_pattern, config.r), ranks),
        ("alpha_pattern", resolver(config.alpha_pattern, config.lora_alpha), alphas),
    )
    # Layer by layer, because both patterns have mostly the same keys, and Python caches the last compiled ones.
    for name in (name for name, rank in ranks.items() if rank > 0):
        for attribute, value_of, requested in checks:
            if (value := value_of(name)) != requested[name]:
                raise RuntimeError(
                    f"PEFT would give layer {name!r} the value {value!r} of {attribute}, not {requested[name]!r}. "
                    "Please report this together with the names of the model's layers."
                )

"""Write ranks and alphas, which are plain dictionaries, into a `LoraConfig`."""

import copy
from collections.abc import Mapping

from peft import LoraConfig

from ..config import changes_base_weight, unequal_scalings
from ..fisher.converted_targets import ConvertedTargets
from .patterns import resolver, write_pattern
from .target_modules import write_targets


def config_with_ranks(
    base_config: LoraConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    converted_targets: ConvertedTargets | None = None,
    serving: bool = False,
) -> LoraConfig:
    """A copy of a config in which every layer has its rank and `lora_alpha`, verified by PEFT's own matching.

    The targets of `base_config`, which is without `"fim"`, match exactly the layers of `ranks`. A layer of rank 0
    disappears from the targets. With `serving`, the global `r` and `lora_alpha` are right for every layer: the largest
    rank, and the `lora_alpha` that gives every layer its scaling.

    Raises:
        ValueError: If no layer keeps an adapter; if the targets cannot separate the layers that keep one; or if
            `serving` is true, and the layers do not share one scaling or the initialization changes base weights.
        RuntimeError: If PEFT's matching gives a layer another value than the requested one.
    """
    kept = {name: rank for name, rank in ranks.items() if rank > 0}
    kept_alphas = {name: alphas[name] for name in kept}
    removed = [name for name, rank in ranks.items() if rank == 0]
    config = copy.deepcopy(base_config)
    if serving:
        config.r, config.lora_alpha = _serving_values(config, kept, kept_alphas)
    config.rank_pattern = write_pattern(kept, config.r)
    config.alpha_pattern = write_pattern(kept_alphas, config.lora_alpha)
    if converted_targets is not None:
        # PEFT finds nothing to convert in these.
        config.target_modules = set(converted_targets.target_modules)
        config.target_parameters = sorted(converted_targets.target_parameters)
    if removed:
        write_targets(config, list(kept), removed)
        if converted_targets is not None and isinstance(config.target_modules, str):
            raise ValueError(
                f"Layer {removed[0]!r} should lose its adapter, but only a regular expression could exclude it, and "
                "PEFT replaces the expression by the last parts of the names for this model: set r_min=1."
            )
    verify_patterns(config, ranks, alphas)
    return config


def verify_patterns(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    """Resolve every layer that keeps an adapter through PEFT's own matching, because keys are regular expressions.

    Raises `RuntimeError`, which names the layer, if a pattern resolves to another value than the requested one.
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


def _serving_values(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> tuple[int, float]:
    """`r` and `lora_alpha` of a layer of the largest rank, if their scaling is that of every layer."""
    if changes_base_weight(config.init_lora_weights):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, which a server does not do: "
            "convert the adapter with save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT, or "
            "merge it."
        )
    if not ranks:
        raise ValueError("No layer keeps an adapter, so there is nothing to serve: raise r_min.")
    largest = max(ranks, key=lambda name: ranks[name])
    if unequal := unequal_scalings(ranks, alphas, config.use_rslora):
        (first, scaling), (other, other_scaling) = unequal
        raise ValueError(
            f"Layer {first!r} has scaling {scaling:.6g}, layer {other!r} has {other_scaling:.6g}, but a server "
            "applies one scaling to all layers: allocate with adjust_scaling_factors=True and without rank_pattern "
            "and alpha_pattern in the base config."
        )
    return ranks[largest], alphas[largest]

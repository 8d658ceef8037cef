"""Targets that PEFT converts, for models whose modules transformers has fused.

From transformers 5 on, the experts of Mixtral, Qwen3-MoE and others are stacked parameters. When PEFT creates an
adapter for such a model, it replaces the former names, such as `w1`, `w2` and `w3`, by those of the parameters, in the
config itself. A parameter that two of them were fused into gets twice the rank and twice the `lora_alpha`. Scores of a
plain model carry this as `ConvertedTargets`, because for them PEFT converts only a copy of the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from peft import LoraConfig

from ..fisher.converted_targets import ConvertedTargets
from .patterns import Value, resolve_pattern
from .target_modules import is_expression


def compare_targets(before: LoraConfig, after: LoraConfig, names: Iterable[str]) -> ConvertedTargets | None:
    """Compare a config from before and after PEFT created an adapter with it.

    Args:
        before: The config before.
        after: The config after.
        names: Names, as in the base model, of the layers that the adapter targets.

    Returns:
        What was converted; `None` if nothing was, and PEFT has at most filled in names of modules.
    """
    # Configs written by older versions of PEFT do not have `target_parameters`.
    old, new = (frozenset(getattr(config, "target_parameters", None) or ()) for config in (before, after))
    resolved = is_expression(before.target_modules) and not isinstance(after.target_modules, str)
    if old == new and not resolved:
        return None
    own = before.rank_pattern or {}
    added = {key: rank for key, rank in (after.rank_pattern or {}).items() if key not in own}
    ranks = resolve_pattern(added, names, before.r)
    fused = {name: rank // before.r for name, rank in ranks.items() if rank != before.r}
    return ConvertedTargets(frozenset(after.target_modules or ()), new, fused)


def base_values(
    converted: ConvertedTargets | None, pattern: Mapping[str, Value] | None, names: Iterable[str], default: Value
) -> dict[str, Value]:
    """The rank or `lora_alpha` that PEFT would give every layer, from a pattern and the global value of a config."""
    if converted is None:
        return resolve_pattern(pattern, names, default)
    # The entries that PEFT adds, after those of the config.
    extended = dict(pattern or {})
    for name, number in converted.fused.items():
        extended.setdefault(f"^{re.escape(name)}", default * number)
    return resolve_pattern(extended, names, default)


def write_converted_targets(converted: ConvertedTargets, config: LoraConfig) -> None:
    """Write the targets into a config, in place, so that PEFT finds nothing to convert in it."""
    config.target_modules = set(converted.target_modules)
    config.target_parameters = sorted(converted.target_parameters)

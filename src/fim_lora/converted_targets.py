"""`ConvertedTargets`: the targets of a config as PEFT reads them for a model whose modules were fused.

From transformers 5 on, the experts of Mixtral, Qwen3-MoE and others are stacked parameters. When PEFT creates an
adapter for such a model, it turns the names of what they were before, such as `w1`, `w2` and `w3`, into those of the
parameters, in the config itself. A parameter that two of them were fused into gets twice the rank and twice the
`lora_alpha`. Scores of a plain model remember that, because for them PEFT converts only a copy of the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from .json_files import integer, layer_name
from .patterns import Value, is_expression, resolve_pattern


@dataclass(frozen=True)
class ConvertedTargets:
    """What PEFT made of the targets of a config.

    Attributes:
        target_modules: The `target_modules` that the config has then.
        target_parameters: The `target_parameters` that it has then.
        fused: Layer name, as in the base model, to the number of targets that were fused into it, where it is more
            than one.
    """

    target_modules: frozenset[str]
    target_parameters: frozenset[str]
    fused: Mapping[str, int]

    @classmethod
    def between(cls, before: LoraConfig, after: LoraConfig, names: Iterable[str]) -> ConvertedTargets | None:
        """Compare a config with what it was before PEFT created an adapter with it.

        Args:
            before: The config before.
            after: The config after.
            names: Names, as in the base model, of the layers that the adapter targets.

        Returns:
            What was converted; `None` if nothing was, and PEFT has at most filled in names of modules.
        """
        # `target_parameters` is unknown to configs written by older versions of PEFT.
        old, new = (frozenset(getattr(config, "target_parameters", None) or ()) for config in (before, after))
        resolved = is_expression(before.target_modules) and not isinstance(after.target_modules, str)
        if old == new and not resolved:
            return None
        own = before.rank_pattern or {}
        added = {key: rank for key, rank in (after.rank_pattern or {}).items() if key not in own}
        ranks = resolve_pattern(added, names, before.r)
        fused = {name: rank // before.r for name, rank in ranks.items() if rank != before.r}
        return cls(frozenset(after.target_modules or ()), new, fused)

    def extended(self, pattern: Mapping[str, Value] | None, default: Value) -> dict[str, Value]:
        """A pattern with the entries that PEFT adds to it, behind those that are there.

        Args:
            pattern: The `rank_pattern` or `alpha_pattern` of a config.
            default: The global value of the config.

        Returns:
            The pattern.
        """
        extended = dict(pattern or {})
        for name, number in self.fused.items():
            extended.setdefault(f"^{re.escape(name)}", default * number)
        return extended

    def write(self, config: LoraConfig) -> None:
        """Put the targets into a config, so that PEFT finds nothing to convert in it.

        Args:
            config: The config, which is changed.
        """
        config.target_modules = set(self.target_modules)
        config.target_parameters = sorted(self.target_parameters)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return {
            "target_modules": sorted(self.target_modules),
            "target_parameters": sorted(self.target_parameters),
            "fused": dict(self.fused),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ConvertedTargets:
        """The inverse of `to_dict`.

        Args:
            content: What `to_dict` returned.

        Returns:
            The targets.

        Raises:
            KeyError: If something is missing.
            TypeError: If something has the wrong type.
            ValueError: If a value is out of its range.
        """
        return cls(
            _names(content["target_modules"]),
            _names(content["target_parameters"]),
            {layer_name(name): integer(number, 2) for name, number in content["fused"].items()},
        )


def _names(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is no list of names")
    return frozenset(map(layer_name, value))

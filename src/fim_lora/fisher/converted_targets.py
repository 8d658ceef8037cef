"""`ConvertedTargets`: the targets of a config after PEFT converted them for a model with fused modules.

From transformers 5 on, the experts of Mixtral, Qwen3-MoE and others are stacked parameters. When PEFT creates an
adapter for such a model, it replaces the former names in the config, such as `w1`, `w2` and `w3`, by those of the
parameters. A parameter that combines two of the former modules gets twice the rank and twice the `lora_alpha`. Scores
of a plain model store the conversion, because PEFT then converts only a copy of the config. The class is in `fisher`
because `FimScores` stores it; only `adapter` creates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime.checked_json import require_integer, require_layer_name


@dataclass(frozen=True)
class ConvertedTargets:
    """`target_modules` and `target_parameters` of the converted config.

    `fused` maps the layers into which more than one target was fused, by their names in the base model, to the number
    of these targets.
    """

    target_modules: frozenset[str]
    target_parameters: frozenset[str]
    fused: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {
            "target_modules": sorted(self.target_modules),
            "target_parameters": sorted(self.target_parameters),
            "fused": dict(self.fused),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ConvertedTargets:
        """The inverse of `to_dict`. Missing or invalid fields raise the exceptions that `read_json` catches."""
        return cls(
            _names(content["target_modules"]),
            _names(content["target_parameters"]),
            {require_layer_name(name): require_integer(number, 2) for name, number in content["fused"].items()},
        )


def _names(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} is not a list of names")
    return frozenset(map(require_layer_name, value))

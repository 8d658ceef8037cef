"""Convert an allocation or a compression to text, for tools that read files.

A new format is one function from one of them and a config to text, and its entry in `_EXPORTERS`.
"""

import copy
import csv
import io
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from peft.utils import CONFIG_NAME

from ..ranks.compressed import Compression
from .rank_facts import Result

# A spreadsheet evaluates a cell that starts with one of these as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@")

# axolotl's names for the fields of PEFT's config that it passes on unchanged.
_AXOLOTL_KEYS = {
    "ensure_weight_tying": "peft_ensure_weight_tying",
    "fan_in_fan_out": "lora_fan_in_fan_out",
    "init_lora_weights": "peft_init_lora_weights",
    "layer_replication": "peft_layer_replication",
    "lora_dropout": "lora_dropout",
    "modules_to_save": "lora_modules_to_save",
    "target_parameters": "lora_target_parameters",
    "trainable_token_indices": "peft_trainable_token_indices",
    "use_dora": "peft_use_dora",
    "use_rslora": "peft_use_rslora",
}

_RANK_FIELDS = {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}

# Conditions on a layer besides `target_modules`; axolotl has no key for `exclude_modules`.
_NARROWING_FIELDS = {"exclude_modules", "layers_to_transform", "layers_pattern"}

# Set by axolotl itself, from the model or when it saves.
_DESCRIPTIVE_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}

# Longer than any layer name, so that no name is broken across lines.
_YAML_WIDTH = 10_000


def export(result: Result, config: LoraConfig, file_format: str) -> str:
    """Write an allocation or a compression in the format of another tool.

    Args:
        result: The allocation or compression.
        config: The result of `allocation.to_lora_config`, or the config of the compressed adapter; it is not changed.
        file_format: One of `FORMATS`: `"csv"`, a table of layers; `"axolotl"`, the LoRA part of axolotl's training
            config, as YAML; `"peft"`, PEFT's `adapter_config.json`.

    Returns:
        The text, with a newline at the end.

    Raises:
        ValueError: If the format is unknown, if it has no field for something in the config, or if a spreadsheet
            would evaluate a layer name in the table as a formula.
    """
    if file_format not in _EXPORTERS:
        raise ValueError(f"Unknown export format {file_format!r}: choose one of {', '.join(FORMATS)}.")
    return _EXPORTERS[file_format](result, config)


def _csv(result: Result, config: LoraConfig) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    of_scores = ["norm", "mean_efim", "standard_error"]
    others = ["rank_before", "parameters"] if isinstance(result, Compression) else of_scores
    writer.writerow(["layer", *others, "rank"])
    for name, rank in result.ranks.items():
        if name.startswith(_FORMULA_STARTS):
            raise ValueError(
                f"A spreadsheet would evaluate the layer name {name!r} as a formula: export to another format."
            )
        # None becomes an empty field.
        writer.writerow([name, *_values(result, name), rank])
    return text.getvalue()


def _values(result: Result, name: str) -> tuple[float | None, ...]:
    """The columns of the table between the name and the rank of a layer."""
    if isinstance(result, Compression):
        return result.ranks_before[name], result.ranks[name] * result.parameters_per_rank[name]
    score = result.scores[name]
    return score.norm, score.mean, score.standard_error


def _peft(result: Result, config: LoraConfig) -> str:
    config = copy.copy(config)
    for field, value in vars(config).items():
        if isinstance(value, set):
            # PEFT would write a set in an order that changes from process to process.
            setattr(config, field, sorted(value))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / CONFIG_NAME).read_text(encoding="utf-8") + "\n"


def _axolotl(result: Result, config: LoraConfig) -> str:
    """The LoRA part of a training config, by the schema and the adapter loader of axolotl 0.21.0.

    axolotl has had `lora_rank_pattern` and `lora_alpha_pattern` since 0.18.0. All ranks and alphas in them must be
    integers.
    """
    deviations = _deviations(config)
    content: dict[str, Any] = {
        "adapter": "lora",
        "lora_r": config.r,
        "lora_alpha": _integer_alpha(config.lora_alpha, "lora_alpha"),
    }
    is_narrowed = bool(_NARROWING_FIELDS & deviations.keys())
    content |= _axolotl_targets(result, config, is_narrowed) | _axolotl_options(deviations)
    if config.rank_pattern:
        content["lora_rank_pattern"] = dict(config.rank_pattern)
    if config.alpha_pattern:
        content["lora_alpha_pattern"] = {
            key: _integer_alpha(alpha, f"alpha_pattern[{key!r}]") for key, alpha in config.alpha_pattern.items()
        }
    return yaml.safe_dump(content, sort_keys=False, width=_YAML_WIDTH)


def _axolotl_targets(result: Result, config: LoraConfig, is_narrowed: bool) -> dict[str, Any]:
    if config.target_modules is None and config.target_parameters and not is_narrowed:
        return {}
    if config.target_modules is None or is_narrowed:
        names = [re.escape(name) for name, rank in result.ranks.items() if rank > 0]
        # A list would also match excluded modules whose names end like one of these.
        return {"lora_target_modules": f"(?:{'|'.join(names)})"}
    targets = config.target_modules
    return {"lora_target_modules": targets if isinstance(targets, str) else sorted(targets)}


def _axolotl_options(deviations: dict[str, Any]) -> dict[str, Any]:
    handled_elsewhere = _RANK_FIELDS | _NARROWING_FIELDS | _DESCRIPTIVE_FIELDS | {"target_modules"}
    options = {}
    for field in sorted(deviations.keys() - handled_elsewhere):
        value = deviations[field]
        # axolotl passes on only true values.
        if field not in _AXOLOTL_KEYS or not value:
            raise ValueError(
                f"axolotl's config has no field for {field}={value!r} of the LoRA config: export to another format, "
                f"or allocate with a config without {field}."
            )
        # JSON has neither sets nor tuples, so both become lists.
        options[_AXOLOTL_KEYS[field]] = json.loads(json.dumps(value, default=sorted))
    return options


def _deviations(config: LoraConfig) -> dict[str, Any]:
    """The fields that differ from PEFT's defaults."""
    default = LoraConfig()
    values = {field: getattr(config, field) for field in config.__dataclass_fields__}
    return {
        field: value
        for field, value in values.items()
        if value not in (None, [], {}, set()) and value != getattr(default, field, None)
    }


def _integer_alpha(alpha: float, place: str) -> int:
    if not float(alpha).is_integer():
        raise ValueError(
            f"axolotl takes only integers as alphas, but {place} is {alpha!r}: allocate without rsLoRA and with a "
            "lora_alpha that is a multiple of r, or export to another format."
        )
    return int(alpha)


_EXPORTERS: dict[str, Callable[[Result, LoraConfig], str]] = {"csv": _csv, "axolotl": _axolotl, "peft": _peft}

FORMATS = tuple(_EXPORTERS)

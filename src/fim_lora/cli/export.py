"""`fim-lora export`: from the folder of an allocation to a file for another tool."""

import copy
from pathlib import Path

from peft import LoraConfig

from ..rank_allocation import RankAllocation
from ..ranks.allocation import ALLOCATION_FILE
from ..report.exports import export
from .errors import CommandError
from .output import ADAPTER_CONFIG, read_allocation

_RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def export_folder(folder: Path, file_format: str, serving: bool) -> str:
    """Read the output folder of `fim-lora allocate` and return its allocation in one of the formats of `export`."""
    allocation = read_allocation(folder)
    config = _base_config(folder, allocation)
    return export(allocation, allocation.to_lora_config(config, serving=serving), file_format)


def _base_config(folder: Path, allocation: RankAllocation) -> LoraConfig:
    """The config that the ranks were allocated with, except for its patterns."""
    written = _read_adapter_config(folder)
    if written.use_rslora != allocation.use_rslora:
        raise _mismatch(folder)
    config = copy.copy(written)
    # A config for servers has a different r and lora_alpha.
    config.r, config.lora_alpha = allocation.r, allocation.lora_alpha
    serving = (written.r, written.lora_alpha) != (allocation.r, allocation.lora_alpha)
    # Patterns are compared as text: matching the regular expressions of an untrusted file may never end.
    expected = allocation.to_lora_config(config, serving=serving)
    if any(getattr(written, field) != getattr(expected, field) for field in _RANK_FIELDS):
        raise _mismatch(folder)
    return config


def _read_adapter_config(folder: Path) -> LoraConfig:
    path = folder / ADAPTER_CONFIG
    # PEFT would look for a missing file on the Hub.
    if not path.is_file():
        raise CommandError(f"{path}: no such file. Run fim-lora allocate again to write it.")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CommandError(f"{path} cannot be read: {error}. Run fim-lora allocate again.") from error
    if not isinstance(config, LoraConfig):
        raise CommandError(f"{path} is not a LoRA config but {type(config).__name__}. Run fim-lora allocate again.")
    return config


def _mismatch(folder: Path) -> CommandError:
    return CommandError(
        f"{folder / ADAPTER_CONFIG} has other ranks or scalings than {folder / ALLOCATION_FILE}. "
        "Run fim-lora allocate again."
    )

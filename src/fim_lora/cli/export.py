"""`fim-lora export`: from the folder of an allocation to a file for another tool."""

from __future__ import annotations

import copy
from pathlib import Path

from peft import LoraConfig

from ..exports import export
from ..rank_allocation import RankAllocation, verify_patterns
from .errors import CommandError
from .output import ADAPTER_CONFIG, ALLOCATION, read_allocation

_RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def export_folder(folder: Path, file_format: str, serving: bool) -> str:
    """Read what `fim-lora allocate` wrote, and say it in another format.

    Args:
        folder: The folder.
        file_format: One of `fim_lora.exports.FORMATS`.
        serving: Whether `r` and `lora_alpha` shall be those for servers; see `RankAllocation.to_lora_config`.

    Returns:
        The text.

    Raises:
        CommandError: If there is no allocation or no adapter config, or the config cannot be read or does not belong
            to the allocation.
        OSError: If the allocation cannot be read.
        ValueError: If the allocation is damaged, has no config for servers, or cannot be said in the format.
    """
    allocation = read_allocation(folder)
    config = _base_config(folder, allocation)
    new_config = allocation.to_lora_config(config, serving=serving)
    verify_patterns(new_config, allocation)
    return export(allocation, new_config, file_format)


def _base_config(folder: Path, allocation: RankAllocation) -> LoraConfig:
    """The config that the ranks were allocated with, but for its patterns."""
    written = _read_adapter_config(folder)
    if written.use_rslora != allocation.use_rslora:
        raise _not_together(folder)
    config = copy.copy(written)
    # A config for servers has others.
    config.r, config.lora_alpha = allocation.r, allocation.lora_alpha
    serving = (written.r, written.lora_alpha) != (allocation.r, allocation.lora_alpha)
    # Compared as they stand: the keys are regular expressions, and those of a stranger may take forever.
    meant = allocation.to_lora_config(config, serving=serving)
    if any(getattr(written, field) != getattr(meant, field) for field in _RANK_FIELDS):
        raise _not_together(folder)
    return config


def _read_adapter_config(folder: Path) -> LoraConfig:
    path = folder / ADAPTER_CONFIG
    # PEFT would look for it on the hub.
    if not path.is_file():
        raise CommandError(f"{path}: no such file, but fim-lora allocate writes one: allocate again.")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CommandError(f"{path} cannot be read as an adapter config: {error}. Allocate again.") from error
    if not isinstance(config, LoraConfig):
        raise CommandError(f"{path} is no LoRA config, but one of {type(config).__name__}: allocate again.")
    return config


def _not_together(folder: Path) -> CommandError:
    return CommandError(
        f"{folder / ADAPTER_CONFIG} has other ranks or scalings than {folder / ALLOCATION}: allocate again."
    )

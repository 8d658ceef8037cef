"""`fim-lora export`: from the folder of an allocation or a compression to a file for another tool."""

import copy
from pathlib import Path

from peft import LoraConfig

from fim_lora_command.errors import CommandError

from ..compression import LoraCompression
from ..config import unequal_scalings
from ..rank_allocation import RankAllocation
from ..ranks.allocation import ALLOCATION_FILE
from ..ranks.compressed import COMPRESSION_FILE
from ..report.exports import export
from ..runtime.atomic import write_text
from .adapter_config import read_lora_config
from .output import ADAPTER_CONFIG, read_result, require_writable_file, result_folder

_RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def export_folder(folder: Path, file_format: str, serving: bool, output: Path | None, overwrite: bool) -> None:
    """Read the output folder of `fim-lora allocate` or `compress`, and write it to a file, or else print it."""
    if output is not None:
        require_writable_file(output, overwrite)
    text = _exported(result_folder(folder), file_format, serving)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text, make_folders=True)


def _exported(folder: Path, file_format: str, serving: bool) -> str:
    result = read_result(folder)
    if isinstance(result, LoraCompression):
        config = _config_of_compression(folder, result)
        if serving:
            _require_one_scaling(folder, result)
        return export(result, config, file_format)
    config = base_config(folder, result)
    return export(result, result.to_lora_config(config, serving=serving), file_format)


def _config_of_compression(folder: Path, compression: LoraCompression) -> LoraConfig:
    """The config of the compressed adapter; patterns are compared as text, as in `base_config`."""
    config = read_lora_config(folder, "Run fim-lora compress again.")
    if any(getattr(config, field) != getattr(compression, field) for field in (*_RANK_FIELDS, "use_rslora")):
        raise CommandError(
            f"{folder / ADAPTER_CONFIG} has other ranks or scalings than {folder / COMPRESSION_FILE}. "
            "Run fim-lora compress again."
        )
    return config


def _require_one_scaling(folder: Path, compression: LoraCompression) -> None:
    """The global `r` and `lora_alpha` of a compression are right for all layers if these share one scaling."""
    if unequal := unequal_scalings(compression.ranks, compression.alphas, compression.use_rslora):
        (first, _), (other, _) = unequal
        raise CommandError(
            f"Layers {first!r} and {other!r} of {folder} have different scalings, which are part of the trained "
            "weights: run fim-lora compress again with --serving."
        )


def base_config(folder: Path, allocation: RankAllocation) -> LoraConfig:
    """The config that the ranks were allocated with, except for its patterns."""
    written = read_lora_config(folder, "Run fim-lora allocate again.")
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


def _mismatch(folder: Path) -> CommandError:
    return CommandError(
        f"{folder / ADAPTER_CONFIG} has other ranks or scalings than {folder / ALLOCATION_FILE}. "
        "Run fim-lora allocate again."
    )

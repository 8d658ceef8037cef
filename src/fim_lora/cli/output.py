"""Files of the output folder: where they may be written, and how a result is read again."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from fim_lora_command.errors import CommandError, warn

from ..compression import LoraCompression
from ..rank_allocation import RankAllocation
from ..ranks.allocation import ALLOCATION_FILE
from ..ranks.compressed import COMPRESSION_FILE
from ..ranks.size_curve import SIZE_CURVE_FILE
from ..report.rank_map import draw_rank_map
from ..report.title_names import title_names
from ..runtime.atomic import staged_files

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
RANK_MAP = "rank_map.png"
SIZE_CURVE = "size_curve.png"
REPORT = "report.html"
OUTPUT_FILES = (ADAPTER_CONFIG, ALLOCATION_FILE, RANK_MAP)
COMPRESSED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, COMPRESSION_FILE, SIZE_CURVE_FILE, SIZE_CURVE, RANK_MAP)
_RANK_FILES = (ALLOCATION_FILE, COMPRESSION_FILE)

Result = RankAllocation | LoraCompression


def result_folder(path: Path) -> Path:
    """The folder of a result, of which the user may have given the file of the ranks."""
    if not path.is_file():
        return path
    if path.name in _RANK_FILES:
        return path.parent
    known = [path.parent / name for name in _RANK_FILES]
    advice = f"give its folder, {path.parent}" if any(map(Path.exists, known)) else "give a folder"
    raise CommandError(f"{path} is a file: {advice}, which fim-lora allocate or fim-lora compress wrote.")


def read_result(folder: Path) -> Result:
    """What `fim-lora allocate` or `fim-lora compress` wrote; the compression, if the folder has both."""
    if (folder / COMPRESSION_FILE).exists():
        return LoraCompression.load(folder / COMPRESSION_FILE)
    path = folder / ALLOCATION_FILE
    if not path.exists():
        raise CommandError(
            f"{path}: no such file. Give the folder that fim-lora allocate or fim-lora compress wrote as its --output."
        )
    return RankAllocation.load(path)


def write_allocation(
    folder: Path, allocation: RankAllocation, config: LoraConfig, provenance: Mapping[str, Any]
) -> None:
    """Write the files of an allocation into its output folder, all or none."""
    with staged_files(folder) as stage:
        config.save_pretrained(str(stage))
        allocation.save(stage / ALLOCATION_FILE, **provenance)
        draw_rank_map(allocation, stage / RANK_MAP, **title_names(provenance))


def require_writable(folder: Path, overwrite: bool, files: Iterable[str], foreign: str) -> None:
    """Reject an output folder that could not be written at the end, or that has files in it, unless `overwrite`.

    `files` are the names of those to write. `foreign` names the file of another command, whose result would become
    stale in the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} exists and is not a folder: give another --output.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CommandError(
            f"{folder} is not empty: give another --output, or --overwrite to replace the files of an earlier run."
        )
    if (folder / foreign).exists():
        raise CommandError(f"{folder} has the result of another command, {foreign}: give another --output.")
    for file in (folder / name for name in files):
        if file.is_dir():
            raise CommandError(f"{file} is a folder in the place of a file: remove it, or give another --output.")
    _require_writable_parent(folder)
    if (folder / REPORT).exists():
        warn(
            f"{folder / REPORT} is the report of an earlier run: run fim-lora report {folder} --overwrite afterwards."
        )


def require_writable_file(file: Path, overwrite: bool) -> None:
    """Reject an output file that could not be written at the end, or that exists, unless `overwrite`."""
    if file.is_dir():
        raise CommandError(f"{file} is a folder: give a file as --output.")
    if file.exists() and not overwrite:
        raise CommandError(f"{file} exists: give another --output, or --overwrite to replace it.")
    _require_writable_parent(file.parent)


def _require_writable_parent(folder: Path) -> None:
    """Check the folder itself, or the nearest existing folder in which it would be created."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise CommandError(f"{folder} cannot be created, because {existing} is not a folder: give another --output.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CommandError(f"{existing}: Permission denied")

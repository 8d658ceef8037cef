"""Output folders and files: checked before the work, written completely or not at all, and read again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..rank_allocation import RankAllocation
from .errors import CommandError

ADAPTER_CONFIG = "adapter_config.json"
ALLOCATION = "fim_allocation.json"
RANK_MAP = "rank_map.png"
FILES = (ADAPTER_CONFIG, ALLOCATION, RANK_MAP)


def read_allocation(folder: Path) -> RankAllocation:
    """The allocation in a folder that `fim-lora allocate` wrote.

    Args:
        folder: The folder.

    Returns:
        The allocation.

    Raises:
        CommandError: If there is none.
        OSError: If it cannot be read.
        ValueError: If it is damaged.
    """
    path = folder / ALLOCATION
    if not path.exists():
        raise CommandError(f"{path}: no such file. Give the folder that fim-lora allocate wrote as its --output.")
    return RankAllocation.load(path)


def require_writable(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that could not be written in the end.

    Args:
        folder: The output folder.
        overwrite: Whether our files in it may be replaced.

    Raises:
        CommandError: If it is a file, holds something and may not be overwritten, or cannot be written.
        OSError: If it cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder} exists and is no folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CommandError(f"{folder} is not empty: give another --output, or --overwrite to replace our files in it.")
    _require_place_for(folder)


def require_writable_file(file: Path, overwrite: bool) -> None:
    """Refuse a file that could not be written in the end.

    Args:
        file: The output file.
        overwrite: Whether it may be replaced.

    Raises:
        CommandError: If it is a folder, exists and may not be overwritten, or cannot be written.
    """
    if file.is_dir():
        raise CommandError(f"{file} is a folder: give a file as --output.")
    if file.exists() and not overwrite:
        raise CommandError(f"{file} exists: give another --output, or --overwrite to replace it.")
    _require_place_for(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write a file, completely or not at all.

    Args:
        file: The file; missing folders above it are made.
        text: What to write.

    Raises:
        OSError: If it cannot be written.
    """
    with staged(file.parent) as stage:
        (stage / file.name).write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Collect files in a temporary folder, and move them to `folder` when all are there.

    The temporary folder lies beside `folder` if that does not exist yet, and in it otherwise, so that both are on
    the same file system. An exception leaves neither it nor anything new in `folder`.

    Args:
        folder: Where the files go; other files in it stay.

    Yields:
        The folder to write to.

    Raises:
        OSError: If something cannot be written or moved.
    """
    folder = folder.resolve()
    is_new = not folder.exists()
    place = folder.parent if is_new else folder
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".fim-lora-") as temporary:
        # One level deeper, because a temporary directory is private, and the result should not be.
        stage = Path(temporary) / "files"
        stage.mkdir()
        yield stage
        if is_new:
            stage.replace(folder)
            return
        for file in sorted(stage.iterdir()):
            file.replace(folder / file.name)


def _require_place_for(folder: Path) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise CommandError(f"{folder} cannot be made: {existing} is no folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CommandError(f"{existing}: Permission denied")

"""All-or-nothing writing: files are written completely or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; move the files in it to `folder` when the block ends without an exception.

    The temporary folder is in `folder`, or beside it if `folder` does not exist yet, so that both are on one file
    system. Other files in `folder` are kept. After an exception, also one between two moves, `folder` is as it was
    before, and the temporary folder is deleted. Raises `OSError`, also if a folder has the name of one of the files.
    """
    folder = folder.resolve()
    is_new = not folder.exists()
    place = folder.parent if is_new else folder
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".fim-lora-") as temporary:
        # One level deeper, because a temporary directory is private and the result should not be.
        stage = Path(temporary) / "files"
        stage.mkdir()
        yield stage
        if is_new:
            stage.replace(folder)
            return
        previous = Path(temporary) / "previous"
        previous.mkdir()
        _move_all(stage, folder, previous)


def _move_all(stage: Path, folder: Path, previous: Path) -> None:
    """Move all files of `stage` to `folder`, or none. `previous` is an empty folder for those that they replace."""
    files = sorted(stage.iterdir())
    for file in files:
        if os.path.lexists(folder / file.name):
            _keep(folder / file.name, previous / file.name)
    with ExitStack() as undo:
        for file in files:
            undo.callback(_put_back, file, folder / file.name, previous / file.name)
            file.replace(folder / file.name)
        undo.pop_all()


def _keep(path: Path, kept: Path) -> None:
    """Give a file, or a link itself, a second name, so that a replacement of the first one does not delete it."""
    try:
        os.link(path, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):  # not every file system has hard links
        shutil.copy2(path, kept, follow_symlinks=False)


def _put_back(file: Path, target: Path, previous: Path) -> None:
    if file.exists():
        return  # it was not moved
    if os.path.lexists(previous):
        previous.replace(target)
    else:
        target.unlink()


def write_text(path: str | os.PathLike[str], text: str, *, make_folders: bool = False) -> None:
    """Write a text file. Raises `OSError`, also if its folder does not exist and `make_folders` is false."""
    path = Path(path)
    if not make_folders:
        path.parent.resolve(strict=True)
    with staged_files(path.parent) as stage:
        (stage / path.name).write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write JSON types to a file. Raises `OSError`, and `ValueError` if a number is NaN or infinite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def file_restorer(path: Path) -> Callable[[], None]:
    """Read a file now, and return a function that restores it, or its absence, completely or not at all."""
    before = path.read_bytes() if path.exists() else None

    def restore() -> None:
        if before is None:
            path.unlink(missing_ok=True)
            return
        with staged_files(path.parent) as stage:
            (stage / path.name).write_bytes(before)

    return restore

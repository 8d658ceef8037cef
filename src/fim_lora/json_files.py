"""Reading and writing our JSON files: versioned, atomic, nothing in them is ever executed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Up to here every reader of JSON takes a number for the same integer.
_LARGEST_INTEGER = 2**53
_LONGEST_NAME = 1000
# What makes a spreadsheet take a cell for a formula.
_FORMULA = ("=", "+", "-", "@")


class InvalidFileError(ValueError):
    """A file is not what it should be; the message names the file and the way out."""


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write `content` to `path` by way of a temporary file beside it, so that no half-written file can stay.

    Args:
        path: The file.
        content: JSON types; NaN and infinity are refused.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If a number is NaN or infinite.
    """
    path = Path(path)
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes the file private; the user's own choice is the umask.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise


def read_json(path: str | os.PathLike[str], file_format: str, schema_version: int) -> dict[str, Any]:
    """Read a JSON file of ours and check its format and version.

    Args:
        path: The file.
        file_format: The expected value of `"format"`.
        schema_version: The newest `"schema_version"` that can be read.

    Returns:
        The content.

    Raises:
        OSError: If the file cannot be read.
        InvalidFileError: If it is not JSON, of another format, or of a newer version.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        # A pipe or a device may never end.
        raise InvalidFileError(f"{path} is no regular file.")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise InvalidFileError(f"{path} is not a {file_format} file of fim-lora.")
    found = content.get("schema_version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise InvalidFileError(f"{path} has no valid schema_version, but {found!r}.")
    if found > schema_version:
        raise InvalidFileError(
            f"{path} has schema_version {found}, this fim-lora reads up to {schema_version}: upgrade fim-lora."
        )
    return content


def integer(value: Any, at_least: int) -> int:
    """A value from a file that has to be an integer.

    Args:
        value: The value.
        at_least: The smallest that makes sense.

    Returns:
        The value.

    Raises:
        TypeError: If it is none; 3.0, "3" and true are none.
        ValueError: If it is smaller, or above 2**53.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no integer")
    if not at_least <= value <= _LARGEST_INTEGER:
        raise ValueError(f"{value} is not between {at_least} and 2**53")
    return value


def number(value: Any) -> float:
    """A value from a file that has to be a finite number.

    Args:
        value: The value.

    Returns:
        The value.

    Raises:
        TypeError: If it is none; "3" and true are none.
        ValueError: If it is not finite.
        OverflowError: If it is an integer that no float can hold.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    return float(value)


def boolean(value: Any) -> bool:
    """A value from a file that has to be true or false.

    Args:
        value: The value.

    Returns:
        The value.

    Raises:
        TypeError: If it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def layer_name(value: str) -> str:
    """A key from a file that has to be the name of a layer: it will be printed, drawn and put into tables.

    Args:
        value: The key.

    Returns:
        The key.

    Raises:
        ValueError: If it is empty or very long, cannot be printed as it is (control characters move the cursor of a
            terminal), or would be a formula in a spreadsheet.
    """
    if not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError(f"a layer's name has {len(value)} characters")
    if not value.isprintable() or value.startswith(_FORMULA):
        raise ValueError(f"{value!r} is no name of a layer")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is there twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")

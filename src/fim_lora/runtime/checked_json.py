"""Reading JSON files of fim-lora that may be damaged or hostile: every value is checked, nothing is executed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

# Up to this size all JSON readers read a number as the same integer.
_LARGEST_INTEGER = 2**53

_LONGEST_NAME = 1000


class InvalidFileError(ValueError):
    """A file is damaged, of another format, or too new. The message names the file and suggests a fix."""


def read_json(path: str | os.PathLike[str], file_format: str, schema_version: int) -> dict[str, Any]:
    """Read a JSON file and check its `"format"` and its `"schema_version"`, which may be at most `schema_version`.

    Raises:
        OSError: If the file cannot be read.
        InvalidFileError: If it is not JSON, of another format, or of a newer version.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        # Reading a pipe or a device may never end.
        raise InvalidFileError(f"{path} is not a regular file.")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise InvalidFileError(f"{path} is not a {file_format} file of fim-lora.")
    found = content.get("schema_version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise InvalidFileError(f"{path} has schema_version {found!r}, which is not a positive integer.")
    if found > schema_version:
        raise InvalidFileError(
            f"{path} has schema_version {found}, but this fim-lora reads up to {schema_version}: upgrade fim-lora."
        )
    return content


def require_integer(value: Any, at_least: int) -> int:
    """Return the value; raise TypeError for 3.0, "3" and true, ValueError if it is below `at_least` or above 2**53."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    if not at_least <= value <= _LARGEST_INTEGER:
        raise ValueError(f"{value} is not between {at_least} and 2**53")
    return value


def require_number(value: Any) -> float:
    """Return the value; raise TypeError for "3" and true, ValueError if it is NaN or infinite.

    Raises OverflowError for an integer that is too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    return float(value)


def require_boolean(value: Any) -> bool:
    """Return the value; raise TypeError if it is neither true nor false."""
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def require_layer_name(value: str) -> str:
    """Return the value; raise ValueError if it cannot be the name of a layer.

    The name must not be empty or very long, and must be printable, because control characters move the cursor of a
    terminal.
    """
    if not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError(f"a layer name has {len(value)} characters, not 1 to {_LONGEST_NAME}")
    if not value.isprintable():
        raise ValueError(f"{value!r} is not the name of a layer")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key appears twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")

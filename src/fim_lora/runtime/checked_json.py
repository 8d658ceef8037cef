"""Reading JSON files of fim-lora that may be damaged or hostile: every value is checked, nothing is executed."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Parsed = TypeVar("Parsed")

# Up to this size all JSON readers read a number as the same integer.
_LARGEST_INTEGER = 2**53

_LONGEST_NAME = 1000


class InvalidFileError(ValueError):
    """A file is damaged, of another format, or too new. The message names the file and suggests a fix."""


def read_json(
    path: str | os.PathLike[str],
    file_format: str,
    schema_version: int,
    parse: Callable[[Mapping[str, Any]], Parsed],
    fix: str,
) -> Parsed:
    """Parse a JSON file of this `"format"`, and of this or an older `"schema_version"`.

    Raises `OSError` if the file cannot be read, and `InvalidFileError` if it is not a regular file, not such JSON, or
    damaged. For a damaged file the message ends with `fix`.
    """
    content = _checked_content(path, file_format, schema_version)
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InvalidFileError(f"{path} is damaged: {error!r}. {fix}") from error


def _checked_content(path: str | os.PathLike[str], file_format: str, schema_version: int) -> dict[str, Any]:
    path = Path(path)
    if path.exists() and not path.is_file():
        # Reading a pipe or a device may never end.
        raise InvalidFileError(f"{path} is not a regular file: pass a file that fim-lora wrote.")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{path} is not a JSON file: {error}. Pass a file that fim-lora wrote.") from error
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise InvalidFileError(f"{path} is not a {file_format} file: pass one that fim-lora wrote.")
    found = content.get("schema_version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise InvalidFileError(
            f"{path} has schema_version {found!r}, which is not a positive integer: pass a file that fim-lora wrote."
        )
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
    """Return the value; raise TypeError for "3" and true, ValueError for NaN and inf, OverflowError for 10**400."""
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
    """Return the value; raise ValueError if it is empty or very long, or not printable.

    The name is printed, drawn and written into tables, and control characters could move the cursor of a terminal.
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

"""Reading and writing our JSON files: versioned, atomic, nothing in them is ever executed."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
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

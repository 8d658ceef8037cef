"""Safetensors files of fim-lora: written completely or not at all, and read with every value checked.

The metadata of such a file has the same two fields as the JSON files: `"format"` and `"schema_version"`. Metadata are
strings, so numbers are written as decimal digits.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import staged_files
from .checked_json import InvalidFileError, require_integer

Parsed = TypeVar("Parsed")

# Not `str.isdigit` and `int`, which accept the digits of all scripts, signs and underscores.
_INTEGER = re.compile("0|[1-9][0-9]{0,15}")


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    file_format: str,
    schema_version: int,
    numbers: Mapping[str, int],
) -> None:
    """Write tensors with integers as metadata, completely or not at all.

    Raises `OSError` if the file cannot be written, also if its folder does not exist.
    """
    path = Path(path)
    path.parent.resolve(strict=True)
    metadata = {"format": file_format, "schema_version": str(schema_version)}
    metadata |= {name: str(number) for name, number in numbers.items()}
    with staged_files(path.parent) as stage:
        staged = stage / path.name
        staged.touch()
        mode = staged.stat().st_mode
        try:
            save_file(_without_shared_memory(tensors), staged, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        staged.chmod(mode)  # safetensors makes files that only their owner can read


def read_safetensors(
    path: str | os.PathLike[str],
    file_format: str,
    schema_version: int,
    parse: Callable[[Mapping[str, Tensor], Mapping[str, str]], Parsed],
    fix: str,
) -> Parsed:
    """Parse the tensors and metadata of a file of this `"format"`, and of this or an older `"schema_version"`.

    Raises `OSError` if the file cannot be read, and `InvalidFileError` if it is not a regular file, not such a file,
    or damaged. For a damaged file the message ends with `fix`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        # Reading a pipe or a device may never end.
        raise InvalidFileError(f"{path} is not a regular file: pass a file that fim-lora wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _require_format(path, metadata, file_format, schema_version)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except SafetensorError as error:
        raise InvalidFileError(
            f"{path} is not a safetensors file: {error}. Pass a file that fim-lora wrote."
        ) from error
    try:
        return parse(tensors, metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidFileError(f"{path} is damaged: {error!r}. {fix}") from error


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host. Those that share memory, which safetensors refuses, are copied."""
    separate, known = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in known:
            tensor = tensor.clone()
        known.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def require_digits(text: str, at_least: int) -> int:
    """The integer that a text of decimal digits stands for.

    Raises `ValueError` if it is not one, is below `at_least` or above 2**53.
    """
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{text!r} is not an integer")
    return require_integer(int(text), at_least)


def _require_format(path: Path, metadata: Mapping[str, str], file_format: str, schema_version: int) -> None:
    if metadata.get("format") != file_format:
        raise InvalidFileError(f"{path} is not a {file_format} file: pass one that fim-lora wrote.")
    try:
        found = require_digits(metadata.get("schema_version", ""), 1)
    except ValueError as error:
        raise InvalidFileError(
            f"{path} has schema_version {metadata.get('schema_version')!r}, which is not a positive integer: pass a "
            "file that fim-lora wrote."
        ) from error
    if found > schema_version:
        raise InvalidFileError(
            f"{path} has schema_version {found}, but this fim-lora reads up to {schema_version}: upgrade fim-lora."
        )

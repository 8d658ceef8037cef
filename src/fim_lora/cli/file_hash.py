"""SHA-256 of a file, to tell later which file it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK_BYTES = 2**20


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content.

    Args:
        path: The file.

    Returns:
        Hexadecimal digits.

    Raises:
        OSError: If the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()

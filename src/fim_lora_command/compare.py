"""The options of `fim-lora compare`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json

_Folder = Annotated[Path, typer.Argument(help="Folder that fim-lora allocate or compress wrote.")]


def compare_command(
    first: _Folder,
    second: _Folder,
    output: Annotated[
        Path | None, typer.Option(help="File for a picture, such as ranks.png or ranks.svg.", metavar="FILE")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Json = False,
) -> None:
    """Print the ranks of two results side by side, and their correlation."""
    from fim_lora.cli.compare import compare

    compare(first, second, output, overwrite, as_json)

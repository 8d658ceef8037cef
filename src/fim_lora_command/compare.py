"""The options of `fim-lora compare`."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import wrong_usage
from .options import Json, expanded

_Folder = Annotated[Path, typer.Argument(help="Folder that fim-lora allocate or compress wrote.", callback=expanded)]


def compare_command(
    first: _Folder,
    second: _Folder,
    output: Annotated[
        Path | None,
        typer.Option(help="File for a picture, such as ranks.png or ranks.svg.", metavar="FILE", callback=expanded),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Json = False,
) -> None:
    """Print the ranks of two results side by side, and their correlation."""
    if overwrite and output is None:
        raise wrong_usage("--overwrite", "it has no effect without --output.")

    from fim_lora.cli.compare import compare

    compare(first, second, output, overwrite, as_json)

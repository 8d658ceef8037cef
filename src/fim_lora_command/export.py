"""The options of `fim-lora export`."""

from pathlib import Path
from typing import Annotated

import typer

from .choices import FORMATS
from .errors import require_choice, wrong_usage
from .options import ResultFolder, Serving, expanded

_FORMAT_HELP = "A table, the LoRA part of a config for axolotl, or PEFT's adapter_config.json."


def export_command(
    folder: ResultFolder,
    file_format: Annotated[str, typer.Option("--format", help=_FORMAT_HELP, metavar="|".join(FORMATS))],
    serving: Serving = False,
    output: Annotated[
        Path | None,
        typer.Option(help="File for the result.", metavar="FILE", callback=expanded, show_default="standard output"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write the ranks of an allocation or a compression in the format of another tool."""
    require_choice("--format", file_format, FORMATS)
    if serving and file_format == "csv":
        raise wrong_usage("--serving", "it has no effect on a table of ranks: leave it out.")
    if overwrite and output is None:
        raise wrong_usage("--overwrite", "it has no effect without --output.")

    from fim_lora.cli.export import export_folder

    export_folder(folder, file_format, serving, output, overwrite)

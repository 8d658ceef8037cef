"""The options of `fim-lora report`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import ResultFolder, expanded


def report_command(
    folder: ResultFolder,
    output: Annotated[
        Path | None,
        typer.Option(help="File for the report.", metavar="FILE", show_default="DIR/report.html", callback=expanded),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write an allocation or a compression as one HTML file, with its ranks, scores and possible sizes."""
    from fim_lora.cli.report import report

    report(folder, output, overwrite)

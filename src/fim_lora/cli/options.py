"""Options that several commands have, and checks of their values without reading anything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from .data import ROLES
from .models import DTYPES, TASKS

_COLUMN_HELP = f"Column of the {', '.join(ROLES[:-1])} or {ROLES[-1]}, if it has another name; repeatable."
DATA_HELP = "A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a dataset on the Hub."
SPLIT_HELP = "Split of the data, or a part of one, such as 'train[:1000]'."

Output = Annotated[Path, typer.Option(help="Folder for the result.", metavar="DIR")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier run in the folder.")]
BatchSize = Annotated[int, typer.Option(help="Examples per batch.", metavar="N", min=1)]
MaxLength = Annotated[int, typer.Option(help="Maximum number of tokens per example.", metavar="N", min=2)]
Split = Annotated[str, typer.Option(help=SPLIT_HELP, metavar="NAME")]
Subset = Annotated[
    str | None, typer.Option(help="Configuration of a dataset on the Hub that has several.", metavar="NAME")
]
Column = Annotated[list[str] | None, typer.Option(help=_COLUMN_HELP, metavar="ROLE=NAME")]
Dtype = Annotated[str, typer.Option(help="Precision of the model.", metavar="|".join(DTYPES))]
Device = Annotated[
    str | None,
    typer.Option(help="Device for calibration.", metavar="NAME", show_default="cuda if available, else cpu"),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow Python code that comes with the model to run.")
]
Seed = Annotated[int, typer.Option(help="Seed for drawing the examples.", metavar="N")]

DEFAULT_BATCH_SIZE, DEFAULT_MAX_LENGTH, DEFAULT_SPLIT = 4, 512, "train"
DEFAULT_DTYPE, DEFAULT_TASK = DTYPES[0], TASKS[0]


def wrong_usage(option: str, message: str) -> typer.BadParameter:
    """The error of an option whose value is wrong."""
    return typer.BadParameter(message, param_hint=f"'{option}'")


def require_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise wrong_usage(option, f"{value!r} is not one of {', '.join(choices)}.")


def column_names(assignments: Sequence[str]) -> dict[str, str]:
    """Role to column name, from `ROLE=NAME`."""
    names: dict[str, str] = {}
    for assignment in assignments:
        role, equals, name = assignment.partition("=")
        if not equals or not name:
            raise wrong_usage("--column", f"{assignment!r} is not ROLE=NAME, such as text=sentence.")
        require_choice("--column", role, ROLES)
        if role in names:
            raise wrong_usage("--column", f"{role} is given twice: give each role once.")
        names[role] = name
    return names


def device_of(name: str | None) -> torch.device:
    """The device of this name, or the default one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Creating an empty tensor shows whether this build of torch and this computer have the device.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise wrong_usage("--device", f"{name!r} cannot be used: {error}") from error

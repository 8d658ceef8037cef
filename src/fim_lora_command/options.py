"""Options that several commands have, and checks of their values without reading anything."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .choices import DTYPES, ROLES, TASKS
from .errors import require_choice, wrong_usage

_COLUMN_HELP = f"Column of the {', '.join(ROLES[:-1])} or {ROLES[-1]}, if it has another name; repeatable."
DATA_HELP = "A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a dataset on the Hub."
SPLIT_HELP = "Split of the data, or a part of one, such as 'train[:1000]'."
_REGEX_CHARACTERS = frozenset(r"\^$*+?{}[]()|")


def expanded(path: Any) -> Any:
    """A path or a name with `~` replaced by the home folder, which a shell does not do after an equals sign."""
    if not str(path).startswith("~"):
        return path
    # Unlike Path.expanduser, it leaves the name of an unknown user as it is, as a shell does.
    return type(path)(os.path.expanduser(path))  # noqa: PTH111


Output = Annotated[Path, typer.Option(help="Folder for the result.", metavar="DIR", callback=expanded)]
Rank = Annotated[int, typer.Option("-r", "--rank", help="Rank that uniform LoRA would use.", metavar="N", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, instead of tables.")]
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
ResultFolder = Annotated[
    Path,
    typer.Argument(help="Folder that fim-lora allocate or compress wrote.", metavar="DIR", callback=expanded),
]
Serving = Annotated[
    bool,
    typer.Option(
        "--serving",
        help="Write r and lora_alpha for servers that read only these, such as vLLM: r is then the largest rank.",
    ),
]

DEFAULT_BATCH_SIZE, DEFAULT_MAX_LENGTH, DEFAULT_SPLIT = 4, 512, "train"
DEFAULT_DTYPE, DEFAULT_TASK = DTYPES[0], TASKS[0]


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


def target_modules_of(text: str | None) -> list[str] | str | None:
    """The value for `LoraConfig`, which treats a string other than `all-linear` as a regular expression."""
    if text is None or text == "all-linear":
        return text
    if _REGEX_CHARACTERS & set(text):
        try:
            re.compile(text)
        except re.error as error:
            raise wrong_usage("--target-modules", f"{text!r} is not a valid regular expression: {error}.") from error
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise wrong_usage("--target-modules", f"{text!r} has an empty name: remove the extra comma.")
    return names

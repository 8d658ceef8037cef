"""The commands and their options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from peft import LoraConfig

from .. import __version__
from ..allocation import BUDGETS, Budget
from ..config import FimConfig
from ..exports import FORMATS
from ..plotting import draw_rank_map
from .allocate import AllocateOptions, allocate
from .data import ROLES
from .errors import EXIT_INTERRUPTED, report, warnings_as_lines
from .export import export_folder
from .models import DTYPES, TASKS, Task
from .output import RANK_MAP, read_allocation, require_writable_file, staged, write_text
from .summary import make_console, print_summary

_REGEX_CHARACTERS = frozenset(r"\^$*+?{}[]()|")
_SERVING_HELP = "Write r and lora_alpha for servers that read nothing else, such as vLLM: r is the largest rank."

app = typer.Typer(
    name="fim-lora",
    help="LoRA ranks from the empirical Fisher information, as an ordinary PEFT adapter.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; whatever happens is told in one line.

    Args:
        arguments: Arguments without the program name; `None` for those of the process.

    Returns:
        Exit code.
    """
    try:
        with warnings_as_lines():
            code = app(args=arguments, prog_name="fim-lora", standalone_mode=False)
    except typer.Abort:
        return report(KeyboardInterrupt())
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    # What typer makes of Ctrl-C, depending on its version, is this or `Abort`.
    if code == EXIT_INTERRUPTED:
        return report(KeyboardInterrupt())
    return code if isinstance(code, int) else 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fim-lora {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command("allocate")
def _allocate(
    model: Annotated[str, typer.Option(help="Id on the hub, folder, or GGUF file.", metavar="MODEL")],
    data: Annotated[
        str,
        typer.Option(
            help="A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or name of a data set on the hub.",
            metavar="DATA",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the result.", metavar="DIR")],
    r: Annotated[int, typer.Option("-r", help="Rank that uniform LoRA would use.", metavar="N", min=1)] = LoraConfig.r,
    r_min: Annotated[
        int, typer.Option(help="Smallest rank of a layer; 0 lets layers go without.", metavar="N", min=0)
    ] = FimConfig.r_min,
    r_max: Annotated[
        int | None, typer.Option(help="Largest rank of a layer.", metavar="N", show_default="4 * r", min=1)
    ] = FimConfig.r_max,
    budget: Annotated[
        str, typer.Option(help="What stays as with uniform ranks.", metavar="|".join(BUDGETS))
    ] = FimConfig.budget,
    score_exponent: Annotated[
        float, typer.Option(help="Ranks are proportional to score ** exponent; below 1 is softer.", metavar="X")
    ] = FimConfig.score_exponent,
    exact: Annotated[
        bool, typer.Option("--exact", help="Read long examples exactly, too, not through a random projection.")
    ] = FimConfig.exact,
    lora_alpha: Annotated[int | None, typer.Option(help="lora_alpha.", metavar="N", show_default="r", min=1)] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="all-linear, names separated by commas, or a regular expression.",
            metavar="NAMES",
            show_default="PEFT's for the architecture",
        ),
    ] = None,
    batches: Annotated[
        int, typer.Option(help="Calibration batches.", metavar="N", min=1)
    ] = FimConfig.fim_calibration_batches,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.", metavar="N", min=1)] = 4,
    max_length: Annotated[int, typer.Option(help="Tokens of an example, at most.", metavar="N", min=2)] = 512,
    task: Annotated[str, typer.Option(help="What the model is trained for.", metavar="|".join(TASKS))] = TASKS[0],
    split: Annotated[
        str, typer.Option(help="Split of the data, or part of one: 'train[:1000]'.", metavar="NAME")
    ] = "train",
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a data set on the hub that has several.", metavar="NAME")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Which column is the {', '.join(ROLES[:-1])} or {ROLES[-1]}, if it is not named so; repeatable.",
            metavar="ROLE=NAME",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the model.", metavar="|".join(DTYPES))] = DTYPES[0],
    device: Annotated[
        str | None, typer.Option(help="Device.", metavar="NAME", show_default="cuda if there is one, else cpu")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which examples are drawn.", metavar="N")] = 0,
    serving: Annotated[bool, typer.Option("--serving", help=_SERVING_HELP)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace our files in the folder.")] = False,
) -> None:
    """Measure how sensitive every layer is, and write a LoRA config with a rank for each."""
    _require_choice("--budget", budget, BUDGETS)
    _require_choice("--task", task, TASKS)
    _require_choice("--dtype", dtype, DTYPES)
    options = AllocateOptions(
        model=model,
        data=data,
        output=output,
        overwrite=overwrite,
        r=r,
        lora_alpha=r if lora_alpha is None else lora_alpha,
        target_modules=_target_modules(target_modules),
        fim_config=_fim_config(r, batches, r_min, r_max, budget, score_exponent, exact),
        batch_size=batch_size,
        max_length=max_length,
        task=cast(Task, task),
        split=split,
        subset=subset,
        column_names=_column_names(column or []),
        dtype=dtype,
        device=_device(device),
        seed=seed,
        serving=serving,
    )
    allocate(options, make_console())


@app.command("show")
def _show(
    folder: Annotated[Path, typer.Argument(help="Folder that fim-lora allocate wrote.", metavar="DIR")],
) -> None:
    """Print the ranks of an allocation, and draw its rank map again."""
    allocation = read_allocation(folder)
    print_summary(make_console(), allocation, {})
    with staged(folder) as stage:
        draw_rank_map(allocation, stage / RANK_MAP)


@app.command("export")
def _export(
    folder: Annotated[Path, typer.Argument(help="Folder that fim-lora allocate wrote.", metavar="DIR")],
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="A table, the LoRA part of a config for axolotl, or PEFT's adapter_config.json.",
            metavar="|".join(FORMATS),
        ),
    ],
    serving: Annotated[bool, typer.Option("--serving", help=_SERVING_HELP)] = False,
    output: Annotated[
        Path | None, typer.Option(help="File for the result.", metavar="FILE", show_default="standard output")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write an allocation in the format of another tool."""
    _require_choice("--format", file_format, FORMATS)
    if output is not None:
        require_writable_file(output, overwrite)
    text = export_folder(folder, file_format, serving)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)


def _require_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}.", param_hint=f"'{option}'")


def _fim_config(
    r: int, batches: int, r_min: int, r_max: int | None, budget: str, score_exponent: float, exact: bool
) -> FimConfig:
    if r_min > r:
        raise typer.BadParameter(f"{r_min} is above -r {r}.", param_hint="'--r-min'")
    if r_max is not None and r_max < r:
        raise typer.BadParameter(f"{r_max} is below -r {r}.", param_hint="'--r-max'")
    try:
        return FimConfig(
            fim_calibration_batches=batches,
            r_min=r_min,
            r_max=r_max,
            budget=cast(Budget, budget),
            score_exponent=score_exponent,
            exact=exact,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _target_modules(text: str | None) -> list[str] | str | None:
    """What `LoraConfig` takes: a string is a regular expression there, but for `all-linear`."""
    if text is None or text == "all-linear":
        return text
    if _REGEX_CHARACTERS & set(text):
        try:
            re.compile(text)
        except re.error as error:
            raise typer.BadParameter(
                f"{text!r} is no regular expression: {error}.", param_hint="'--target-modules'"
            ) from error
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise typer.BadParameter(f"{text!r} has an empty name.", param_hint="'--target-modules'")
    return names


def _column_names(assignments: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for assignment in assignments:
        role, equals, name = assignment.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{assignment!r} is not ROLE=NAME.", param_hint="'--column'")
        _require_choice("--column", role, ROLES)
        if role in names:
            raise typer.BadParameter(f"{role} is given twice.", param_hint="'--column'")
        names[role] = name
    return names


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # An empty tensor tells whether this build of torch and this computer have it.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{name!r} cannot be used: {error}", param_hint="'--device'") from error

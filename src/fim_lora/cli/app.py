"""The commands and their options."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from peft import LoraConfig

from .. import __version__
from ..config import BUDGETS, Budget, FimConfig
from ..report.exports import FORMATS
from ..report.rank_map import draw_rank_map
from ..runtime.atomic import staged_files, write_text
from .allocate import AllocateOptions, allocate
from .data import ROLES
from .errors import EXIT_INTERRUPTED, report_error, warnings_as_lines
from .export import export_folder
from .models import DTYPES, PEFT_TASK_TYPES, TASKS, Task
from .output import RANK_MAP, read_allocation, require_writable_file
from .summary import print_summary

_REGEX_CHARACTERS = frozenset(r"\^$*+?{}[]()|")
_COLUMN_HELP = f"Column of the {', '.join(ROLES[:-1])} or {ROLES[-1]}, if it has another name; repeatable."
_DATA_HELP = "A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a dataset on the Hub."
_FORMAT_HELP = "A table, the LoRA part of a config for axolotl, or PEFT's adapter_config.json."
_SERVING_HELP = "Write r and lora_alpha for servers that read only these, such as vLLM: r is then the largest rank."

_Folder = Annotated[Path, typer.Argument(help="Folder that fim-lora allocate wrote.", metavar="DIR")]
_Serving = Annotated[bool, typer.Option("--serving", help=_SERVING_HELP)]

app = typer.Typer(
    name="fim-lora",
    help="LoRA ranks from the empirical Fisher information, as an ordinary PEFT adapter.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, report any error in one line, and return the exit code."""
    try:
        with warnings_as_lines():
            code = app(args=arguments, prog_name="fim-lora", standalone_mode=False)
    except typer.Abort:
        return report_error(KeyboardInterrupt())
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error)
    # Depending on its version, typer turns Ctrl-C into this code or into `Abort`.
    if code == EXIT_INTERRUPTED:
        return report_error(KeyboardInterrupt())
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
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file of the model.", metavar="MODEL")],
    data: Annotated[str, typer.Option(help=_DATA_HELP, metavar="DATA")],
    output: Annotated[Path, typer.Option(help="Folder for the result.", metavar="DIR")],
    r: Annotated[int, typer.Option("-r", help="Rank that uniform LoRA would use.", metavar="N", min=1)] = LoraConfig.r,
    r_min: Annotated[
        int, typer.Option(help="Smallest rank of a layer; with 0, a layer may get no adapter.", metavar="N", min=0)
    ] = FimConfig.r_min,
    r_max: Annotated[
        int | None, typer.Option(help="Largest rank of a layer.", metavar="N", show_default="4 * r", min=1)
    ] = FimConfig.r_max,
    budget: Annotated[
        str, typer.Option(help="Total that stays the same as with uniform ranks.", metavar="|".join(BUDGETS))
    ] = FimConfig.budget,
    score_exponent: Annotated[
        float, typer.Option(help="Ranks are proportional to score ** exponent; below 1, they vary less.", metavar="X")
    ] = FimConfig.score_exponent,
    exact: Annotated[
        bool, typer.Option("--exact", help="Measure long examples exactly, too, without a random projection.")
    ] = FimConfig.exact,
    lora_alpha: Annotated[
        int | None, typer.Option(help="lora_alpha of uniform LoRA.", metavar="N", show_default="r", min=1)
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="all-linear, names separated by commas, or a regular expression.",
            metavar="NAMES",
            show_default="PEFT's for the architecture",
        ),
    ] = None,
    batches: Annotated[
        int, typer.Option(help="Number of calibration batches.", metavar="N", min=1)
    ] = FimConfig.fim_calibration_batches,
    batch_size: Annotated[int, typer.Option(help="Examples per batch.", metavar="N", min=1)] = 4,
    max_length: Annotated[int, typer.Option(help="Maximum number of tokens per example.", metavar="N", min=2)] = 512,
    task: Annotated[str, typer.Option(help="Task that the model is trained for.", metavar="|".join(TASKS))] = TASKS[0],
    split: Annotated[
        str, typer.Option(help="Split of the data, or a part of one, such as 'train[:1000]'.", metavar="NAME")
    ] = "train",
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a dataset on the Hub that has several.", metavar="NAME")
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help=_COLUMN_HELP, metavar="ROLE=NAME")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the model.", metavar="|".join(DTYPES))] = DTYPES[0],
    device: Annotated[
        str | None,
        typer.Option(help="Device for calibration.", metavar="NAME", show_default="cuda if available, else cpu"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for drawing the examples.", metavar="N")] = 0,
    serving: _Serving = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier run in the folder.")
    ] = False,
) -> None:
    """Measure how sensitive every layer is, and write a LoRA config with a rank for each."""
    _require_choice("--budget", budget, BUDGETS)
    _require_choice("--task", task, TASKS)
    _require_choice("--dtype", dtype, DTYPES)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha or r,
        target_modules=_target_modules(target_modules),
        task_type=PEFT_TASK_TYPES[task],
        init_lora_weights="fim",
        fim_config=_fim_config(r, batches, r_min, r_max, budget, score_exponent, exact),
    )
    options = AllocateOptions(
        model=model,
        data=data,
        output=output,
        overwrite=overwrite,
        lora_config=config,
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
    allocate(options)


@app.command("show")
def _show(folder: _Folder) -> None:
    """Print the ranks of an allocation, and draw its rank map again."""
    allocation = read_allocation(folder)
    print_summary(allocation, {})
    with staged_files(folder) as stage:
        draw_rank_map(allocation, stage / RANK_MAP)


@app.command("export")
def _export(
    folder: _Folder,
    file_format: Annotated[str, typer.Option("--format", help=_FORMAT_HELP, metavar="|".join(FORMATS))],
    serving: _Serving = False,
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
        write_text(output, text, make_folders=True)


def _require_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise _wrong_usage(option, f"{value!r} is not one of {', '.join(choices)}.")


def _wrong_usage(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")


def _fim_config(
    r: int, batches: int, r_min: int, r_max: int | None, budget: str, score_exponent: float, exact: bool
) -> FimConfig:
    if r_min > r:
        raise _wrong_usage("--r-min", f"{r_min} is above -r {r}: give {r} or less.")
    if r_max is not None and r_max < r:
        raise _wrong_usage("--r-max", f"{r_max} is below -r {r}: give {r} or more.")
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
    """The value for `LoraConfig`, which treats a string other than `all-linear` as a regular expression."""
    if text is None or text == "all-linear":
        return text
    if _REGEX_CHARACTERS & set(text):
        try:
            re.compile(text)
        except re.error as error:
            raise _wrong_usage("--target-modules", f"{text!r} is not a valid regular expression: {error}.") from error
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise _wrong_usage("--target-modules", f"{text!r} has an empty name: remove the extra comma.")
    return names


def _column_names(assignments: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for assignment in assignments:
        role, equals, name = assignment.partition("=")
        if not equals or not name:
            raise _wrong_usage("--column", f"{assignment!r} is not ROLE=NAME, such as text=sentence.")
        _require_choice("--column", role, ROLES)
        if role in names:
            raise _wrong_usage("--column", f"{role} is given twice: give each role once.")
        names[role] = name
    return names


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Creating an empty tensor shows whether this build of torch and this computer have the device.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise _wrong_usage("--device", f"{name!r} cannot be used: {error}") from error

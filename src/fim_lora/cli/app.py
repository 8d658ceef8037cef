"""The commands and their options."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from peft import LoraConfig

from .. import __version__
from ..config import BUDGETS, SCORES, Budget, FimConfig, Score
from ..report.exports import FORMATS
from ..report.rank_map import draw_rank_map
from ..runtime.atomic import staged_files, write_text
from .allocate import AllocateOptions, allocate
from .compress import compress
from .compress_inputs import CompressOptions
from .errors import EXIT_INTERRUPTED, report_error, warnings_as_lines
from .export import export_folder
from .models import DTYPES, PEFT_TASK_TYPES, TASKS, Task
from .options import (
    DATA_HELP,
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    DEFAULT_MAX_LENGTH,
    DEFAULT_SPLIT,
    DEFAULT_TASK,
    SPLIT_HELP,
    BatchSize,
    Column,
    Device,
    Dtype,
    MaxLength,
    Output,
    Overwrite,
    Seed,
    Split,
    Subset,
    TrustRemoteCode,
    column_names,
    device_of,
    require_choice,
    wrong_usage,
)
from .output import RANK_MAP, read_result, require_writable_file
from .remote_code import no_questions
from .summary import print_summary

_REGEX_CHARACTERS = frozenset(r"\^$*+?{}[]()|")
_FORMAT_HELP = "A table, the LoRA part of a config for axolotl, or PEFT's adapter_config.json."
_SERVING_HELP = "Write r and lora_alpha for servers that read only these, such as vLLM: r is then the largest rank."

_Folder = Annotated[Path, typer.Argument(help="Folder that fim-lora allocate or compress wrote.", metavar="DIR")]
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
        with warnings_as_lines(), no_questions():
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
    data: Annotated[str, typer.Option(help=DATA_HELP, metavar="DATA")],
    output: Output,
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
    score: Annotated[
        str,
        typer.Option(help="Ranks by the gradient's norm or by the mean of the eFIM.", metavar="|".join(SCORES)),
    ] = FimConfig.score,
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
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    max_length: MaxLength = DEFAULT_MAX_LENGTH,
    task: Annotated[
        str, typer.Option(help="Task that the model is trained for.", metavar="|".join(TASKS))
    ] = DEFAULT_TASK,
    split: Split = DEFAULT_SPLIT,
    subset: Subset = None,
    column: Column = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    serving: _Serving = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure how sensitive every layer is, and write a LoRA config with a rank for each."""
    require_choice("--budget", budget, BUDGETS)
    require_choice("--score", score, SCORES)
    require_choice("--task", task, TASKS)
    require_choice("--dtype", dtype, DTYPES)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha or r,
        target_modules=_target_modules(target_modules),
        task_type=PEFT_TASK_TYPES[task],
        init_lora_weights="fim",
        fim_config=_fim_config(r, batches, r_min, r_max, budget, score, score_exponent, exact),
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
        column_names=column_names(column or []),
        dtype=dtype,
        device=device_of(device),
        seed=seed,
        trust_remote_code=trust_remote_code,
        serving=serving,
    )
    allocate(options)


@app.command("compress")
def _compress(
    adapter: Annotated[
        str, typer.Argument(help="Folder of save_pretrained with a trained adapter, or its Hub id.", metavar="ADAPTER")
    ],
    output: Output,
    data: Annotated[str | None, typer.Option(help=DATA_HELP, metavar="DATA")] = None,
    without_data: Annotated[
        bool, typer.Option("--without-data", help="Use only the weights: faster, but blind to the loss.")
    ] = False,
    keep: Annotated[
        float | None, typer.Option(help="Size as a share of the adapter's parameters.", metavar="X", min=0, max=1)
    ] = None,
    r: Annotated[
        int | None, typer.Option("-r", "--r", help="Size as the parameters of uniform rank N.", metavar="N", min=1)
    ] = None,
    max_loss_increase: Annotated[
        float | None,
        typer.Option(help="Smallest adapter whose loss on --eval-data rises by at most X.", metavar="X", min=0),
    ] = None,
    r_max: Annotated[
        int | None, typer.Option(help="Largest rank of a layer, such as max_lora_rank of vLLM.", metavar="N", min=1)
    ] = None,
    serving: Annotated[
        bool, typer.Option("--serving", help="Give all layers one scaling, for servers that read no patterns.")
    ] = False,
    eval_data: Annotated[
        str | None, typer.Option(help="Data on which the loss is measured before and after.", metavar="DATA")
    ] = None,
    eval_split: Annotated[str, typer.Option(help=SPLIT_HELP, metavar="NAME")] = DEFAULT_SPLIT,
    eval_batches: Annotated[
        int | None, typer.Option(help="Batches of --eval-data.", metavar="N", show_default="all", min=1)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, folder or GGUF file of the base model.",
            metavar="MODEL",
            show_default="the one ADAPTER names",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task of an adapter that does not state it.", metavar="|".join(TASKS), show_default="that of ADAPTER"
        ),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(help="Number of calibration batches.", metavar="N", show_default="until two halves agree", min=1),
    ] = None,
    batch_size: BatchSize = DEFAULT_BATCH_SIZE,
    max_length: MaxLength = DEFAULT_MAX_LENGTH,
    split: Split = DEFAULT_SPLIT,
    subset: Subset = None,
    column: Column = None,
    dtype: Dtype = DEFAULT_DTYPE,
    device: Device = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Shrink a trained adapter with a small increase of the loss; the result is an ordinary adapter."""
    require_choice("--dtype", dtype, DTYPES)
    if task is not None:
        require_choice("--task", task, TASKS)
    if (data is None) != without_data:
        raise wrong_usage("--data", "give either --data or --without-data.")
    if max_loss_increase is not None and eval_data is None:
        raise wrong_usage("--max-loss-increase", "the increase is measured: give --eval-data, too.")
    options = CompressOptions(
        adapter=adapter,
        model=model,
        data=data,
        eval_data=eval_data,
        output=output,
        overwrite=overwrite,
        size=_size(keep, r, max_loss_increase),
        r_max=r_max,
        serving=serving,
        batches=batches,
        eval_batches=eval_batches,
        batch_size=batch_size,
        max_length=max_length,
        task=cast(Task | None, task),
        split=split,
        eval_split=eval_split,
        subset=subset,
        column_names=column_names(column or []),
        dtype=dtype,
        device=device_of(device),
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    compress(options)


@app.command("show")
def _show(folder: _Folder) -> None:
    """Print the ranks of an allocation or a compression, and draw its rank map again."""
    result = read_result(folder)
    print_summary(result, {})
    with staged_files(folder) as stage:
        draw_rank_map(result, stage / RANK_MAP)


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
    """Write the ranks of an allocation or a compression in the format of another tool."""
    require_choice("--format", file_format, FORMATS)
    if output is not None:
        require_writable_file(output, overwrite)
    text = export_folder(folder, file_format, serving)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text, make_folders=True)


def _size(keep: float | None, r: int | None, max_loss_increase: float | None) -> dict[str, Any]:
    """The one size that is given, by the name of its argument."""
    sizes: dict[str, Any] = {"keep": keep, "r": r, "max_loss_increase": max_loss_increase}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        raise wrong_usage("--keep", "give exactly one of --keep, --r and --max-loss-increase.")
    [(name, value)] = given.items()
    if not math.isfinite(value) or (name == "keep" and value == 0):
        raise wrong_usage(f"--{name.replace('_', '-')}", f"{value} is not a size.")
    return given


def _fim_config(
    r: int,
    batches: int,
    r_min: int,
    r_max: int | None,
    budget: str,
    score: str,
    score_exponent: float,
    exact: bool,
) -> FimConfig:
    if r_min > r:
        raise wrong_usage("--r-min", f"{r_min} is above -r {r}: give {r} or less.")
    if r_max is not None and r_max < r:
        raise wrong_usage("--r-max", f"{r_max} is below -r {r}: give {r} or more.")
    try:
        return FimConfig(
            fim_calibration_batches=batches,
            r_min=r_min,
            r_max=r_max,
            budget=cast(Budget, budget),
            score=cast(Score, score),
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
            raise wrong_usage("--target-modules", f"{text!r} is not a valid regular expression: {error}.") from error
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise wrong_usage("--target-modules", f"{text!r} has an empty name: remove the extra comma.")
    return names

"""The options of `fim-lora allocate`."""

from pathlib import Path
from typing import Annotated, cast

import typer

from .choices import BUDGETS, DTYPES, SCORES, TASKS, Task
from .errors import require_choice, wrong_usage
from .options import (
    DATA_HELP,
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    DEFAULT_MAX_LENGTH,
    DEFAULT_SPLIT,
    DEFAULT_TASK,
    BatchSize,
    Column,
    Device,
    Dtype,
    Json,
    MaxLength,
    Overwrite,
    Rank,
    Seed,
    Serving,
    Split,
    Subset,
    TrustRemoteCode,
    column_names,
    expanded,
    target_modules_of,
)

# What decides ranks by scores that were measured before. The other options are those of a calibration.
_OPTIONS_WITH_SCORES = {
    *("scores", "output", "overwrite", "as_json"),
    *("r", "r_min", "r_max", "budget", "score", "score_exponent", "lora_alpha", "serving"),
}


def allocate_command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or GGUF file of the model.", metavar="MODEL", callback=expanded)
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP, metavar="DATA", callback=expanded)] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --model and --data: an earlier result, to allocate by its scores.",
            metavar="DIR",
            callback=expanded,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the result.", metavar="DIR", callback=expanded)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the targets, the size and the expected time; write nothing.")
    ] = False,
    r: Rank = 8,
    r_min: Annotated[
        int, typer.Option(help="Smallest rank of a layer; with 0, a layer may get no adapter.", metavar="N", min=0)
    ] = 1,
    r_max: Annotated[
        int | None, typer.Option(help="Largest rank of a layer.", metavar="N", show_default="4 * r", min=1)
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Total that stays the same as with uniform ranks.", metavar="|".join(BUDGETS))
    ] = "parameters",
    score: Annotated[
        str,
        typer.Option(help="Ranks by the gradient's norm or by the mean of the eFIM.", metavar="|".join(SCORES)),
    ] = "norm",
    score_exponent: Annotated[
        float, typer.Option(help="Ranks are proportional to score ** exponent; below 1, they vary less.", metavar="X")
    ] = 1.0,
    exact: Annotated[
        bool, typer.Option("--exact", help="Measure long examples exactly, too, without a random projection.")
    ] = False,
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
    batches: Annotated[int, typer.Option(help="Number of calibration batches.", metavar="N", min=1)] = 8,
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
    serving: Serving = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure how sensitive every layer is, and write a LoRA config with a rank for each."""
    require_choice("--budget", budget, BUDGETS)
    require_choice("--score", score, SCORES)
    require_choice("--task", task, TASKS)
    require_choice("--dtype", dtype, DTYPES)
    _require_bounds(r, r_min, r_max)
    _require_options(context, model, data, scores, output, dry_run)
    columns, targets = column_names(column or []), target_modules_of(target_modules)

    from fim_lora.cli.allocate import AllocateOptions, allocate
    from fim_lora.cli.device import device_of
    from fim_lora.cli.new_config import new_lora_config
    from fim_lora.cli.reallocate import reallocate

    bounds = {"r_min": r_min, "r_max": r_max, "budget": budget}
    measured = {"fim_calibration_batches": batches, "score": score, "score_exponent": score_exponent, "exact": exact}
    config = new_lora_config(r, lora_alpha, targets, cast(Task, task), **bounds, **measured)
    if scores is not None:
        reallocate(scores, config, cast(Path, output), overwrite, serving, as_json)
        return
    options = AllocateOptions(
        model=cast(str, model),
        data=cast(str, data),
        output=output,
        overwrite=overwrite,
        lora_config=config,
        batch_size=batch_size,
        max_length=max_length,
        task=cast(Task, task),
        split=split,
        subset=subset,
        column_names=columns,
        dtype=dtype,
        device=device_of(device),
        seed=seed,
        trust_remote_code=trust_remote_code,
        serving=serving,
        as_json=as_json,
        dry_run=dry_run,
    )
    allocate(options)


def _require_options(
    context: typer.Context,
    model: str | None,
    data: str | None,
    scores: Path | None,
    output: Path | None,
    dry_run: bool,
) -> None:
    """Refuse missing options, and those that have no effect on scores that were measured before."""
    if output is None and not dry_run:
        context.fail("Missing option '--output'.")
    if scores is None:
        for option, value in (("--model", model), ("--data", data)):
            if value is None:
                context.fail(f"Missing option '{option}'. Give --model and --data, or an earlier result as --scores.")
        return
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and parameter.name not in _OPTIONS_WITH_SCORES:
            context.fail(f"{parameter.opts[-1]} has no effect with --scores, which does not calibrate: leave it out.")


def _require_bounds(r: int, r_min: int, r_max: int | None) -> None:
    if r_min > r:
        raise wrong_usage("--r-min", f"{r_min} is above -r {r}: give {r} or less.")
    if r_max is not None and r_max < r:
        raise wrong_usage("--r-max", f"{r_max} is below -r {r}: give {r} or more.")

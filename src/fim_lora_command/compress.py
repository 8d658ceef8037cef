"""The options of `fim-lora compress`."""

import math
from typing import Annotated, Any, cast

import typer

from .choices import DTYPES, TASKS, Task
from .errors import require_choice, wrong_usage
from .options import (
    DATA_HELP,
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    DEFAULT_MAX_LENGTH,
    DEFAULT_SPLIT,
    SPLIT_HELP,
    BatchSize,
    Column,
    Device,
    Dtype,
    Json,
    MaxLength,
    Output,
    Overwrite,
    Seed,
    Split,
    Subset,
    TrustRemoteCode,
    column_names,
    expanded,
)


def compress_command(
    adapter: Annotated[
        str,
        typer.Argument(
            help="Folder of save_pretrained with a trained adapter, or its Hub id.",
            metavar="ADAPTER",
            callback=expanded,
        ),
    ],
    output: Output,
    data: Annotated[str | None, typer.Option(help=DATA_HELP, metavar="DATA", callback=expanded)] = None,
    without_data: Annotated[
        bool, typer.Option("--without-data", help="Use only the weights: faster, but blind to the loss.")
    ] = False,
    keep: Annotated[
        float | None, typer.Option(help="Size as a share of the adapter's parameters.", metavar="X", min=0, max=1)
    ] = None,
    r: Annotated[
        int | None, typer.Option("-r", "--rank", help="Size as the parameters of uniform rank N.", metavar="N", min=1)
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
        str | None,
        typer.Option(help="Data on which the loss is measured before and after.", metavar="DATA", callback=expanded),
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
            callback=expanded,
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
    as_json: Json = False,
) -> None:
    """Shrink a trained adapter with a small increase of the loss; the result is an ordinary adapter."""
    require_choice("--dtype", dtype, DTYPES)
    if task is not None:
        require_choice("--task", task, TASKS)
    if (data is None) != without_data:
        raise wrong_usage("--data", "give either --data or --without-data.")
    if max_loss_increase is not None and eval_data is None:
        raise wrong_usage("--max-loss-increase", "the increase is measured: give --eval-data, too.")
    _require_effect(data, batches, eval_data, eval_batches)
    size, columns = _size(keep, r, max_loss_increase), column_names(column or [])

    from fim_lora.cli.compress import compress
    from fim_lora.cli.compress_inputs import CompressOptions
    from fim_lora.cli.device import device_of

    options = CompressOptions(
        adapter=adapter,
        model=model,
        data=data,
        eval_data=eval_data,
        output=output,
        overwrite=overwrite,
        size=size,
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
        column_names=columns,
        dtype=dtype,
        device=device_of(device),
        seed=seed,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
    )
    compress(options)


def _require_effect(data: str | None, batches: int | None, eval_data: str | None, eval_batches: int | None) -> None:
    if data is None and batches is not None:
        raise wrong_usage("--batches", "it has no effect with --without-data.")
    if eval_data is None and eval_batches is not None:
        raise wrong_usage("--eval-batches", "it has no effect without --eval-data.")


def _size(keep: float | None, r: int | None, max_loss_increase: float | None) -> dict[str, Any]:
    """The one size that is given, by the name of its argument."""
    sizes: dict[str, Any] = {"keep": keep, "r": r, "max_loss_increase": max_loss_increase}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        raise wrong_usage("--keep", "give exactly one of --keep, --rank and --max-loss-increase.")
    [(name, value)] = given.items()
    if not math.isfinite(value) or (name == "keep" and value == 0):
        raise wrong_usage(f"--{name.replace('_', '-')}", f"{value} is not a size.")
    return given

"""The calibration loop: it runs batches through the model, and restores the model at the end."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..runtime.distributed import batches_in_lockstep, gather_from_all, num_processes
from ..runtime.flags import frozen_eval_mode
from ..runtime.progress import progress_bar
from ..runtime.unfinished_dataloaders import unfinished_dataloaders_ended
from ..runtime.user_warnings import warn_user
from ..runtime.wrappers import needs_all_processes, unwrap_engine
from .coverage import CAUSES_OF_NO_GRADIENT
from .doubts import NAME_THE_LABELS
from .layers.batch_size import batch_size_of, loss_terms_of
from .layers.registry import TargetLayer
from .recorder import Recorder
from .row_probe import RowProbe
from .statistic import Statistic

ForwardFn = Callable[[nn.Module, Any], Any]
Result = TypeVar("Result")


def forward_fn_default(model: nn.Module, batch: Any) -> Any:
    """Call a model as `transformers` models are called: a mapping is passed as keyword arguments.

    A tuple or list is passed as positional arguments, anything else as the only argument.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def calibrate(
    model: nn.Module,
    layers: Mapping[str, TargetLayer | nn.Module],
    statistic: Statistic[Any, Result],
    dataloader: Iterable[Any],
    num_batches: int,
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
    loss_communicates: bool = False,
    sequences_per_example: int = 1,
    enough: Callable[[Any], bool] | None = None,
    before_batch: Callable[[int], object] = lambda number: None,
) -> Result:
    """Collect a statistic of `layers` over some batches, in eval mode.

    With several processes, each one calibrates on the batches of its own `dataloader`, and all get the result over
    all examples. They may have different numbers of batches, or none. If one fails, all raise. If a pass through the
    model needs all processes (FSDP, ZeRO-3, `loss_communicates`) and one fails inside it, the others notice it
    when its process ends, as in training.

    Training mode, `requires_grad`, `.grad` and hooks of the model are restored, also after an exception. The cost is
    a forward pass, and a backward pass with respect to activations. Where the shape of a layer's input leaves open
    which rows belong to which example, one or two more forward passes of that batch, with its examples in another
    order, decide it for all inputs of this form.

    Args:
        model: The model; with its adapters disabled, if the statistic is of base layers.
        layers: Name to target layer, PEFT's LoRA layer or base layer.
        statistic: What to measure on these layers.
        dataloader: Yields batches: mappings, tuples or tensors, with what the loss needs.
        num_batches: Batches to use in each process. If there are fewer, those are used, with a warning.
        forward_fn: Takes model and batch, returns something with `.loss` or `["loss"]`, or a scalar loss.
        show_progress_bar: Whether to show a progress bar.
        loss_communicates: Whether `forward_fn` exchanges something between processes, as trainers do for metrics.
        sequences_per_example: Sequences that make up one example, such as 2 for batches of chosen texts followed by
            the rejected ones.
        enough: Function of the statistic over the examples of all processes, which is asked after 2, 4, 8, 16, …
            batches whether they are enough. `num_batches` is then only the limit, and the dataloader may have fewer.
        before_batch: Called before the passes of each batch, with its number among the batches of all processes.

    Returns:
        The result of the statistic.

    Raises:
        TypeError: If a layer's class is not supported, or the output holds no loss.
        ValueError: If the loss is missing, not scalar or detached, or the dataloader is empty.
        RuntimeError: See `result` of the statistic, such as `NormSums.result`.
    """
    model = unwrap_engine(model)
    probe = RowProbe()
    recorder = Recorder(layers, statistic, NAME_THE_LABELS, probe)
    forward_fn = forward_fn or forward_fn_default
    in_lockstep = loss_communicates or needs_all_processes(model)
    may_fail = num_processes() == 1 or not in_lockstep

    def run(batch: Any, counts: bool) -> None:
        batch = send_to_device(batch, device_of(model))
        rows = batch_size_of(batch, getattr(model, "main_input_name", None))
        size = None if rows.examples is None else rows.examples // sequences_per_example
        with recorder.batch(size, sequences_per_example, counts, loss_terms_of(batch, size, model)):
            recorder.note_batch_size(rows)
            probe.begin_batch(batch, device_of(model))
            loss = loss_of(forward_fn(model, batch))
            if dimensions := _agreed(probe.dimensions(size), in_lockstep):
                further = partial(_loss_of_batch, model, forward_fn)
                probe.decide(further, size or 1, dimensions, loss.detach(), may_fail)
            recorder.note_loss(loss)
            loss.backward()

    with (
        unfinished_dataloaders_ended(),
        frozen_eval_mode(model),
        torch.compiler.set_stance("force_eager"),  # compiled code would not call the hooks
        torch.enable_grad(),
        recorder.recording(),
        progress_bar(total=num_batches, description="eFIM", unit="batch", show=show_progress_bar) as progress,
    ):
        for turn, (batch, is_own, number) in enumerate(batches_in_lockstep(dataloader, num_batches, in_lockstep)):
            if enough is not None and _is_power_of_two(turn) and enough(recorder.merged_statistic()):
                break
            before_batch(number)
            if in_lockstep:
                run(batch, is_own)
            else:
                gather_from_all(lambda: run(batch, True) if is_own else None)  # noqa: B023  called at once
            progress.update(is_own)
    _require_batches(recorder.num_batches, num_batches if enough is None else 0)
    return recorder.result()


def _agreed(dimensions: tuple[int, ...], in_lockstep: bool) -> tuple[int, ...]:
    """The dimensions of `RowProbe.dimensions`, the same ones in all processes that run the model together."""
    return max(gather_from_all(lambda: dimensions), key=len) if in_lockstep else dimensions


def _loss_of_batch(model: nn.Module, forward_fn: ForwardFn, batch: Any) -> Tensor:
    return loss_in(forward_fn(model, batch))


def _is_power_of_two(turn: int) -> bool:
    return turn > 1 and turn & (turn - 1) == 0


def _require_batches(seen: int, num_batches: int) -> None:
    if not any(gather_from_all(lambda: seen)):
        raise ValueError("The dataloader yielded no batch: the eFIM needs at least one.")
    if seen < num_batches:
        warn_user(
            f"The dataloader yielded {seen} batches, but {num_batches} were asked for (by fim_calibration_batches or "
            f"num_batches): the eFIM is averaged over {seen} batches. Provide more batches, or ask for fewer."
        )


def loss_of(output: Any) -> Tensor:
    """The scalar loss in what a forward function returned, ready for a backward pass.

    Raises:
        TypeError: If the output holds no loss.
        ValueError: If the loss is `None`, has more than one element, or requires no gradient.
    """
    loss = loss_in(output)
    if not loss.requires_grad:
        raise ValueError(f"The loss depends on no target layer. {CAUSES_OF_NO_GRADIENT}")
    return loss


def loss_in(output: Any) -> Tensor:
    """The scalar loss in what a forward function returned: `.loss`, `["loss"]`, or the output itself.

    Raises:
        TypeError: If the output holds no loss.
        ValueError: If the loss is `None` or has more than one element.
    """
    loss = output
    if isinstance(output, Mapping) and "loss" in output:
        loss = output["loss"]
    elif not isinstance(output, Tensor) and hasattr(output, "loss"):
        loss = output.loss
    elif not isinstance(output, Tensor):
        raise TypeError(
            f"The forward pass returned a {type(output).__name__} without `.loss` and `['loss']`: put labels into "
            "the batches, or pass a `forward_fn` that returns the loss."
        )
    if loss is None:
        raise ValueError(
            "The model returned loss=None: put labels into the batches, or return a loss in `forward_fn`."
        )
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss is a {type(loss).__name__}, not a tensor: return a tensor from `forward_fn`.")
    if loss.numel() != 1:
        raise ValueError(f"The loss has shape {tuple(loss.shape)}; it must be a scalar, the mean over examples.")
    return loss


def device_of(model: nn.Module) -> torch.device:
    """The device of the inputs: that of the first parameter that is not on the meta device."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

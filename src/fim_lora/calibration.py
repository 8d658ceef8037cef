"""The calibration loop: batches through the model, and the model afterwards as it was before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from .distributed import gathered, in_step
from .estimator import FisherEstimator
from .examples import batch_size_of
from .fisher_sums import CAUSES_OF_NO_GRADIENT
from .layer_types import TargetLayer
from .scores import FimScores
from .wrappers import is_sharded, without_engine

ForwardFn = Callable[[nn.Module, Any], Any]


def forward_fn_default(model: nn.Module, batch: Any) -> Any:
    """Call the model as `transformers` models are called.

    Args:
        model: The model.
        batch: Its keyword arguments; a tuple or list is passed as positional arguments, a tensor as the only one.

    Returns:
        The model's output.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def calibrate(
    model: nn.Module,
    layers: Mapping[str, TargetLayer | nn.Module],
    dataloader: Iterable[Any],
    num_batches: int,
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
    loss_communicates: bool = False,
    sequences_per_example: int = 1,
    exact: bool = False,
) -> FimScores:
    """Accumulate the eFIM of `layers` over some batches, in eval mode.

    With several processes each calibrates on the batches of its own `dataloader`, and all get the scores over all
    examples. They may have different numbers of batches, or none. If one fails, all raise; only where a pass through
    the model needs all of them (FSDP, ZeRO-3, `loss_communicates`) and one fails inside it, the others learn of it
    when its process ends, as in training.

    Training mode, `requires_grad`, `.grad` and hooks of the model are afterwards what they were, also after an
    exception. The cost is a forward pass and a backward pass with respect to activations.

    Args:
        model: The model, with its adapters disabled.
        layers: Name to target layer, PEFT's LoRA layer or base layer.
        dataloader: Yields batches: mappings, tuples or tensors, with what the loss needs.
        num_batches: Batches to use, in each process. If there are fewer, those are used, with a warning.
        forward_fn: Takes model and batch, returns something with `.loss` or `["loss"]`, or a scalar loss.
        show_progress_bar: Whether to show one.
        loss_communicates: Whether `forward_fn` itself exchanges something between processes, as trainers do for
            their metrics.
        sequences_per_example: Sequences that make one example, such as 2 for batches of chosen texts followed by
            the rejected ones.
        exact: `FimConfig.exact`.

    Returns:
        The scores.

    Raises:
        TypeError: If a layer's class is not supported, or the output holds no loss.
        ValueError: If the loss is missing, not scalar or detached, or the dataloader is empty.
        RuntimeError: If no batch has finite gradients, or every score is zero.
    """
    model = without_engine(model)
    estimator = FisherEstimator(layers, exact=exact)
    forward_fn = forward_fn or forward_fn_default
    together = loss_communicates or is_sharded(model)

    def run(batch: Any, counts: bool) -> None:
        batch = send_to_device(batch, _device_of(model))
        rows = batch_size_of(batch, getattr(model, "main_input_name", None))
        size = None if rows is None else rows // sequences_per_example
        with estimator.batch(size, sequences_per_example, counts):
            loss = loss_of(forward_fn(model, batch))
            estimator.note_loss(loss)
            loss.backward()

    with (
        frozen_in_eval_mode(model),
        torch.compiler.set_stance("force_eager"),  # compiled code would not know of the hooks
        torch.enable_grad(),
        _attached(estimator),
        tqdm(total=num_batches, desc="eFIM", unit="batch", disable=not show_progress_bar) as progress,
    ):
        for batch, is_own in in_step(dataloader, num_batches, with_stand_ins=together):
            if together:
                run(batch, is_own)
            else:
                gathered(lambda: run(batch, True) if is_own else None)  # noqa: B023  called at once
            progress.update(is_own)
    seen = estimator.num_batches
    if not any(gathered(lambda: seen)):
        raise ValueError("The dataloader yielded no batch: the eFIM needs at least one.")
    if seen < num_batches:
        warnings.warn(
            f"The dataloader yielded {seen} batches where fim_calibration_batches={num_batches} were asked for; the "
            "eFIM is averaged over those.",
            stacklevel=3,
        )
    return estimator.scores()


def loss_of(output: Any) -> Tensor:
    """The scalar loss in what a forward function returned.

    Args:
        output: Something with `.loss` or `["loss"]`, or the loss itself.

    Returns:
        The loss, a tensor with one element that requires a gradient.

    Raises:
        TypeError: If there is no loss in it.
        ValueError: If the loss is `None`, has more than one element, or requires no gradient.
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
        raise ValueError("The model returned loss=None: the batches need labels, or `forward_fn` a loss.")
    if not isinstance(loss, Tensor):
        raise TypeError(f"The loss is a {type(loss).__name__}, not a tensor.")
    if loss.numel() != 1:
        raise ValueError(f"The loss has shape {tuple(loss.shape)}; it must be a scalar, the mean over examples.")
    if not loss.requires_grad:
        raise ValueError(f"The loss depends on no target layer. {CAUSES_OF_NO_GRADIENT}")
    return loss


@contextmanager
def _attached(estimator: FisherEstimator) -> Iterator[None]:
    estimator.attach()
    try:
        yield
    finally:
        estimator.detach()


@contextmanager
def frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no trained parameter; both are set back per module and per parameter.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in requires_grad:
            parameter.requires_grad_(False)
        for module, _ in training:
            if type(module).__module__.startswith("bitsandbytes."):
                # In eval mode it may take kernels for inference, coarser and without a gradient. Nothing else in its
                # layers depends on the mode.
                module.training = True
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, needed in requires_grad:
            parameter.requires_grad_(needed)


def _device_of(model: nn.Module) -> torch.device:
    """Where inputs go: the device of the first parameter that is on one."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

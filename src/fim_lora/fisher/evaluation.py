"""The loss of a model over batches, measured by forward passes in eval mode."""

import math
from collections.abc import Callable, Iterable
from operator import length_hint
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..runtime.distributed import batches_in_lockstep, gather_from_all
from ..runtime.flags import eval_mode
from ..runtime.progress import progress_bar
from ..runtime.wrappers import needs_all_processes, unwrap_engine
from .calibration import device_of, forward_fn_default, loss_in
from .layers.batch_size import batch_size_of, loss_terms_of


def mean_loss(
    model: nn.Module,
    dataloader: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    show_progress_bar: bool = True,
) -> float:
    """The mean loss over all batches of all processes, each batch with the weight of its loss terms.

    The terms of a batch are its labels that are not -100, for labels of tokens, and otherwise its examples; see
    `loss_terms_of`. The training mode of the model is restored.

    Raises:
        TypeError: If the output holds no loss.
        ValueError: If there is no batch, or a loss is missing, not scalar or not finite.
        RuntimeError: If another process failed.
    """
    model = unwrap_engine(model)
    forward_fn = forward_fn or forward_fn_default
    in_lockstep = needs_all_processes(model)
    total, terms = 0.0, 0

    def run(batch: Any, counts: bool) -> None:
        nonlocal total, terms
        batch = send_to_device(batch, device_of(model))
        examples = batch_size_of(batch, getattr(model, "main_input_name", None)).examples
        size = loss_terms_of(batch, examples, model) or 1
        loss = float(loss_in(forward_fn(model, batch)))
        if not math.isfinite(loss):
            raise ValueError(f"The loss of a batch of `eval_dataloader` is {loss}: look for batches without labels.")
        if counts:
            total, terms = total + loss * size, terms + size

    length = length_hint(dataloader) or None  # a dataloader over a stream has no length
    bar = progress_bar(total=length, description="loss", unit="batch", show=show_progress_bar)
    with eval_mode(model), torch.no_grad(), bar as progress:
        for batch, is_own, _ in batches_in_lockstep(dataloader, None, with_stand_ins=in_lockstep):
            if in_lockstep:
                run(batch, is_own)
            else:
                gather_from_all(lambda: run(batch, True) if is_own else None)  # noqa: B023  called at once
            progress.update(is_own)
    sums = gather_from_all(lambda: (total, terms))
    if not any(count for _, count in sums):
        raise ValueError("`eval_dataloader` yielded no batch: the loss needs at least one.")
    return sum(loss for loss, _ in sums) / sum(count for _, count in sums)

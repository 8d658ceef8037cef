"""`get_fim_diagonals`: from a model and batches to the eFIM diagonal of every element of its weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .adapter.adapted_part import adapted_parts
from .adapter.base_layers import select_base_layers, tied_layers
from .adapter.watching import lora_layers_disabled
from .fisher.calibration import ForwardFn, calibrate
from .fisher.diagonal import DiagonalSums
from .fisher.fim_diagonals import FimDiagonals
from .runtime.distributed import run_on_all
from .runtime.user_warnings import warn_user
from .runtime.wrappers import unwrap_engine


def get_fim_diagonals(
    model: nn.Module,
    dataloader: Iterable[Any],
    parameters: Iterable[str] | None = None,
    *,
    num_batches: int = 8,
    forward_fn: ForwardFn | None = None,
    device: torch.device | str | None = "cpu",
    show_progress_bar: bool = True,
) -> FimDiagonals:
    """The eFIM diagonal of every element of some weights: the mean over examples of squared per-example gradients.

    It is exact: no gradient is sketched, and the squares are of single examples, not of a batch. The loss is the mean
    over the examples of a batch. Biases and other parameters are not measured.

    The memory is one more copy of each weight in float32 (float64 for a model in float64), and a bounded temporary
    memory. The weights themselves may be quantized, sharded or offloaded. The cost is a forward pass, a backward pass
    with respect to activations, and as many operations as the gradients of these weights take.

    Args:
        model: A model in any state; it is calibrated in eval mode and restored. The LoRA layers of a model with LoRA
            adapters are disabled meanwhile, and base layers are named as in the base model. If only a part of the
            model was adapted by PEFT, the layers are those of this part.
        dataloader: Yields batches, see `initialize_lora_fim_ranks`.
        parameters: Full names of linear layers (`nn.Linear`, quantized ones, `Conv1D` of transformers), embeddings and
            convolutions, or of their weights (`"lm_head"` or `"lm_head.weight"`), or of modules that contain such
            layers (`"model.layers.0"`). By default all of these layers of the model, without the inside of
            `nn.MultiheadAttention` and without modules that PEFT trains as a whole (`modules_to_save`).
        num_batches: Batches to use in each process; if there are fewer, those are used, with a warning.
        forward_fn: See `initialize_lora_fim_ranks`.
        device: Where the diagonals are kept. By default on the host, because a GPU that holds the model may not have
            the memory. `None` keeps each one on the device of its layer, which is faster on a GPU.
        show_progress_bar: Whether to show a progress bar.

    Returns:
        Layer name, as in the base model and without `.weight`, to a tensor of the shape of the weight of that layer,
        so that `d_in` comes first for `Conv1D` of transformers. It is accepted as `fim_scores` by
        `initialize_lora_fim_ranks` if it is measured on exactly the target layers of the adapter.

    Raises:
        ValueError: If a name in `parameters` is not that of a supported layer, or there is none; if `num_batches` is
            not positive; if the model has adapters other than LoRA, or in several parts, or an adapter is merged; if
            the dataloader is empty or its batches give no usable loss.
        RuntimeError: If a layer has no batch with finite gradients, its eFIM is too large for the dtype, the eFIM of
            every layer is zero, or another process failed.
        TypeError: If `parameters` is a single string, or the forward pass returns no loss.
    """
    if isinstance(num_batches, bool) or not isinstance(num_batches, int) or num_batches < 1:
        raise ValueError(f"num_batches must be a positive integer, got {num_batches!r}.")
    model = unwrap_engine(model)
    part = run_on_all(lambda: _part_to_measure(model))
    layers = run_on_all(lambda: select_base_layers(part, parameters))
    _warn_of_tied_weights(tied_layers(part, layers))
    statistic = DiagonalSums(layers, None if device is None else torch.device(device))
    with lora_layers_disabled(model, part):
        counts = calibrate(
            model=model,
            layers=layers,
            statistic=statistic,
            dataloader=dataloader,
            num_batches=num_batches,
            forward_fn=forward_fn,
            show_progress_bar=show_progress_bar,
        )
    return statistic.mean(counts, layers)


def _part_to_measure(model: nn.Module) -> nn.Module:
    """The part of the model that has adapters, or the whole model without any, so that names are those of scores."""
    parts = adapted_parts(model)
    if len(parts) > 1:
        raise ValueError(
            f"The {type(model).__name__} has {len(parts)} parts with adapters: {', '.join(map(repr, parts))}. Pass "
            "one of them as the model, with a `forward_fn` that runs the whole model."
        )
    return next(iter(parts.values()), model)


def _warn_of_tied_weights(tied: list[str]) -> None:
    if tied:
        warn_user(
            f"{len(tied)} layers share their weight with another layer: {tied}. The diagonal of each is that of its "
            "own use of the weight, as if it were not shared."
        )

"""`get_fim_diagonals`: from a model and batches to the eFIM diagonal of every element of its weights."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .adapter.base_layers import select_base_layers, tied_layers
from .adapter.watching import lora_layers_disabled
from .fisher.calibration import ForwardFn, calibrate, forward_fn_default, loss_of
from .fisher.diagonal import DiagonalSums
from .fisher.fim_diagonals import FimDiagonals
from .runtime.distributed import run_on_all
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
            adapters are disabled meanwhile, and base layers are named as in the base model.
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
            not positive; if the model has adapters other than LoRA, or an adapter is merged; if the dataloader is
            empty or its batches give no usable loss.
        RuntimeError: If a layer has no batch with finite gradients, its eFIM is too large for the dtype, the eFIM of
            every layer is zero, or another process failed.
        TypeError: If `parameters` is a single string, or the forward pass returns no loss.
    """
    if isinstance(num_batches, bool) or not isinstance(num_batches, int) or num_batches < 1:
        raise ValueError(f"num_batches must be a positive integer, got {num_batches!r}.")
    model = unwrap_engine(model)
    layers = run_on_all(lambda: select_base_layers(model, parameters))
    _warn_of_tied_weights(tied_layers(model, layers))
    statistic = DiagonalSums(layers, None if device is None else torch.device(device))
    batches = _AnnouncedBatches(statistic, dataloader, forward_fn or forward_fn_default)
    with lora_layers_disabled(model):
        counts = calibrate(
            model=model,
            layers=layers,
            statistic=statistic,
            dataloader=batches,
            num_batches=num_batches,
            forward_fn=batches.forward,
            show_progress_bar=show_progress_bar,
        )
    return statistic.mean(counts, layers)


class _AnnouncedBatches:
    """A dataloader and a forward function that tell a statistic about each batch before its backward pass.

    A batch counts if its loss is finite, and if it is one of this process: with FSDP and ZeRO-3, a process that has
    run out of batches runs those of others.
    """

    def __init__(self, statistic: DiagonalSums, dataloader: Iterable[Any], forward_fn: ForwardFn) -> None:
        self._statistic = statistic
        self._dataloader = dataloader
        self._forward_fn = forward_fn
        self._num_fetched = self._num_run = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self._dataloader:
            self._num_fetched += 1
            yield batch

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run the forward function."""
        output = self._forward_fn(model, batch)
        self._num_run += 1
        is_own = self._num_run <= self._num_fetched
        self._statistic.begin_batch(is_own and bool(loss_of(output).isfinite().all()))
        return output


def _warn_of_tied_weights(tied: list[str]) -> None:
    if tied:
        warnings.warn(
            f"{len(tied)} layers share their weight with another layer: {tied}. The diagonal of each is that of its "
            "own use of the weight, as if it were not shared.",
            stacklevel=3,
        )

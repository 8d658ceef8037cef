"""`calibration_batch`: states how many examples a batch has, in a training loop of your own."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .adapter.adapted_part import adapted_part
from .adapter.pending_config import lora_config_of
from .adapter.watching import watched_adapter
from .fisher.declaration import ROW_ORDERS, Declaration, RowOrder
from .runtime.wrappers import unwrap_engine


@contextmanager
def calibration_batch(
    model: nn.Module, num_examples: int, *, rows: RowOrder = "consecutive", adapter_name: str = "default"
) -> Iterator[None]:
    """Say how many examples a batch has, and which rows belong to each, in a loop of your own before the allocation.

    Put it around the forward and backward pass of a batch whose inputs do not show it: one that
    `initialize_lora_fim_ranks` warns of, or inputs that are stacked before the model is called, which nothing shows.
    With a `dataloader` it is not needed, because the function then runs a batch again, with its examples in another
    order. When the adapter has its ranks, the block has no effect.

    Args:
        model: The model with the adapter that awaits its ranks.
        num_examples: Examples in the batch: the number over which the loss is a mean. If every forward pass of the
            batch has this many rows, they are views of the same examples. If all of them together have, they are
            pieces of the batch. If every one has k times as many, they hold k rows for each example.
        rows: How rows follow each other where there are several for each example, in the inputs of the model or of a
            layer: `"consecutive"`, as after `hidden.view(-1, d)`; `"stacked"`, as after `torch.cat([first, second])`,
            where row t and row t + `num_examples` belong together; or `"sequence-first"`, where the second dimension
            of a layer's input is the batch.
        adapter_name: The adapter.

    Raises:
        ValueError: If the model has no such adapter, `num_examples` is not a positive integer, `rows` is none of
            these, or no forward pass is inside the block. The backward pass raises it if the numbers of rows fit none
            of these readings.
    """
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise ValueError(f"num_examples must be a positive integer, got {num_examples!r}.")
    if rows not in ROW_ORDERS:
        raise ValueError(f"rows={rows!r} is unknown: choose 'consecutive', 'stacked' or 'sequence-first'.")
    model = unwrap_engine(model)
    lora_config_of(adapted_part(model, adapter_name), adapter_name)  # raises if there is no such adapter
    recorder = watched_adapter(model, adapter_name).recorder
    if recorder is None:
        yield
        return
    with recorder.declared(Declaration(num_examples, rows)):
        yield

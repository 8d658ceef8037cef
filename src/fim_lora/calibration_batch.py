"""`calibration_batch`: says what the batches of a loop of one's own do not show."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

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
        ValueError: If `num_examples` is not a positive integer, `rows` is none of these, or no forward pass is inside
            of the block. The backward pass raises it if the numbers of rows fit to none of these readings.
    """
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise ValueError(f"num_examples must be a positive integer, got {num_examples!r}.")
    if rows not in ROW_ORDERS:
        raise ValueError(f"rows={rows!r} is unknown: choose 'consecutive', 'stacked' or 'sequence-first'.")
    recorder = watched_adapter(unwrap_engine(model), adapter_name).recorder
    if recorder is None:
        yield
        return
    with recorder.declared(Declaration(num_examples, rows)):
        yield

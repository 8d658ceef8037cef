"""Dataloaders of Accelerate that are left in the middle of their batches."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import GradientState


@contextmanager
def unfinished_dataloaders_ended() -> Iterator[None]:
    """Let Accelerate forget the dataloaders that the block began and did not read to their end.

    Otherwise it would treat whatever follows as the rest of them: gradient accumulation would follow their end, and
    `gather_for_metrics` would cut the last batch as theirs is cut.
    """
    state = GradientState()
    before = [id(dataloader) for dataloader in state.dataloader_references]
    try:
        yield
    finally:
        for dataloader in state.dataloader_references:
            if dataloader is not None and id(dataloader) not in before:
                dataloader.end()

"""Several processes: what they have to tell one another, and how none of them waits for one that has failed.

Everything here is a no-op for a single process. `torch.distributed` with any backend will do; FSDP, DDP and
Accelerate set it up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device

from .calls import RandomState

T = TypeVar("T")

_END = object()


def num_processes() -> int:
    """Processes that train together.

    Returns:
        Their number; 1 if `torch.distributed` is not in use.
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Which of them this process is.

    Returns:
        Its rank; 0 if `torch.distributed` is not in use.
    """
    return 0 if num_processes() == 1 else dist.get_rank()


def is_main_process() -> bool:
    """Whether this is the process that speaks for all.

    Returns:
        Whether it is process 0, or the only one.
    """
    return process_number() == 0


def gathered(function: Callable[[], T]) -> list[T]:
    """Call a function in every process, and give all results to all. If it raises in one of them, all raise.

    Args:
        function: Returns something that can be pickled. It must not communicate itself: a process that raises
            there would leave the others waiting.

    Returns:
        The results, in the order of the processes.

    Raises:
        Exception: Whatever `function` raised in this process.
        RuntimeError: If it raised in another one. It names the process and its error.
    """
    if num_processes() == 1:
        return [function()]
    result: T | None = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:  # not KeyboardInterrupt, which must not wait for others
        error = raised
    told = None if error is None else f"{type(error).__name__}: {error}"
    answers: list[Any] = [None] * num_processes()
    dist.all_gather_object(answers, (result, told))
    if error is not None:
        raise error
    for process, (_, failure) in enumerate(answers):
        if failure is not None:
            raise RuntimeError(f"Process {process} failed, so all stop. Its error: {failure}")
    return [answer for answer, _ in answers]


def together(function: Callable[[], T]) -> T:
    """Call a function in every process, each for itself. If it raises in one of them, all raise.

    Args:
        function: See `gathered`; its result may be anything.

    Returns:
        The result of this process.

    Raises:
        Exception: Whatever `function` raised in this process.
        RuntimeError: If it raised in another one.
    """
    results: list[T] = []
    gathered(lambda: results.append(function()))
    return results[0]


def in_step(dataloader: Iterable[Any], limit: int, with_stand_ins: bool) -> Iterator[tuple[Any, bool]]:
    """The batches of this process, with as many turns as the process with the most batches has.

    Args:
        dataloader: Batches of this process; may be fewer than elsewhere, or none.
        limit: Batches to take, at most.
        with_stand_ins: Whether a process without a batch needs another one's, because a pass through the model
            takes part of all of them.

    Yields:
        A batch, and whether it is one of this process; otherwise it is a stand-in, or `None`.

    Raises:
        Exception: Whatever `dataloader` raised in this process.
        RuntimeError: If it raised in another one.
    """
    batches: Iterator[Any] | None = None
    batch: Any = None

    def fetch() -> bool:
        nonlocal batches, batch
        batches = islice(iter(dataloader), limit) if batches is None else batches
        batch = next(batches, _END)
        return batch is not _END

    while any(have_batch := gathered(fetch)):
        own = batch is not _END
        if with_stand_ins and not all(have_batch):
            stand_in = _from_process(have_batch.index(True), batch)
            batch = batch if own else stand_in
        yield (batch if own or with_stand_ins else None), own


def _from_process(source: int, batch: Any) -> Any:
    """The batch of one process, in all of them."""
    carrier = [send_to_device(batch, "cpu") if dist.get_rank() == source else None]
    dist.broadcast_object_list(carrier, src=source)
    return carrier[0]


@contextmanager
def same_random_numbers(*tensors: torch.Tensor) -> Iterator[None]:
    """Random numbers inside are those of process 0 in every process; outside, those of each process go on.

    Args:
        tensors: Tensors on the devices where random numbers are drawn, apart from the host.

    Yields:
        Nothing.
    """
    if num_processes() == 1:
        yield
        return
    own = RandomState.of(tensors)
    (first, *_) = gathered(lambda: (own.host, own.states))
    if is_main_process():
        yield
        return
    with dataclasses.replace(own, host=first[0], states=first[1]).restored():
        yield

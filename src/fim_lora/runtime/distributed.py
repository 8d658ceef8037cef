"""Exchange between the processes of a distributed run, so that no process waits for one that has failed.

In a single process, nothing here communicates. Otherwise any backend of `torch.distributed` works, as FSDP, DDP or
Accelerate have set it up.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device

from .replay import RandomState

T = TypeVar("T")

_END = object()


def num_processes() -> int:
    """Number of processes that train together; 1 if `torch.distributed` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Number of this process, which PyTorch calls its rank; 0 if `torch.distributed` is not in use."""
    return 0 if num_processes() == 1 else dist.get_rank()


def is_main_process() -> bool:
    """Whether this is process 0 or the only one."""
    return process_number() == 0


def gather_from_all(function: Callable[[], T]) -> list[T]:
    """Call a function in every process and return the results of all, in the order of the processes.

    The results have to be picklable. If the function raises in this process, its error is raised here. If it raises in
    another one, this process raises RuntimeError with that process's number and error. The function must not
    communicate itself: a process that raises would leave the others waiting.
    """
    if num_processes() == 1:
        return [function()]
    result: T | None = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:  # not KeyboardInterrupt, which must not wait for other processes
        error = raised
    message = None if error is None else f"{type(error).__name__}: {error}"
    answers: list[Any] = [None] * num_processes()
    dist.all_gather_object(answers, (result, message))
    if error is not None:
        raise error
    for process, (_, failure) in enumerate(answers):
        if failure is not None:
            raise RuntimeError(f"Process {process} failed, so all stop. Its error: {failure}")
    return [answer for answer, _ in answers]


def run_on_all(function: Callable[[], T]) -> T:
    """Like `gather_from_all`, but return only the result of this process, which need not be picklable."""
    results: list[T] = []
    gather_from_all(lambda: results.append(function()))
    return results[0]


def batches_in_lockstep(
    dataloader: Iterable[Any], limit: int | None, with_stand_ins: bool
) -> Iterator[tuple[Any, bool, int]]:
    """Yield up to `limit` batches of this process, in as many turns as the process with the most batches has.

    Without a limit (`None`) these are all batches. Each item is a batch, whether it belongs to this process, and its
    number among the batches of all processes. In a turn without its own batch, a process gets `None`; with
    `with_stand_ins` it gets the batch of another process, which is needed if all processes must take part in each pass
    through the model. Errors of a dataloader are raised as in `gather_from_all`.
    """
    batches: Iterator[Any] | None = None
    batch: Any = None
    number = 0

    def fetch() -> bool:
        nonlocal batches, batch
        batches = islice(iter(dataloader), limit) if batches is None else batches
        batch = next(batches, _END)
        return batch is not _END

    while any(have_batch := gather_from_all(fetch)):
        own = batch is not _END
        if with_stand_ins and not all(have_batch):
            stand_in = _from_process(have_batch.index(True), batch)
            batch = batch if own else stand_in
        yield (batch if own or with_stand_ins else None), own, number + sum(have_batch[: process_number()])
        number += sum(have_batch)


@contextmanager
def shared_random_numbers(*tensors: torch.Tensor) -> Iterator[None]:
    """Inside the block all processes draw the random numbers of process 0; outside it each continues its own.

    Random numbers are drawn on the CPU and on the devices of `tensors`.
    """
    if num_processes() == 1:
        yield
        return
    own = RandomState.capture(tensors)
    (first, *_) = gather_from_all(lambda: (own.host, own.states))
    if is_main_process():
        yield
        return
    with dataclasses.replace(own, host=first[0], states=first[1]).restored():
        yield


def _from_process(source: int, batch: Any) -> Any:
    """Return the batch of one process in all processes."""
    carrier = [send_to_device(batch, "cpu") if dist.get_rank() == source else None]
    dist.broadcast_object_list(carrier, src=source)
    return carrier[0]

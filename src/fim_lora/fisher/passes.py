"""`Pass`: one forward and backward pass while it is running."""

from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar
from weakref import ReferenceType

import torch
from torch import Tensor

from ..runtime.distributed import process_number
from .declaration import Declaration
from .layers.call import LayerCall
from .saved import SavedTensor

Measurement = TypeVar("Measurement")


@dataclass
class Pass(Generic[Measurement]):
    """One forward and backward pass. Dictionaries have the layer name as their key.

    Attributes:
        batch_size: Examples, if known.
        sequences_per_example: Sequences that make up one example.
        counts: Whether the pass is a calibration batch.
        num_calls: Number of calls of the layer in the forward pass.
        latest_input: Input of the layer's latest call, until its adapter is called.
        waiting: Calls whose gradient has arrived, until all calls of the layer have one.
        measured: What the statistic measured on the layer.
        num_outstanding: Calls, of all layers, whose gradient has not arrived.
        has_gradients: Whether the gradient of any call has arrived.
        running: Numbers of the autograd runs that have begun and not ended.
        process: Number of this process.
        loss: The loss (1), if known.
        num_loss_terms: Terms that the loss is the mean of, if known; see `BatchRows`.
        declaration: What the user said about the batch.
        forward_sizes: For each forward pass of the whole model, the number of its rows, if known.
    """

    batch_size: int | None = None
    sequences_per_example: int = 1
    counts: bool = True
    num_calls: dict[str, int] = field(default_factory=dict)
    latest_input: dict[str, ReferenceType[SavedTensor]] = field(default_factory=dict)
    waiting: dict[str, list[LayerCall]] = field(default_factory=dict)
    measured: dict[str, Measurement] = field(default_factory=dict)
    num_outstanding: int = 0
    has_gradients: bool = False
    running: set[int] = field(default_factory=set)
    process: int = field(default_factory=process_number)
    loss: Tensor | None = None
    num_loss_terms: int | None = None
    declaration: Declaration | None = None
    forward_sizes: list[int | None] = field(default_factory=list)
    _calls_before_forward: int = -1

    def begin_forward(self, size: int | None) -> bool:
        """A forward pass of the whole model begins, with this many rows; return whether it is a further one.

        A model inside of the model, whose forward pass is a part of it, begins before any further call.
        """
        before, self._calls_before_forward = self._calls_before_forward, sum(self.num_calls.values())
        if before < self._calls_before_forward:
            self.forward_sizes.append(size)
        return 0 <= before < self._calls_before_forward

    def add_call(self, name: str) -> None:
        """Count a call of a layer in the forward pass."""
        self.num_calls[name] = self.num_calls.get(name, 0) + 1
        self.num_outstanding += 1

    def add_gradient(self, name: str, call: LayerCall) -> list[LayerCall] | None:
        """Add a call whose gradient has arrived; return all calls of the layer if this was the last one."""
        waiting = self.waiting.setdefault(name, [])
        waiting.append(call)
        self.has_gradients = True
        self.num_outstanding -= 1
        return self.waiting.pop(name) if len(waiting) == self.num_calls.get(name) else None

    def note_backward(self) -> None:
        """Note the current autograd run until it ends. A run that raises is never removed."""
        run = torch._C._current_graph_task_id()
        if run not in self.running:
            self.running.add(run)
            # FSDP uses the same function to detect the end of a backward pass; a public one does not exist.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self.running.discard, run))

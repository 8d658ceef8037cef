"""`Recorder`: hooks that turn forward and backward passes into measurements of each target layer.

A forward hook on each base layer saves its input x, a hook on its output receives the gradient g, and a `Statistic`
measures both. Between batches, only what the statistic accumulates is kept.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ..runtime.distributed import gather_from_all
from .declaration import Declaration
from .doubts import DECLARE, Doubts
from .hooks import AdapterHook, RootHook, is_inside_backward, layer_hook
from .layers.attribution import UnattributableError
from .layers.batch_size import BatchSize
from .layers.call import LayerCall
from .layers.registry import TargetLayer, target_layer
from .layers.rows import with_examples_first
from .passes import Pass
from .row_probe import RowProbe
from .row_rules import RowRules
from .saved import SavedCall, SavedTensor
from .statistic import BatchRows, Statistic

Measurement = TypeVar("Measurement")
Result = TypeVar("Result")


class Recorder(Generic[Measurement, Result]):
    """Watches the passes of a model and hands the calls of its target layers to a statistic.

    One backward pass is one calibration batch, together with all forward passes since the previous one. Two forward
    passes that each have their own backward pass must alternate. A layer that is called several times before the
    backward pass (shared weights, two forward passes into one loss) is measured with the gradient of all its uses
    together. Calls under `torch.no_grad` are treated as the first pass of reentrant gradient checkpointing, unless
    the whole model runs without gradients: such a run is an evaluation and is ignored.

    Args:
        layers: Name, as in the base model, to target layer, PEFT's LoRA layer or base layer.
        statistic: What to measure.
        advice: What the user can do where passes do not show which rows belong to which example.
        probe: Decides which rows belong to which example, where the shapes of inputs leave several readings. Without
            it, rules decide, and the result warns of these layers.

    Raises:
        TypeError: If a layer's class has no registered layer type.
    """

    def __init__(
        self,
        layers: Mapping[str, TargetLayer | nn.Module],
        statistic: Statistic[Measurement, Result],
        advice: str = DECLARE,
        probe: RowProbe | None = None,
    ) -> None:
        self.layers = {
            name: layer if isinstance(layer, TargetLayer) else target_layer(name, layer)
            for name, layer in layers.items()
        }
        self.statistic = statistic
        self.paused = False
        self.num_batches = 0
        self.session = 0
        self._last_batch: int | None = None
        self._pass: Pass[Measurement] = Pass()
        self._evaluating = False
        self._rows: RowProbe | RowRules = probe or RowRules()
        self._declaration: Declaration | None = None
        self._is_declaration_used = self._has_roots = False
        self._doubts = Doubts(advice)
        self._handles: list[RemovableHandle] = []

    def start(
        self, *roots: nn.Module, adapters: Mapping[str, nn.Module] | None = None, max_batches: int | None = None
    ) -> None:
        """Register the hooks. A recorder that was stopped goes on with what it has collected.

        Args:
            roots: Modules whose call is a forward pass of the whole model; they report the batch size. Without them it
                is the leading dimension of each layer's input, or what `batch` was given.
            adapters: Layer name to a module that is called after the layer. If its input is a copy of the layer's
                input in another dtype, as with float32 adapters in a bfloat16 model, autograd keeps that copy, and
                the recorder saves it instead of a second tensor.
            max_batches: The recorder stops after this many further batches; `None` for no limit.
        """
        self.stop()
        self._close_pass()
        self._pass, self._evaluating = Pass(), False
        self.session += 1  # gradients of calls in earlier sessions are ignored
        self._has_roots = bool(roots)
        self._last_batch = None if max_batches is None else self.num_batches + max_batches
        for layer in self.layers.values():
            self._handles += layer_hook(self, layer).register()
        for name, adapter in (adapters or {}).items():
            self._handles.append(adapter.register_forward_pre_hook(AdapterHook(self, name)))
        for root in roots:
            root_hook = RootHook(self)
            self._handles.append(root.register_forward_pre_hook(root_hook.before, with_kwargs=True))
            self._handles.append(root.register_forward_hook(root_hook))

    def stop(self) -> None:
        """Remove the hooks and keep what was collected."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside of the block: `start` and `stop`."""
        try:
            self.start()
            yield
        finally:
            self.stop()

    @contextmanager
    def batch(
        self,
        batch_size: int | None,
        sequences_per_example: int = 1,
        counts: bool = True,
        num_loss_terms: int | None = None,
    ) -> Iterator[None]:
        """One forward and backward pass. If no layer receives a gradient, it counts with gradients of zero.

        Args:
            batch_size: Examples in the batch; `None` for the leading dimension of each layer's input.
            sequences_per_example: Sequences that make up one example; see `LayerCall.grouped_by_example`.
            counts: Whether the pass is a calibration batch at all.
            num_loss_terms: Terms that the loss is the mean of, if known; see `BatchRows`.
        """
        current = self._pass = Pass(batch_size, sequences_per_example, counts, num_loss_terms=num_loss_terms)
        yield
        if self._pass is current:
            self._finish_batch()

    @contextmanager
    def declared(self, declaration: Declaration) -> Iterator[None]:
        """Forward passes inside the block belong to batches of which this is known; see `calibration_batch`.

        Raises `ValueError` if there is none.
        """
        before, self._declaration = self._declaration, declaration
        self._is_declaration_used = False
        try:
            yield
        finally:
            self._declaration = before
        if self._handles and not self._is_declaration_used:
            raise ValueError("No forward pass with gradients is inside the calibration_batch block: put it there.")

    def note_batch_size(self, batch_size: BatchSize) -> None:
        """Note how certain the number of examples of a batch is."""
        self._doubts.uncertain_batch_size |= not batch_size.is_certain

    def note_loss(self, loss: Tensor) -> None:
        """Note the loss, one element, before its backward pass; a loss that is not finite makes the batch unusable.

        The gradients alone do not show this: PyTorch's mean over no tokens is NaN and has gradients of zero.
        """
        self._pass.loss = loss.detach().reshape(1)

    def result(self) -> Result:
        """The result so far, over the examples of all processes. Every process has to call this.

        Raises:
            RuntimeError: If another process failed; see also `result` of the statistic, such as `NormSums.result`.
        """
        result = self.merged_statistic().result(self.layers)
        self._doubts.warn(self._rows.ambiguous)
        return result

    def merged_statistic(self) -> Statistic[Measurement, Result]:
        """The statistic so far, over the examples of all processes. Every process has to call this.

        Raises:
            RuntimeError: If another process failed.
        """
        first, *others = gather_from_all(self._finished_statistic)
        return first.merge(others)

    def _finished_statistic(self) -> Statistic[Measurement, Result]:
        self._close_pass()
        return self.statistic

    def begin_forward(self, batch_size: BatchSize) -> None:
        """A forward pass of the whole model begins. Several before one backward pass make one batch."""
        self._close_pass()
        self._evaluating = not torch.is_grad_enabled()
        if self._evaluating:
            return
        is_further = self._pass.begin_forward(batch_size.examples)
        if self._declaration is not None:
            self._is_declaration_used = True
            self._pass.declaration, self._pass.batch_size = self._declaration, self._declaration.num_examples
            return
        self._doubts.several_forward_passes |= is_further
        self.note_batch_size(batch_size)
        self._pass.batch_size = batch_size.examples

    def begin_call(self, target: TargetLayer, x: Tensor) -> bool:
        """Count a call in the forward pass, and return whether to observe it."""
        if self.paused:
            return False
        if is_inside_backward():
            return True  # a recomputation by gradient checkpointing, of a call that was counted before
        if self._rows.is_running:
            self._note_rows(target, x)
            return False
        if self._evaluating and not torch.is_grad_enabled():
            return False
        self._close_pass()
        if self.is_full:
            return False
        self._pass.add_call(target.name)
        self._note_rows(target, x)
        return True

    def _note_rows(self, target: TargetLayer, x: Tensor) -> None:
        size = self._pass.batch_size
        if size is None and self._has_roots:
            self._doubts.uncertain_batch_size = True  # the layer was called without the model
        is_known = self._pass.declaration is not None or self._pass.sequences_per_example > 1
        is_whole = not isinstance(x, DTensor)  # otherwise it is refused after this
        if size is not None and is_whole and not is_known:
            self._rows.note(target, x, size)

    def note_input(self, name: str, saved: SavedTensor) -> None:
        """Remember the input for the adapter that is called next; the reference lives as long as the graph."""
        self._pass.latest_input[name] = ref(saved)

    def note_adapter_input(self, name: str, x: Tensor) -> None:
        """Save the tensor that autograd keeps for the adapter, where it is a copy of the layer's input."""
        latest = self._pass.latest_input.pop(name, None)
        saved = None if latest is None else latest()
        if saved is not None:
            saved.replace_by_copy(x)

    def note_backward(self, session: int) -> None:
        """The gradient of the model's output has arrived."""
        if self._accepts(session):
            self._pass.note_backward()

    def receive(self, name: str, session: int, saved: SavedTensor | SavedCall, *gradients: Tensor | None) -> None:
        """Pair a call with its gradients; measure the layer after its last call, and finish after the last layer."""
        if not self._accepts(session):
            return
        detached = (None if gradient is None else gradient.detach() for gradient in gradients)
        call, current = saved.with_gradients(name, *detached), self._pass
        if name not in current.num_calls:
            return  # recomputed by reentrant checkpointing, for a graph of an earlier session
        current.note_backward()
        calls = current.add_gradient(name, call)
        if calls is not None:
            current.measured[name] = self._measure(name, calls, current)
        if current.num_outstanding == 0:
            self._finish_batch()

    @property
    def is_full(self) -> bool:
        """Whether the recorder has seen as many batches as it was started for."""
        return self.num_batches == self._last_batch

    def _accepts(self, session: int) -> bool:
        return not self.paused and not self.is_full and session == self.session

    def _close_pass(self) -> None:
        """End the current pass, before a call of the next one. A pass whose backward pass raised is not counted."""
        if self._pass.running:
            self._pass = Pass()
        elif self._pass.has_gradients:
            self._finish_batch()

    def _finish_batch(self) -> None:
        """Add the measurements of the current pass to the statistic."""
        finished, self._pass = self._pass, Pass()
        if not finished.counts:
            return
        for name, calls in finished.waiting.items():
            finished.measured[name] = self._measure(name, calls, finished)
        self.num_batches += 1
        if self.is_full:
            self.stop()
        self.statistic.add(finished.measured, finished.batch_size, finished.loss)

    def _measure(self, name: str, calls: list[LayerCall], current: Pass[Measurement]) -> Measurement:
        layer, x = self.layers[name], calls[0].input
        size = current.batch_size or (x.shape[0] if x.ndim > 1 else 1)
        terms = current.num_loss_terms or size
        rows = BatchRows(size, size, self.num_batches, current.process, terms, current.counts, current.loss)
        was_paused, self.paused = self.paused, True  # a layer that is run again may contain watched layers
        try:
            return self.statistic.measure(layer, self._by_example(layer, calls, current, size), rows)
        except UnattributableError:
            return self.statistic.measure(layer, calls, replace(rows, num_groups=1))
        finally:
            self.paused = was_paused

    def _by_example(
        self, layer: TargetLayer, calls: list[LayerCall], current: Pass[Measurement], size: int
    ) -> list[LayerCall]:
        """The calls with the rows of each example together. Raises `UnattributableError`."""
        if current.sequences_per_example > 1:
            return [call.grouped_by_example(size, current.sequences_per_example, layer.is_run_again) for call in calls]
        if current.declaration is not None:
            return current.declaration.by_example(layer, calls, current.forward_sizes)
        attributions = [self._rows.attribution(layer, call.input, size) for call in calls]
        return [
            with_examples_first(call, rows, size, layer.is_run_again)
            for call, rows in zip(calls, attributions, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A pass belongs to a graph, which can be neither copied nor pickled.
        return self.__dict__ | {"_pass": Pass(), "_declaration": None}

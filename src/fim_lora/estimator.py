"""`FisherEstimator`: hooks that turn forward and backward passes into running sums of the eFIM.

A forward hook on each base layer notes its input, a hook on its output receives the gradient, and the two give the
squared gradient norm of every example at once, by the function of the layer's type. What outlives a batch is three
numbers per layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .calls import CallState, LayerCall, SavedCall, SavedInput, behind_one_node, input_of
from .distributed import gathered, process_number
from .examples import UnattributableError, batch_size_of
from .fisher_sums import FisherSums
from .layer_types import TENSOR_PARALLELISM, TargetLayer, target_layer
from .scores import FimScores
from .sketch import Sketch

Hook = TypeVar("Hook", bound=Callable[..., Any])


class FisherEstimator:
    """Running eFIM of a set of layers, fed by hooks.

    One backward pass is one calibration batch, together with all forward passes since the one before: two of
    them, each with a backward pass of its own, have to take turns. A layer that is called several times before it
    (shared weights, two forward passes into one loss) counts with the gradient of all its uses together. Calls under
    `torch.no_grad` are taken for the first pass of reentrant gradient checkpointing, except in a pass of the whole
    model without gradients, which is an evaluation and leaves no trace.

    Args:
        layers: Name, as in the base model, to target layer, PEFT's LoRA layer or base layer.
        max_batches: After so many backward passes the hooks remove themselves; `None` for no limit.
        exact: Whether long examples are read exactly, too, and not through a random projection; see `FimConfig`.

    Raises:
        TypeError: If a layer's class is not registered in `layer_types`.
    """

    def __init__(
        self, layers: Mapping[str, TargetLayer | nn.Module], max_batches: int | None = None, exact: bool = False
    ) -> None:
        self.layers = {
            name: layer if isinstance(layer, TargetLayer) else target_layer(name, layer)
            for name, layer in layers.items()
        }
        self.max_batches = max_batches
        self.exact = exact
        self.paused = False
        self._sums = FisherSums.of(list(self.layers))
        self._pass = _Pass()
        self._evaluating = False
        self._handles: list[RemovableHandle] = []

    def attach(self, *roots: nn.Module, adapters: Mapping[str, nn.Module] | None = None) -> None:
        """Register the hooks.

        Args:
            roots: Modules whose call is a pass of the whole model. They tell the batch size; without them it is
                the leading dimension of each layer's input, or what `batch` was told.
            adapters: Layer name to a module that is called behind the layer. If its input is a copy of the layer's
                in another dtype, as where adapters are in float32 and the model is not, autograd keeps that, and it
                is not kept twice.
        """
        for name, layer in self.layers.items():
            layer_hook = _LayerHook(self, name)
            if layer.layer_type.runs_again:
                self._handles.append(layer.module.register_forward_pre_hook(layer_hook.before, with_kwargs=True))
            if layer.layer_type.all_outputs:
                handle = layer.module.register_forward_hook(layer_hook.of_several, prepend=True, with_kwargs=True)
                self._handles.append(handle)
                self._handles.append(layer.module.register_forward_hook(layer_hook.of_one, with_kwargs=True))
            else:
                self._handles.append(layer.module.register_forward_hook(layer_hook, with_kwargs=True))
        for name, adapter in (adapters or {}).items():
            self._handles.append(adapter.register_forward_pre_hook(_AdapterHook(self, name)))
        for root in roots:
            root_hook = _RootHook(self)
            self._handles.append(root.register_forward_pre_hook(root_hook.before, with_kwargs=True))
            self._handles.append(root.register_forward_hook(root_hook))

    def detach(self) -> None:
        """Remove the hooks; what was accumulated stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def num_batches(self) -> int:
        """Backward passes seen in this process."""
        return self._sums.num_batches

    @contextmanager
    def batch(self, batch_size: int | None, sequences_per_example: int = 1, counts: bool = True) -> Iterator[None]:
        """One forward and backward pass, which counts even if no layer received a gradient (it was zero then).

        Args:
            batch_size: Examples in the batch; `None` for the leading dimension of each layer's input.
            sequences_per_example: Sequences that make one example; see `LayerCall.by_pairs`.
            counts: Whether to count it at all.

        Yields:
            Nothing.
        """
        before = self._pass = _Pass(batch_size, sequences_per_example, counts)
        yield
        if self._pass is before:
            self._finish_batch()

    def note_loss(self, loss: Tensor) -> None:
        """Before its backward pass: a loss that is not finite makes the batch unusable, whatever its gradients are.

        A mean over no tokens is NaN in PyTorch, but has gradients of zero.

        Args:
            loss: The loss, one element.
        """
        self._pass.loss = loss.detach().reshape(1)

    def _start_forward(self, batch_size: int | None) -> None:
        """A forward pass of the whole model begins. Several before one backward pass make one batch."""
        self._close_pass()
        self._evaluating = not torch.is_grad_enabled()
        if not self._evaluating:
            self._pass.batch_size = batch_size

    def _close_pass(self) -> None:
        """What comes next belongs to another pass. One whose backward pass raised, and was caught, counts nothing."""
        if self._pass.running:
            self._pass = _Pass()
        elif self._pass.has_gradients:
            self._finish_batch()

    def _finish_batch(self) -> None:
        """Take the gradients of this pass into the running sums.

        A batch in which the loss or a gradient is not finite (overflow in float16) is counted and left out, for all
        layers.
        """
        finished, self._pass = self._pass, _Pass()
        if not finished.counts:
            return
        for name, calls in finished.waiting.items():
            finished.norms[name] = self._norms(name, calls, finished)
        self._sums.num_batches += 1
        if self.num_batches == self.max_batches:
            self.detach()
        self._accumulate(finished)

    def scores(self) -> FimScores:
        """The scores so far, over the examples of all processes, each of which has to call this.

        Returns:
            Score of every layer.

        Raises:
            RuntimeError: If no process has seen a batch, none had finite gradients, every score is zero, or
                another process failed.
        """
        return FisherSums.merged(gathered(self._finished_sums)).scores(self.layers)

    def _finished_sums(self) -> FisherSums:
        self._close_pass()
        return self._sums

    def __getstate__(self) -> dict[str, Any]:
        # What is in flight belongs to a graph, which can neither be copied nor pickled.
        return self.__dict__ | {"_pass": _Pass()}

    def _observe(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, state: CallState | None
    ) -> Any:
        """The forward hook: keep the arguments, and ask for the gradient of the output."""
        if self.paused:
            return None
        with_gradients = torch.is_grad_enabled()
        if not _inside_backward():
            if self._evaluating and not with_gradients:
                return None
            self._close_pass()
            if self.num_batches == self.max_batches:
                return None
            self._pass.calls[name] = self._pass.calls.get(name, 0) + 1
            self._pass.outstanding += 1
        if not with_gradients:
            return None
        outputs, structure = ([output], None) if isinstance(output, Tensor) else tree_flatten(output)
        tensors = [value if isinstance(value, Tensor) and value.is_floating_point() else None for value in outputs]
        if isinstance(input_of(args, kwargs), DTensor) or isinstance(outputs[0], DTensor):
            raise ValueError(f"Layer {name!r} has a part of its input or output in this process. {TENSOR_PARALLELISM}")
        starts_graph = not any(tensor is not None and tensor.requires_grad for tensor in tensors)
        _require_gradient_of_input(name, self.layers[name].module, input_of(args, kwargs), starts_graph)
        if starts_graph:
            # Nothing upstream is trained, so the graph starts here. The clone is no leaf: what follows may change
            # it in place.
            outputs = [
                value if tensor is None else tensor.detach().requires_grad_().clone()
                for value, tensor in zip(outputs, tensors, strict=True)
            ]
        if structure is not None and self.layers[name].layer_type.all_outputs:
            return tree_unflatten(self._watch_all(name, args, kwargs, outputs, state), structure)
        self._watch_first(name, args, kwargs, outputs, state)
        if not starts_graph:
            return None
        return outputs[0] if structure is None else tree_unflatten(outputs, structure)

    def _watch_first(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Any], state: CallState | None
    ) -> None:
        """Of several outputs the first is the layer's; there are attention weights behind it."""
        saved: SavedInput | SavedCall
        if self.layers[name].layer_type.runs_again:
            saved = SavedCall(args, kwargs, (outputs[0],), state)
        else:
            saved = SavedInput(input_of(args, kwargs))
            self._pass.latest[name] = ref(saved)
        outputs[0].register_hook(partial(self._receive, name, saved))
        for further in outputs[1:]:
            if isinstance(further, Tensor) and further.requires_grad:
                further.register_hook(partial(_refuse_gradient, name))

    def _watch_all(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Any], state: CallState | None
    ) -> list[Any]:
        """All outputs are the layer's, such as the logits and the scores of a router."""
        differentiable = (value if isinstance(value, Tensor) and value.requires_grad else None for value in outputs)
        saved = SavedCall(args, kwargs, tuple(differentiable), state)
        outputs, node = behind_one_node(outputs)
        node.register_prehook(partial(self._receive_all, name, saved))
        return outputs

    def _observe_adapter(self, name: str, x: Any) -> None:
        """The hook before the adapter, which is called behind the layer."""
        latest = self._pass.latest.pop(name, None)
        saved = None if latest is None else latest()
        if saved is not None and isinstance(x, Tensor):
            saved.keep_instead(x)

    def _receive(self, name: str, saved: SavedInput | SavedCall, *gradients: Tensor | None) -> None:
        """The hook on the output: pair its gradient with the call, and finish the layer after its last call."""
        if self.paused or self.num_batches == self.max_batches:
            return
        current = self._pass
        current.note_backward()
        waiting = current.waiting.setdefault(name, [])
        waiting.append(saved.take(name, *(None if gradient is None else gradient.detach() for gradient in gradients)))
        current.has_gradients = True
        current.outstanding -= 1
        if len(waiting) == current.calls.get(name):
            current.norms[name] = self._norms(name, current.waiting.pop(name), current)
        if current.outstanding == 0:
            self._finish_batch()

    def _receive_all(self, name: str, saved: SavedCall, gradients: tuple[Tensor | None, ...]) -> None:
        """The hook on several outputs, of which not all need have a gradient."""
        self._receive(name, saved, *gradients)

    def _receive_of_root(self, gradient: Tensor) -> None:
        """The hook on the model's output. Checkpointed layers learn only of their own share of the backward pass."""
        if not self.paused and self.num_batches != self.max_batches:
            self._pass.note_backward()

    def _norms(self, name: str, calls: list[LayerCall], current: _Pass) -> _Norms:
        """`‖G_t‖²_F` of every example (B), or of the batch as one example (1) if rows cannot be attributed."""
        layer = self.layers[name]
        first = calls[0].input
        size = current.batch_size or (first.shape[0] if first.ndim > 1 else 1)
        if current.sequences_per_example > 1:
            sequences, keep_rows = current.sequences_per_example, layer.layer_type.runs_again
            calls = [call.by_pairs(size, sequences, keep_rows) for call in calls]
        sketch = None if self.exact else Sketch(name, self.num_batches, current.process)
        calls = [replace(call, sketch=sketch) for call in calls]
        was_paused, self.paused = self.paused, True  # a layer that is run again may have watched layers inside
        try:
            # G_t = B · g_tᵀ x_t, because the loss is the mean over examples of ℓ_t.
            return _Norms(layer.layer_type.squared_norms(layer, calls, size), size**2)
        except UnattributableError:
            # ‖Σ_t G_t‖² / B is Σ_t ‖G_t‖² / B in expectation if the G_t are independent with mean zero.
            self._sums.unattributed.add(name)
            return _Norms(layer.layer_type.squared_norms(layer, calls, 1), size)
        finally:
            self.paused = was_paused
            if sketch is not None and sketch.used:
                self._sums.sketched.add(name)

    def _accumulate(self, finished: _Pass) -> None:
        norms = finished.norms
        lengths = [len(found.values) for found in norms.values()]
        losses = [] if finished.loss is None else [finished.loss]
        values = _to_host([*(found.values for found in norms.values()), *losses])
        if not np.isfinite(values).all():
            self._sums.num_skipped_batches += 1
            return
        by_layer = np.split(values, np.cumsum(lengths))
        by_name = {name: by_layer[place] * norms[name].factor for place, name in enumerate(norms)}
        self._sums.add(by_name, finished.batch_size or max(lengths, default=1))


class _Norms(NamedTuple):
    """Squared norms on their device, for the loss as it was back-propagated, and the factor that is still missing."""

    values: Tensor
    factor: int


@dataclass
class _Pass:
    """One forward and backward pass in flight.

    Attributes:
        batch_size: Examples, if known.
        sequences_per_example: Sequences that make one example.
        counts: Whether it is a calibration batch.
        calls: Layer name to its calls in the forward pass.
        latest: Layer name to the input of its latest call, until its adapter is called; it lives as long as its graph.
        waiting: Layer name to the calls with their gradients that wait for those of further calls of the layer.
        norms: Layer name to the finished squared norms.
        outstanding: Calls whose gradient has not come.
        has_gradients: Whether the backward pass has begun.
        running: Runs of autograd that have begun and not ended.
        process: Rank of this process.
        loss: The loss (1), if known.
    """

    batch_size: int | None = None
    sequences_per_example: int = 1
    counts: bool = True
    calls: dict[str, int] = field(default_factory=dict)
    latest: dict[str, ReferenceType[SavedInput]] = field(default_factory=dict)
    waiting: dict[str, list[LayerCall]] = field(default_factory=dict)
    norms: dict[str, _Norms] = field(default_factory=dict)
    outstanding: int = 0
    has_gradients: bool = False
    running: set[int] = field(default_factory=set)
    process: int = field(default_factory=process_number)
    loss: Tensor | None = None

    def note_backward(self) -> None:
        """Note this run of autograd until it has ended. One that raises never ends."""
        run = torch._C._current_graph_task_id()
        if run not in self.running:
            self.running.add(run)
            # What FSDP does to learn of the end; there is no public function.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self.running.discard, run))


def _outside_compiled_code(function: Hook) -> Hook:
    """Decorator: compiled code stops here and goes on behind, because what a hook does cannot be traced."""
    options: dict[str, Any] = {}
    if "reason" in inspect.signature(torch.compiler.disable).parameters:  # older versions of PyTorch have none
        options["reason"] = (
            "fim_lora watches this pass to collect the eFIM. Until `initialize_lora_fim_ranks`, compile without "
            "`fullgraph=True`, or pass it a `dataloader`"
        )
    return cast(Hook, torch.compiler.disable(function, **options))


@dataclass
class _LayerHook:
    """Forward hook of a layer; an object, not a closure, so that the model can be copied and pickled."""

    estimator: FisherEstimator
    name: str
    state: CallState | None = None

    @_outside_compiled_code
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the call, of a layer that is run again."""
        if not self.estimator.paused:
            # Where Accelerate moves the arguments inside of the call, random numbers are drawn where the weights are.
            self.state = CallState.of(args, kwargs, list(module.parameters()))

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state, self.state = self.state, None
        return self.estimator._observe(self.name, args, kwargs, output, state)

    @_outside_compiled_code
    def of_several(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook before all others, which have to get the copies of the outputs: FSDP, and those that keep one."""
        return None if isinstance(output, Tensor) else self(module, args, kwargs, output)

    @_outside_compiled_code
    def of_one(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook behind all others: on the one output that of FSDP has to come first, and bring the weights back."""
        return self(module, args, kwargs, output) if isinstance(output, Tensor) else None


@dataclass
class _AdapterHook:
    """Forward hook before the adapter of a layer."""

    estimator: FisherEstimator
    name: str

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self.estimator._observe_adapter(self.name, args[0])


@dataclass
class _RootHook:
    """Forward hooks of a whole model: before its layers, for the batch size; after them, for the backward pass."""

    estimator: FisherEstimator

    @_outside_compiled_code
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the call."""
        if self.estimator.paused or _inside_backward():
            return
        name = getattr(module, "main_input_name", None)
        self.estimator._start_forward(batch_size_of(args or kwargs, name))

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad and not _inside_backward():
                tensor.register_hook(self.estimator._receive_of_root)


def _require_gradient_of_input(name: str, module: nn.Module, x: Tensor, is_cut: bool) -> None:
    """Refuse a kernel for inference, behind which the gradient of everything upstream would be missing or wrong."""
    if not x.requires_grad:
        return
    if is_cut:
        raise RuntimeError(
            f"Layer {name!r} ({type(module).__name__}) passes no gradient on to its input, as some quantisations for "
            "inference do, so layers before it would score zero. Load the model in a quantisation that can be trained."
        )
    # Of bitsandbytes, which says so nowhere else.
    quant_state = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise RuntimeError(
            f"bitsandbytes has repacked the weight of layer {name!r} in an evaluation on this CPU, for a kernel "
            "without a gradient: load the model again, and do not evaluate it before the calibration."
        )


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    raise RuntimeError(
        f"The loss depends on a second output of layer {name!r}, such as its attention weights, of which the eFIM "
        "knows nothing. Leave it out of the loss of the calibration, or take the layer out of `target_modules`."
    )


def _to_host(tensors: list[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Concatenate 1-D tensors, with one transfer per device."""
    arrays: list[Any] = [np.zeros(0)] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        there = [tensors[place] for place in places]
        joined = torch.cat([tensor.float() if tensor.dtype != torch.float64 else tensor for tensor in there])
        here = joined.cpu().double().numpy()
        lengths = [len(tensor) for tensor in there]
        for place, array in zip(places, np.split(here, np.cumsum(lengths)[:-1]), strict=True):
            arrays[place] = array
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _inside_backward() -> bool:
    """Whether autograd is running, so that a forward call is a recomputation by gradient checkpointing.

    PyTorch's own checkpointing asks the same function; there is no public one.
    """
    return torch._C._current_graph_task_id() != -1

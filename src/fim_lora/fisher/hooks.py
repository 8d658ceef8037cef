"""The hooks of a `Recorder`: each watches the calls of one module and reports to a `CallWatcher`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from ..runtime.replay import CallState
from .layers.batch_size import BatchSize, batch_size_of
from .layers.call import input_of
from .layers.components import AdaptedLayer
from .layers.registry import TENSOR_PARALLELISM, Observed, TargetLayer
from .saved import SavedCall, SavedTensor, join_outputs

Function = TypeVar("Function", bound=Callable[..., Any])


class CallWatcher(Protocol):
    """What hooks report to. A `Recorder` is one."""

    paused: bool
    session: int

    def begin_forward(self, batch_size: BatchSize) -> None:
        """A forward pass of the whole model begins."""

    def begin_call(self, target: TargetLayer, x: Tensor) -> bool:
        """A layer was called with the input `x`; return whether to observe the call."""

    def note_input(self, name: str, saved: SavedTensor) -> None:
        """The input of a layer was saved."""

    def note_adapter_input(self, name: str, x: Tensor) -> None:
        """The adapter of a layer was called with `x`."""

    def note_backward(self, session: int) -> None:
        """A backward pass has begun, of a forward pass of the whole model in this session."""

    def receive(self, name: str, session: int, saved: SavedTensor | SavedCall, *gradients: Tensor | None) -> None:
        """The gradients of the outputs of a call have arrived."""


def is_inside_backward() -> bool:
    """Whether autograd is running, so that a forward call is a recomputation by gradient checkpointing.

    PyTorch's own checkpointing calls the same function; there is no public one.
    """
    return torch._C._current_graph_task_id() != -1


def _outside_compiled_code(function: Function) -> Function:
    """Decorator that inserts a graph break into compiled code, because a hook cannot be traced."""
    options: dict[str, Any] = {}
    if "reason" in inspect.signature(torch.compiler.disable).parameters:  # PyTorch 2.6 does not have it
        options["reason"] = (
            "fim_lora watches this pass, until `initialize_lora_fim_ranks` is called or `FimCompressionCallback` cuts "
            "the adapter. Compile without `fullgraph=True`, or pass a `dataloader` to `initialize_lora_fim_ranks`"
        )
    return cast(Function, torch.compiler.disable(function, **options))


class _Call(NamedTuple):
    """One observed call: the session that it belongs to, its arguments and outputs, and the state before it."""

    session: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]
    state: CallState | None


# From a call to the outputs that replace those of the layer, or `None` if these stay.
Watch = Callable[[_Call], list[Any] | None]


@dataclass
class LayerHook:
    """Forward hook of a layer of which only the input is needed.

    Hooks are objects and not closures, so that a model can be copied and pickled together with them.
    """

    watcher: CallWatcher
    target: TargetLayer
    state: CallState | None = None

    def register(self) -> list[RemovableHandle]:
        """Register the hook on its layer."""
        return [self.target.module.register_forward_hook(self, with_kwargs=True)]

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Save the input, and register a hook for the gradient of the first output."""
        return self._observe(args, kwargs, output, self._watch_input)

    def _observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, watch: Watch) -> Any:
        """Count and check the call, start the graph if no layer before it has, and register hooks for gradients."""
        state, self.state = self.state, None
        x = input_of(args, kwargs)
        if not self.watcher.begin_call(self.target, x) or not torch.is_grad_enabled():
            return None
        outputs, structure = tree_flatten(output)
        _refuse_tensor_parallelism(self.target, x, outputs[0])
        starts_graph = not any(isinstance(value, Tensor) and value.requires_grad for value in outputs)
        _refuse_missing_gradient(self.target.name, self.target.module, x, starts_graph)
        if starts_graph:
            outputs = [_as_start_of_graph(value) for value in outputs]
        joined = watch(_Call(self.watcher.session, args, kwargs, outputs, state))
        return tree_unflatten(joined or outputs, structure) if joined or starts_graph else None

    def _watch_input(self, call: _Call) -> None:
        saved = SavedTensor(input_of(call.args, call.kwargs))
        self.watcher.note_input(self.target.name, saved)
        self._watch_first(call, saved)

    def _watch_first(self, call: _Call, saved: SavedTensor | SavedCall) -> None:
        """Only the first output counts; the others are attention weights."""
        call.outputs[0].register_hook(partial(self.watcher.receive, self.target.name, call.session, saved))
        for further in call.outputs[1:]:
            if isinstance(further, Tensor) and further.requires_grad:
                further.register_hook(partial(_refuse_gradient, self.target.name))


@dataclass
class OutputHook(LayerHook):
    """Forward hook of a module of which only the output is needed: the A of an adapter."""

    def register(self) -> list[RemovableHandle]:
        """Register the hook on its module, and a check on the base layer, through which gradients must pass."""
        base_layer = cast(AdaptedLayer, self.target).base_layer
        return [base_layer.register_forward_hook(self.check_base_layer, with_kwargs=True), *super().register()]

    @_outside_compiled_code
    def check_base_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Refuse a base layer that passes no gradient to the layers before it."""
        x = input_of(args, kwargs)
        if torch.is_grad_enabled() and not self.watcher.paused and not is_inside_backward():
            _refuse_missing_gradient(self.target.name, module, x, starts_graph=not output.requires_grad)

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Save the output, and register a hook for its gradient."""
        return self._observe(args, kwargs, output, self._watch_output)

    def _watch_output(self, call: _Call) -> None:
        self._watch_first(call, SavedTensor(call.outputs[0], is_output=True))


@dataclass
class ReplayedLayerHook(LayerHook):
    """Forward hooks of a layer that is run again, for which all arguments and the state of the call are kept."""

    def register(self) -> list[RemovableHandle]:
        """Register the hooks before and after the call."""
        before = self.target.module.register_forward_pre_hook(self.before, with_kwargs=True)
        return [before, *super().register()]

    @_outside_compiled_code
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the state of random numbers and autocast."""
        if not self.watcher.paused:
            # Accelerate may move the arguments inside of the call; random numbers are drawn where the weights are.
            self.state = CallState.capture(args, kwargs, list(module.parameters()))

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Save the whole call, and register a hook for the gradient of the first output."""
        return self._observe(args, kwargs, output, self._watch_call)

    def _watch_call(self, call: _Call) -> None:
        self._watch_first(call, SavedCall(call.args, call.kwargs, (call.outputs[0],), call.state))


@dataclass
class AllOutputsHook(ReplayedLayerHook):
    """Forward hooks of a layer of which all outputs count, such as the logits and the scores of a router."""

    def register(self) -> list[RemovableHandle]:
        """Register one hook for several outputs, before all other hooks, and one for a single output, after them."""
        several = self.target.module.register_forward_hook(self.on_multiple_outputs, prepend=True, with_kwargs=True)
        return [several, *super().register()]

    @_outside_compiled_code
    def on_multiple_outputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Runs first, so that all other hooks, such as FSDP's, receive the copies of the outputs."""
        return None if isinstance(out, Tensor) else self._observe(args, kwargs, out, self._watch_all)

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Runs last, so that FSDP's hook on a single output restores the weights first."""
        return self._observe(args, kwargs, output, self._watch_call) if isinstance(output, Tensor) else None

    def _watch_all(self, call: _Call) -> list[Any]:
        """Register one hook for the gradients of all outputs, and return the copies that replace the outputs."""
        differentiable = (
            value if isinstance(value, Tensor) and value.requires_grad else None for value in call.outputs
        )
        saved = SavedCall(call.args, call.kwargs, tuple(differentiable), call.state)
        joined, node = join_outputs(call.outputs)
        # Not a closure, which would keep the arguments of the call alive.
        node.register_prehook(partial(self._receive, call.session, saved))
        return joined

    def _receive(self, session: int, saved: SavedCall, gradients: tuple[Tensor | None, ...]) -> None:
        self.watcher.receive(self.target.name, session, saved, *gradients)


@dataclass
class AdapterHook:
    """Forward pre-hook of the adapter of a layer."""

    watcher: CallWatcher
    name: str

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Report the input of the adapter."""
        if args and isinstance(args[0], Tensor):
            self.watcher.note_adapter_input(self.name, args[0])


@dataclass
class RootHook:
    """Forward hooks of a whole model: the batch size before its layers, the backward pass after them."""

    watcher: CallWatcher

    @_outside_compiled_code
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Report the batch size."""
        if self.watcher.paused or is_inside_backward():
            return
        self.watcher.begin_forward(batch_size_of(args or kwargs, getattr(module, "main_input_name", None)))

    @_outside_compiled_code
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Report the backward pass, because a hook of a checkpointed layer sees only that layer's part of it."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad and not is_inside_backward():
                tensor.register_hook(partial(self._receive, self.watcher.session))

    def _receive(self, session: int, gradient: Tensor) -> None:
        self.watcher.note_backward(session)


def layer_hook(watcher: CallWatcher, target: TargetLayer) -> LayerHook:
    """The hook that observes what the type of a layer needs."""
    return _HOOKS[target.observed](watcher, target)


_HOOKS: dict[Observed, type[LayerHook]] = {
    "input": LayerHook,
    "output": OutputHook,
    "call": ReplayedLayerHook,
    "all outputs": AllOutputsHook,
}


def _as_start_of_graph(value: Any) -> Any:
    """The value as the output of an operation with gradient; a leaf could not be changed in place."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().requires_grad_().clone()


def _refuse_tensor_parallelism(target: TargetLayer, x: Tensor, output: Any) -> None:
    if isinstance(x, DTensor) or isinstance(output, DTensor):
        raise ValueError(
            f"Layer {target.name!r} has only part of its input or output in this process. {TENSOR_PARALLELISM}"
        )


def _refuse_missing_gradient(name: str, module: nn.Module, x: Tensor, starts_graph: bool) -> None:
    """Refuse a kernel for inference, because gradients of the layers before it would be missing or wrong."""
    if not x.requires_grad:
        return
    if starts_graph:
        raise RuntimeError(
            f"Layer {name!r} ({type(module).__name__}) passes no gradient to its input, as some "
            "quantizations for inference do, so layers before it would score zero. Load the model in a quantization "
            "that can be trained."
        )
    # bitsandbytes has no other attribute that shows this.
    quant_state = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise RuntimeError(
            f"bitsandbytes repacked the weight of layer {name!r} during an evaluation on this CPU, for a "
            "kernel without a gradient. Load the model again, and do not evaluate it before the calibration."
        )


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    raise RuntimeError(
        f"The loss depends on a second output of layer {name!r}, such as its attention weights, which the eFIM does "
        "not cover. Leave it out of the calibration loss, or remove the layer from `target_modules`."
    )

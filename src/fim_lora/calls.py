"""`LayerCall`: what one call of a layer saw, kept between the forward and the backward pass the way autograd does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from .sketch import Sketch


@dataclass(frozen=True)
class RandomState:
    """State of the random numbers on the host, and on the devices of some tensors.

    Attributes:
        host: State of the host.
        devices: Index of each device.
        states: State of each device.
        device_type: Type of the devices.
    """

    host: Tensor
    devices: list[int]
    states: list[Tensor]
    device_type: str

    @classmethod
    def of(cls, *tensors: Any) -> RandomState:
        """The state at this moment.

        Args:
            tensors: Anything; tensors in it tell the devices.

        Returns:
            The state.
        """
        types = (leaf.device.type for leaf in tree_flatten(tensors)[0] if isinstance(leaf, Tensor))
        device_type = next((name for name in types if name not in ("cpu", "meta")), "cuda")
        return cls(torch.get_rng_state(), *get_device_states(*tensors), device_type=device_type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Random numbers inside are those that were drawn after the state was taken; outside nothing changes.

        Yields:
            Nothing.
        """
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.host)
            set_device_states(self.devices, self.states, device_type=self.device_type)
            yield


@dataclass(frozen=True)
class CallState:
    """What a call of a module depends on beside its arguments and weights.

    Attributes:
        random: The random numbers.
        autocast: Device type to whether autocast is on, and the dtype that it computes in.
    """

    random: RandomState
    autocast: Mapping[str, tuple[bool, torch.dtype]]

    @classmethod
    def of(cls, *tensors: Any) -> CallState:
        """The state at this moment.

        Args:
            tensors: Anything; tensors in it tell the devices.

        Returns:
            The state.
        """
        random = RandomState.of(*tensors)
        types = {"cpu", random.device_type}
        return cls(random, {name: (torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in types})

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A call inside is what the call was; outside nothing changes.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            for device_type, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, dtype, enabled=enabled))
            stack.enter_context(self.random.restored())
            yield


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer, after its backward pass.

    Attributes:
        args: Positional arguments; only the input, as the only one, of a layer that is not run again.
        kwargs: Keyword arguments.
        outputs: The outputs that may have a gradient, of a layer that is run again; `None` in the place of others.
        state: State before the call, of a layer that is run again.
        gradients: Gradients of the loss with respect to the outputs; `None` where there is none.
        sketch: The random projection through which long examples may be read; `None` to be exact.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor | None, ...]
    state: CallState | None
    gradients: tuple[Tensor | None, ...]
    sketch: Sketch | None = None

    @property
    def input(self) -> Tensor:
        """The first argument."""
        return input_of(self.args, self.kwargs)

    @property
    def gradient(self) -> Tensor:
        """Gradient of the first output, which layers have one for that take no gradient of others."""
        return cast(Tensor, self.gradients[0])

    def by_pairs(self, examples: int, sequences: int, keep_rows: bool) -> LayerCall:
        """Bring the sequences of an example together, where a batch holds all first ones, then all second ones.

        Args:
            examples: Examples, B.
            sequences: Sequences that make one example, k. Rows t, t + B, … of k · B are those of example t.
            keep_rows: Whether the leading dimension stays k · B and its multiples, for a layer that is run again.

        Returns:
            The call with every tensor (k · B · m × …) as (B × k · m × …), or with `keep_rows` as (B · k · m × …).
        """

        def together(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] % (examples * sequences):
                return value
            value = value.unflatten(0, (sequences, examples, -1)).transpose(0, 1)
            return value.flatten(0, 2) if keep_rows else value.flatten(1, 2)

        args, kwargs, outputs, gradients = tree_map(together, (self.args, self.kwargs, self.outputs, self.gradients))
        return replace(self, args=args, kwargs=kwargs, outputs=outputs, gradients=gradients)

    def replayed(self) -> AbstractContextManager[None]:
        """Random numbers and autocast inside are those of the call."""
        return nullcontext() if self.state is None else self.state.restored()


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer among the arguments of a call: the first.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Returns:
        The input.
    """
    return args[0] if args else next(iter(kwargs.values()))


class _SavedTensors:
    """Tensors saved by autograd until the gradient comes.

    So checkpointing recomputes them instead of keeping them, offloading moves them, and changing them in place raises.
    """

    __slots__ = ("_anchor",)

    def __init__(self, *tensors: Tensor) -> None:
        detached = (tensor.detach() for tensor in tensors)
        self._anchor: Tensor | None = _SaveForBackward.apply(torch.ones((), requires_grad=True), *detached)

    def take(self, name: str) -> tuple[Tensor, ...]:
        """The tensors, once: they are let go, as autograd does after a backward pass. `name` is the layer's."""
        anchor, self._anchor = self._anchor, None
        if anchor is None:
            raise RuntimeError(
                f"Layer {name!r} received a second gradient from one forward pass while the eFIM is accumulated. "
                "Add the losses up and call `backward()` once."
            )
        node: Any = anchor.grad_fn
        tensors: tuple[Tensor, ...] = node.saved_tensors
        return tensors


class SavedInput:
    """The input of a call, saved until the gradient comes.

    Args:
        x: The input.
    """

    # Thousands are alive between the passes, and every object that can hold others is work for the garbage collector.
    __slots__ = ("__weakref__", "_dtype", "_origin", "_saved")

    def __init__(self, x: Tensor) -> None:
        self._saved = _SavedTensors(x)
        self._dtype, self._origin = x.dtype, (x.grad_fn, x.output_nr)

    def keep_instead(self, copied: Tensor) -> None:
        """Save a tensor that autograd keeps anyway, if it is a copy of the input in a more precise dtype.

        Args:
            copied: What may be one. The graph tells: its only step from the input is the change of the dtype.
        """
        step = copied.grad_fn
        if step is None or step.name() != "ToCopyBackward0" or step.next_functions[0] != self._origin:
            return
        if torch.promote_types(copied.dtype, self._dtype) == copied.dtype:
            self._saved = _SavedTensors(copied)

    def take(self, name: str, *gradients: Tensor | None) -> LayerCall:
        """The call, once.

        Args:
            name: Name of the layer, for the error.
            gradients: Gradient of the output, the only one.

        Returns:
            The call.

        Raises:
            RuntimeError: If it was taken before.
        """
        (x,), gradient = self._saved.take(name), cast(Tensor, gradients[0])
        # Accelerate moves the arguments inside of the call, where a layer and the one before lie on two devices.
        return LayerCall((x.to(gradient.device, self._dtype),), {}, (), None, (gradient,))


class SavedCall:
    """All arguments and outputs of a call, saved until the gradient comes, of a layer that is run again.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        outputs: The outputs that may have a gradient; `None` in the place of others.
        state: State before the call.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: tuple[Tensor | None, ...],
        state: CallState | None,
    ) -> None:
        leaves, self._structure = tree_flatten((args, kwargs, outputs))
        self._others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self._state = state
        self._saved = _SavedTensors(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def take(self, name: str, *gradients: Tensor | None) -> LayerCall:
        """As `SavedInput.take`, with one gradient for each output that may have one."""
        tensors = iter(self._saved.take(name))
        leaves = [next(tensors) if other is None else other[0] for other in self._others]
        args, kwargs, outputs = tree_unflatten(leaves, self._structure)
        device = next(tensor.device for tensor in (*gradients, *outputs) if tensor is not None)
        args, kwargs = send_to_device((args, kwargs), device)
        received = iter(gradients)
        by_output = tuple(None if output is None else next(received) for output in outputs)
        return LayerCall(args, kwargs, outputs, self._state, by_output)


class _SaveForBackward(torch.autograd.Function):
    """A node beside the graph whose only task is to hold tensors the way autograd holds them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *(None for _ in ctx.saved_tensors))


def behind_one_node(outputs: Sequence[Any]) -> tuple[list[Any], Any]:
    """Put copies in the place of all outputs of a layer that may have a gradient, made by one node of the graph.

    The node receives the gradients of all of them together, and of each only what comes from outside of the layer. A
    hook on an output from which the layer makes another one would receive what comes through that one, too.

    Args:
        outputs: What the layer returned, at least one tensor of which requires a gradient.

    Returns:
        The outputs, with copies of those that require a gradient, and the node.
    """
    places = [place for place, value in enumerate(outputs) if isinstance(value, Tensor) and value.requires_grad]
    copies = _Copies.apply(*(outputs[place] for place in places))
    replaced = list(outputs)
    for place, copied in zip(places, copies, strict=True):
        replaced[place] = copied
    return replaced, copies[0].grad_fn


class _Copies(torch.autograd.Function):
    """The identity. Copies and not views, which could not be changed in place."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # None says that an output has no gradient
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

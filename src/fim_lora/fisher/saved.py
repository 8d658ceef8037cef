"""Tensors of a layer call, kept between the forward and the backward pass the way autograd keeps them."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..runtime.replay import CallState
from .layers.call import LayerCall


class _SavedTensors:
    """Tensors saved by autograd until the gradient arrives.

    Checkpointing therefore recomputes them, hooks on saved tensors offload them, and changing them in place raises.
    """

    __slots__ = ("_anchor",)

    def __init__(self, *tensors: Tensor) -> None:
        detached = (tensor.detach() for tensor in tensors)
        self._anchor: Tensor | None = _SaveForBackward.apply(torch.ones((), requires_grad=True), *detached)

    def release(self, name: str) -> tuple[Tensor, ...]:
        """Return the tensors and drop them, as autograd does after a backward pass. `name` is the layer's."""
        anchor, self._anchor = self._anchor, None
        if anchor is None:
            raise RuntimeError(
                f"Layer {name!r} received a second gradient from one forward pass while the eFIM is accumulated. "
                "Add the losses up and call `backward()` once."
            )
        node: Any = anchor.grad_fn
        tensors: tuple[Tensor, ...] = node.saved_tensors
        return tensors


class SavedTensor:
    """The input or the output of a call, saved until the gradient of the output arrives."""

    # Thousands of these exist between the passes, and each object with a `__dict__` is work for the garbage collector.
    __slots__ = ("__weakref__", "_dtype", "_origin", "_saved")

    def __init__(self, x: Tensor, *, is_output: bool = False) -> None:
        self._saved = _SavedTensors(x)
        # The graph holds the hook on an output, and with it this object. A reference back to the graph would make a
        # cycle that Python cannot see, and the graph would never be freed.
        self._dtype, self._origin = x.dtype, None if is_output else (x.grad_fn, x.output_nr)

    def replace_by_copy(self, candidate: Tensor) -> None:
        """Save `candidate`, which autograd keeps anyway, if it is a copy of the input in a more precise dtype.

        The graph shows this: its only step from the input is the change of the dtype.
        """
        step = candidate.grad_fn
        if step is None or step.name() != "ToCopyBackward0" or step.next_functions[0] != self._origin:
            return
        if torch.promote_types(candidate.dtype, self._dtype) == candidate.dtype:
            self._saved = _SavedTensors(candidate)

    def with_gradients(self, name: str, *gradients: Tensor | None) -> LayerCall:
        """The call of layer `name` with the gradient of its only output. A second time raises `RuntimeError`.

        The saved tensor is `LayerCall.input`.
        """
        (x,), gradient = self._saved.release(name), cast(Tensor, gradients[0])
        # Accelerate moves the arguments inside of the call, where a layer and the previous one are on two devices.
        return LayerCall((x.to(gradient.device, self._dtype),), {}, (), None, (gradient,))


class SavedCall:
    """A whole call of a layer that is run again, saved until its gradients arrive; see `LayerCall`."""

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

    def with_gradients(self, name: str, *gradients: Tensor | None) -> LayerCall:
        """As `SavedTensor.with_gradients`, with one gradient for each output that may have one."""
        tensors = iter(self._saved.release(name))
        leaves = [next(tensors) if other is None else other[0] for other in self._others]
        args, kwargs, outputs = tree_unflatten(leaves, self._structure)
        device = next(tensor.device for tensor in (*gradients, *outputs) if tensor is not None)
        args, kwargs = send_to_device((args, kwargs), device)
        received = iter(gradients)
        by_output = tuple(None if output is None else next(received) for output in outputs)
        return LayerCall(args, kwargs, outputs, self._state, by_output)


class _SaveForBackward(torch.autograd.Function):
    """A node outside of the model's graph that only saves tensors, the way autograd saves them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *(None for _ in ctx.saved_tensors))


def join_outputs(outputs: Sequence[Any]) -> tuple[list[Any], Any]:
    """Replace all outputs that require a gradient by copies made in one graph node; return outputs and node.

    The node receives the gradients of all outputs together, and only the part that comes from outside of the layer. A
    hook on an output from which the layer computes another one would also receive what flows back through that one.
    """
    places = [place for place, value in enumerate(outputs) if isinstance(value, Tensor) and value.requires_grad]
    copies = _Copies.apply(*(outputs[place] for place in places))
    replaced = list(outputs)
    for place, copied in zip(places, copies, strict=True):
        replaced[place] = copied
    return replaced, copies[0].grad_fn


class _Copies(torch.autograd.Function):
    """The identity, as copies and not as views, which could not be changed in place."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # None means that an output has no gradient
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

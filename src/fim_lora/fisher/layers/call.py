"""`LayerCall`: one call of a layer together with the gradients of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import tree_map

from ...runtime.replay import CallState
from ..gradients.sketch import Sketch


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer, after its backward pass.

    Attributes:
        args: Positional arguments; only the input for a layer that is not run again.
        kwargs: Keyword arguments.
        outputs: The outputs that may have a gradient, for a layer that is run again; `None` in the place of others.
        state: State before the call, for a layer that is run again.
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
        """The input x: the first argument."""
        return input_of(self.args, self.kwargs)

    @property
    def gradient(self) -> Tensor:
        """The gradient g of the first output, for layers of which only that one may have a gradient."""
        return cast(Tensor, self.gradients[0])

    def grouped_by_example(self, examples: int, sequences: int, keep_rows: bool) -> LayerCall:
        """Bring the sequences of an example together, in a batch that holds all first ones, then all second ones.

        Args:
            examples: Examples, B.
            sequences: Sequences that make up one example, k. Rows t, t + B, … of k · B are those of example t.
            keep_rows: Whether the leading dimension stays k · B and its multiples, for a layer that is run again.

        Returns:
            The call with every tensor (k · B · m × …) as (B × k · m × …), or with `keep_rows` as (B · k · m × …).
        """

        def grouped(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] % (examples * sequences):
                return value
            value = value.unflatten(0, (sequences, examples, -1)).transpose(0, 1)
            return value.flatten(0, 2) if keep_rows else value.flatten(1, 2)

        args, kwargs, outputs, gradients = tree_map(grouped, (self.args, self.kwargs, self.outputs, self.gradients))
        return replace(self, args=args, kwargs=kwargs, outputs=outputs, gradients=gradients)

    def restored_state(self) -> AbstractContextManager[None]:
        """Context manager: random numbers and autocast inside are those of the call."""
        return nullcontext() if self.state is None else self.state.restored()


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input among the arguments of a call: the first one."""
    return args[0] if args else next(iter(kwargs.values()))

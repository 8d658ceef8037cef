"""`LayerCall`: one call of a layer together with the gradients of its outputs."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import tree_map
from typing_extensions import Self

from ...runtime.replay import CallState
from ..gradients.sketch import Sketch


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer, after its backward pass.

    Attributes:
        args: Positional arguments; only the input, unless the layer needs replay.
        kwargs: Keyword arguments, if the layer needs replay.
        outputs: The outputs, if the layer needs replay; `None` in the place of those that cannot have a gradient.
        state: State before the call, if the layer needs replay.
        gradients: Gradients of the loss with respect to the outputs; `None` for outputs without one.
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

    def grouped_by_example(self, num_examples: int, sequences_per_example: int, keep_rows: bool) -> Self:
        """Bring the k sequences of each of B examples together: rows t, t + B, … of k · B are those of example t.

        Every tensor (k · B · m × …) becomes (B × k · m × …), or with `keep_rows`, for a layer that is run again,
        (B · k · m × …).
        """
        rows = num_examples * sequences_per_example

        def grouped(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] % rows:
                return value
            value = value.unflatten(0, (sequences_per_example, num_examples, -1)).transpose(0, 1)
            return value.flatten(0, 2) if keep_rows else value.flatten(1, 2)

        args, kwargs, outputs, gradients = tree_map(grouped, (self.args, self.kwargs, self.outputs, self.gradients))
        return replace(self, args=args, kwargs=kwargs, outputs=outputs, gradients=gradients)

    def restored_state(self) -> AbstractContextManager[None]:
        """Context manager, inside which random numbers and autocast are those of the call."""
        return nullcontext() if self.state is None else self.state.restored()


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input among the arguments of a call: the first one."""
    return args[0] if args else next(iter(kwargs.values()))

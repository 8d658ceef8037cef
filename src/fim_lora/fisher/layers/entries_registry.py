"""The registry of functions for the eFIM diagonal: squared per-example gradients of every entry of a weight.

A function belongs to a layer type and is found by the function for norms that the layer type has. A class that is
registered as a layer type of its own therefore never gets the function of its base class by mistake.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .call import LayerCall
from .registry import SquaredNorms, TargetLayer

AddSquaredEntries = Callable[[Tensor, TargetLayer, Sequence[LayerCall], int, float], None]


@dataclass(frozen=True)
class EntriesType:
    """How the entries of the weights of a layer type are measured. `register_entries` creates it.

    Attributes:
        add_squared_entries: Function of a running sum of the shape of the weight, the target layer, its calls in one
            forward pass, the number of examples B, and a factor. It adds `factor · Σ_t G_t ∘ G_t` to the running sum,
            for the loss as it was back-propagated. It raises `UnattributableError` if rows of the input do not belong
            to an example, before it changes the running sum.
        entries_shape: Function of the target layer, which returns the shape of its weight. It reads attributes and
            not the weight, which may be sharded, offloaded or quantized.
    """

    add_squared_entries: AddSquaredEntries
    entries_shape: Callable[[TargetLayer], tuple[int, ...]]


_ENTRIES_TYPES: dict[SquaredNorms, EntriesType] = {}


def register_entries(
    squared_norms: SquaredNorms, *, entries_shape: Callable[[TargetLayer], tuple[int, ...]]
) -> Callable[[AddSquaredEntries], AddSquaredEntries]:
    """Decorator that registers a function as `EntriesType.add_squared_entries` of a layer type.

    Args:
        squared_norms: The function for norms that the layer type was registered with.
        entries_shape: See `EntriesType.entries_shape`.

    Returns:
        The decorator, which returns the function unchanged.
    """

    def register(function: AddSquaredEntries) -> AddSquaredEntries:
        _ENTRIES_TYPES[squared_norms] = EntriesType(function, entries_shape)
        return function

    return register


def entries_type(target: TargetLayer) -> EntriesType | None:
    """The functions for the entries of a layer's weight; `None` if its layer type has none."""
    return _ENTRIES_TYPES.get(target.layer_type.squared_norms)

"""A batch with its examples in another order, whatever containers hold its tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accelerate.utils.operations import honor_type
from torch import Tensor


def copied(batch: Any) -> Any:
    """The batch with new containers and new tensors, so that a forward function that changes it changes a copy."""
    return _mapped(batch, lambda value: value.clone() if isinstance(value, Tensor) else value)


def with_next_example(batch: Any, batch_size: int, dimension: int) -> Any:
    """The batch with every example in the place of the one before it.

    The leading dimension of a tensor holds the examples if it has B or k · B entries, in blocks of k, and the second
    one if it has B. Lists of B strings or mappings are lists of examples. What fits none of this stays. All tensors
    are new, as in `copied`.

    Args:
        batch: The batch.
        batch_size: Examples in it, B.
        dimension: The dimension of the examples in tensors in which it can be both.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _moved(value, batch_size, dimension)
        if _is_list_of_examples(value, batch_size):
            return copied([*value[1:], value[0]])
        return value

    return _mapped(batch, moved)


def has_several_orders(batch: Any, batch_size: int) -> bool:
    """Whether both first dimensions of a tensor can hold the examples."""
    return any(len(_dimensions(value, batch_size)) > 1 for value in tensors_of(batch))


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in a nesting of mappings and sequences."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        for value in batch:
            yield from tensors_of(value)


def _dimensions(value: Tensor, batch_size: int) -> list[int]:
    """The dimensions of a tensor that can hold the examples."""
    leading = [0] if value.ndim > 0 and len(value) > 0 and len(value) % batch_size == 0 else []
    return [*leading, 1] if value.ndim > 1 and value.shape[1] == batch_size else leading


def _moved(value: Tensor, batch_size: int, dimension: int) -> Tensor:
    possible = _dimensions(value, batch_size)
    if not possible:
        return value.clone()
    chosen = dimension if dimension in possible else possible[0]
    return value.roll(-(value.shape[chosen] // batch_size), chosen)


def _is_list_of_examples(value: Any, batch_size: int) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) == batch_size
    return is_list and all(isinstance(one, (str, Mapping)) for one in value)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The batch with new containers, in which the function has replaced tensors, and lists where it changes them."""
    changed = function(value)
    if changed is not value:
        return changed
    if isinstance(value, Mapping):
        return type(value)({key: _mapped(one, function) for key, one in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        return honor_type(value, (_mapped(one, function) for one in value))
    return value

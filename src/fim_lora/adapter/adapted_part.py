"""The part of a model that has an adapter: the model itself, or one module inside it, such as a text encoder."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..runtime.wrappers import unwrap_engine


def adapted_part(model: nn.Module, adapter_name: str) -> nn.Module:
    """The outermost module that has an adapter of this name, which may be the model itself.

    Modules of other libraries, such as a `SentenceTransformer`, hold the adapted model as a part. If there is no
    adapter of this name, this is a module that `lora_config_of` refuses.

    Raises `ValueError` if several parts have an adapter of this name.
    """
    parts = adapted_parts(model)
    named = {name: part for name, part in parts.items() if adapter_name in _adapters_of(part)}
    if len(named) > 1:
        names = ", ".join(map(repr, named))
        raise ValueError(
            f"The {type(model).__name__} has {len(named)} parts with an adapter {adapter_name!r}: {names}. Give each "
            "adapter its own `adapter_name`, or pass the part as the model, with a `forward_fn` that runs the whole "
            "model."
        )
    return next(iter(named.values()), next(iter(parts.values()), model))


def adapted_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules with adapters, by their names in the model; the name of the model itself is empty.

    A wrapper of parallel training around an adapter counts as the adapted module, because it has to be removed.
    """
    return dict(_adapted_parts(model, "", set()))


def part_to_adapt(model: nn.Module) -> nn.Module:
    """The part of a plain model that gets the adapter: the one that `add_adapter` of sentence-transformers adapts.

    PEFT's patterns with names in this part match the same layers in the whole model, too.
    """
    inside = getattr(model, "transformers_model", None)
    return inside if isinstance(inside, nn.Module) else model


def _adapted_parts(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    is_wrapper = unwrap_engine(module) is not module
    if hasattr(module, "peft_config") or (is_wrapper and any(hasattr(one, "peft_config") for one in module.modules())):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _adapted_parts(child, f"{name}.{child_name}" if name else child_name, seen)


def _adapters_of(module: nn.Module) -> Any:
    """The configs of a module's adapters by name; also of the module inside a wrapper of parallel training."""
    return getattr(unwrap_engine(module), "peft_config", {})

"""An adapter whose scaling is changed inside a block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer

from .lora_layers import layers_rebuilt_together


@contextmanager
def scalable_adapter(layers: Mapping[str, LoraLayer], adapter_name: str) -> Iterator[Callable[[float], None]]:
    """Yield a function that sets the scaling of an adapter to a multiple of what it is before the block.

    Unlike `peft.helpers.rescale_adapter_scale`, it leaves other adapters of the same layers alone.
    """
    parts = [part for layer in layers.values() for part in layers_rebuilt_together(layer)]
    before = [part.scaling[adapter_name] for part in parts]

    def scale(factor: float) -> None:
        for part, scaling in zip(parts, before, strict=True):
            part.scaling[adapter_name] = factor * scaling

    try:
        yield scale
    finally:
        scale(1.0)

"""An adapter whose scaling is changed inside a block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor

from .lora_layers import layers_rebuilt_together


@contextmanager
def scalable_adapter(layers: Mapping[str, LoraLayer], adapter_name: str) -> Iterator[Callable[[float], None]]:
    """Yield a function that sets the scaling of an adapter to a multiple of what it is before the block.

    Unlike `peft.helpers.rescale_adapter_scale`, it leaves other adapters of the same layers alone. Base weights that
    PEFT merges in every pass are restored, too: after another scaling, rounding would not give back the same ones.
    """
    merged = [weights for layer in layers.values() for weights in _merged_weights(layer)]
    parts = [part for layer in layers.values() for part in layers_rebuilt_together(layer)]
    before = [part.scaling[adapter_name] for part in parts]

    def scale(factor: float) -> None:
        for part, scaling in zip(parts, before, strict=True):
            part.scaling[adapter_name] = factor * scaling

    try:
        yield scale
    finally:
        scale(1.0)
        for weight_of, value in merged:
            weight_of().data.copy_(value)


def _merged_weights(layer: LoraLayer) -> list[tuple[Callable[[], Tensor], Tensor]]:
    """The base weights of an attention that are on a device, as they are now, and how to get at them later.

    PEFT registers another parameter in every pass.
    """
    if not isinstance(layer, MultiheadAttention):
        return []
    base = layer.get_base_layer()
    found: list[Callable[[], Tensor]] = [
        lambda: base.in_proj_weight,
        lambda: base.out_proj.get_base_layer().weight,
    ]
    return [(weight_of, weight_of().detach().clone()) for weight_of in found if weight_of().device.type != "meta"]

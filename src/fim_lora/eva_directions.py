"""Directions for A from EVA (Paischer et al. 2024, arXiv:2410.07170), by PEFT's own implementation, at given ranks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict
from peft.tuners.lora.eva import (
    _Hook,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from .patterns import write_pattern


def require_eva(model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Refuse what PEFT's EVA cannot do.

    Args:
        model: The model.
        layers: Name to LoRA layer.

    Raises:
        ValueError: If the model is no `PeftModel`, or a layer is one on which PEFT's EVA fails.
    """
    if not isinstance(model, PeftModel):
        raise ValueError('init_lora_weights="eva" needs a PeftModel: use `get_peft_model`, or another initialisation.')
    for name, layer in layers.items():
        if isinstance(layer, (MultiheadAttention, ParamWrapper)):
            raise ValueError(
                f"PEFT has no EVA for layer {name!r} ({type(layer).__name__}): take it out, or use another "
                "init_lora_weights than 'eva'."
            )


def eva_directions(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: LoraConfig,
    adapter_name: str,
    ranks: Mapping[str, int],
    forward_fn: Callable[[nn.Module, Any], Any],
    show_progress_bar: bool,
) -> dict[str, Tensor]:
    """The first r_i principal directions of the input of every layer.

    EVA moves ranks between layers, even with `rho=1`, where layers of different ranks share their input. So it is
    asked for as many directions as any layer needs, the same number everywhere, and each layer takes its first r_i:
    they are in the order of the variance they explain.

    Args:
        model: The model, with its adapters disabled.
        dataloader: Yields batches, from the start whenever it is iterated; EVA needs its length.
        config: The adapter's config; its `eva_config` counts, but for `rho`.
        adapter_name: The adapter.
        ranks: Layer name to rank r_i.
        forward_fn: Takes model and batch.
        show_progress_bar: Whether to show one.

    Returns:
        Layer name to directions (r_i × d_in), for the layers that EVA knows: linear layers.

    Raises:
        TypeError: If the dataloader has no length.
        ValueError: If PEFT's EVA cannot use the data.
    """
    most = max(ranks.values())
    sizes = {name: _input_size(model, name, most) for name in ranks}
    config = copy.copy(config)
    config.r, config.rank_pattern = most, write_pattern(sizes, most)
    batches = _DictBatches(dataloader)
    first: Any = next(iter(batches), None)
    ids, labels = (first.get("input_ids"), first.get("labels")) if isinstance(first, dict) else (None, None)
    is_text = isinstance(ids, Tensor)
    eva_config = config.eva_config or EvaConfig()
    # EVA takes tokens without a label for padding; the label of a class belongs to no token.
    has_mask = isinstance(ids, Tensor) and isinstance(labels, Tensor) and labels.shape == ids.shape
    use_mask = eva_config.use_label_mask and has_mask
    config.eva_config = dataclasses.replace(eva_config, rho=1.0, use_label_mask=use_mask)
    with _without_leftover_hooks(model):
        directions = get_eva_state_dict(
            model,
            batches,
            peft_config=config,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn_language_modeling if is_text else None,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn_language_modeling if is_text else None,
            adapter_name=adapter_name,
            show_progress_bar=show_progress_bar,
        )
    found = {name.removeprefix("base_model.model."): value for name, value in directions.items()}
    return {name: found[name][:rank].clone() for name, rank in ranks.items() if name in found and rank > 0}


def _input_size(model: nn.Module, name: str, most: int) -> int:
    """There are no more directions than inputs."""
    layer: Any = model.get_submodule(f"base_model.model.{name}")
    return min(most, layer.in_features)


class _DictBatches:
    """Batches as PEFT's functions want them: `BatchEncoding` is no `dict`."""

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self._dataloader = dataloader

    def __len__(self) -> int:
        return len(self._dataloader)  # type: ignore[arg-type]  # what has no length raises Python's TypeError

    def __iter__(self) -> Iterator[Any]:
        for batch in self._dataloader:
            yield dict(batch) if isinstance(batch, Mapping) else batch


@contextmanager
def _without_leftover_hooks(model: nn.Module) -> Iterator[None]:
    """PEFT leaves its hooks behind when the model raises."""
    try:
        yield
    finally:
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, _Hook):
                    del module._forward_hooks[key]

"""Directions for A from EVA (Paischer et al. 2024, arXiv:2410.07170), by PEFT's own implementation, at given ranks."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict
from peft.tuners.lora.eva import (
    _Hook,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from ..fisher.calibration import ForwardFn
from .lora_layers import name_in_base_model
from .patterns import write_pattern


def require_eva(model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Raise `ValueError` if the model is not a `PeftModel`, or PEFT's EVA fails on a layer."""
    if not isinstance(model, PeftModel):
        raise ValueError('init_lora_weights="eva" needs a PeftModel: use `get_peft_model`, or another initialization.')
    for name, layer in layers.items():
        if isinstance(layer, (MultiheadAttention, ParamWrapper)):
            raise ValueError(
                f"PEFT has no EVA for layer {name!r} ({type(layer).__name__}): remove it from the "
                "targets, or use another init_lora_weights than 'eva'."
            )


def eva_directions(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    ranks: Mapping[str, int],
    config: LoraConfig,
    dataloader: Iterable[Any],
    forward_fn: ForwardFn,
    show_progress_bar: bool,
) -> dict[str, Tensor]:
    """The first r_i principal directions (r_i × d_in) of the input of every linear layer, the layers EVA supports.

    EVA moves ranks between layers, even with `rho=1`, where layers of different ranks share their input. EVA
    therefore computes the largest r_i everywhere, and each layer uses its first r_i directions: they are in the order
    of the variance that they explain.

    The adapters of the model are disabled. The `eva_config` of the config applies, except for `rho`. The dataloader
    starts again whenever it is iterated. Raises `TypeError` if it has no length, which EVA needs, and `ValueError` if
    PEFT's EVA cannot use the data.
    """
    most = max(ranks.values())
    # A layer has at most as many directions as inputs.
    sizes = {name: min(most, layers[name].in_features) for name in ranks}
    batches = _DictBatches(dataloader)
    first: Any = next(iter(batches), None)
    is_text = isinstance(first, dict) and isinstance(first.get("input_ids"), Tensor)
    config = copy.copy(config)
    config.r, config.rank_pattern = most, write_pattern(sizes, most)
    config.eva_config = _eva_config(config, first)
    try:
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
    finally:
        _remove_hooks(model)
    found = {name_in_base_model(name): value for name, value in directions.items()}
    return {name: found[name][:rank].clone() for name, rank in ranks.items() if name in found and rank > 0}


def _eva_config(config: LoraConfig, batch: Any) -> EvaConfig:
    """The config for EVA. Its mask treats tokens without a label as padding, so it is off if labels are classes."""
    eva_config = config.eva_config or EvaConfig()
    ids, labels = (batch.get("input_ids"), batch.get("labels")) if isinstance(batch, dict) else (None, None)
    has_mask = isinstance(ids, Tensor) and isinstance(labels, Tensor) and labels.shape == ids.shape
    return dataclasses.replace(eva_config, rho=1.0, use_label_mask=eva_config.use_label_mask and has_mask)


class _DictBatches:
    """Batches as PEFT's functions need them: `BatchEncoding` is not a `dict`."""

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self._dataloader = dataloader

    def __len__(self) -> int:
        return len(self._dataloader)  # type: ignore[arg-type]  # without a length, Python raises its TypeError

    def __iter__(self) -> Iterator[Any]:
        for batch in self._dataloader:
            yield dict(batch) if isinstance(batch, Mapping) else batch


def _remove_hooks(model: nn.Module) -> None:
    """Remove EVA's hooks, which PEFT leaves on the model when the model raises."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _Hook):
                del module._forward_hooks[key]

"""A trained adapter on its base model: loaded by PEFT with nothing missing or left over, and written again."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftModelForSequenceClassification, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fim_lora_command.choices import Task
from fim_lora_command.errors import CommandError, is_out_of_memory

from .adapter_source import DTYPES, PREFIX, AdapterSource
from .models import named
from .output import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_PEFT_CLASSES = {"causal-lm": PeftModelForCausalLM, "seq-cls": PeftModelForSequenceClassification}
# PEFT does not check the types of most values in a config, and fails later in one of these ways.
_ERRORS_OF_CONFIG = (TypeError, AttributeError, IndexError, OverflowError, ImportError, re.error)


def load_adapter(model: Any, missing: list[str], source: AdapterSource, task: Task, device: torch.device) -> Any:
    """The model with its adapter. `missing` names weights that the model lacks, which the adapter has to have."""
    random = [name for name in missing if PREFIX + name not in source.shapes]
    if random:
        raise CommandError(
            f"Neither the base model nor {source.name} has the weights {named(random)}: give the model that the "
            "adapter was trained on as --model."
        )
    config = source.config
    config.inference_mode = True
    config.init_lora_weights = True  # the weights are loaded, and other initializations cost time or read the data
    try:
        _resize_vocabulary(model, source)
        modules_to_save = None if config.modules_to_save is None else list(config.modules_to_save)
        adapted = _PEFT_CLASSES[task](model, config)
        loaded = adapted.load_adapter(
            str(source.folder),
            "default",
            torch_device=str(device),
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", None),
        )
    except KeyError as error:
        raise _does_not_fit(source, f"it lacks the weights {error.args[0]}") from error
    except _ERRORS_OF_CONFIG as error:
        raise CommandError(f"PEFT cannot load {source.name} by its {ADAPTER_CONFIG}: {error}.") from error
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise _does_not_fit(source, str(error)) from error
    # PEFT adds the names of classification heads whenever it loads an adapter.
    config.modules_to_save = modules_to_save
    if loaded.missing_keys:
        raise _does_not_fit(source, f"it lacks the weights {named(sorted(loaded.missing_keys))}")
    if loaded.unexpected_keys:
        raise _does_not_fit(source, f"the model has no place for the weights {named(sorted(loaded.unexpected_keys))}")
    _require_finite(adapted, source)
    return adapted


def save_adapter(adapted: Any, source: AdapterSource, folder: Path) -> None:
    """Write the adapter as PEFT does, with the dtypes of the source and everything else that the source has."""
    others = {name for name in source.shapes if "lora_" not in name}
    without_embeddings = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    weights = folder / ADAPTER_WEIGHTS
    try:
        adapted.save_pretrained(str(folder), save_embedding_layers=not others <= without_embeddings.keys())
        tensors = load_file(weights)
        if lost := sorted(others - tensors.keys()):
            raise CommandError(f"PEFT does not save the weights {named(lost)}, which {source.name} has.")
        usual, _ = Counter(dtype for name, dtype in source.dtypes.items() if "lora_" in name).most_common(1)[0]
        dtypes = {name: DTYPES.get(source.dtypes.get(name, usual), tensors[name].dtype) for name in tensors}
        if any(tensor.dtype != dtypes[name] for name, tensor in tensors.items()):
            save_file({name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}, weights, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{weights} cannot be written: {error}") from error
    # A model card says nothing that the config does not say, and would replace one that is in the folder.
    (folder / "README.md").unlink(missing_ok=True)
    # safetensors makes files that only their owner can read.
    weights.chmod((folder / ADAPTER_CONFIG).stat().st_mode)


def _resize_vocabulary(model: Any, source: AdapterSource) -> None:
    """PEFT saves the embeddings with the adapter if tokens were added in the training, but does not make room."""
    embeddings = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embeddings), None)
    shape = source.shapes.get(f"{PREFIX}{name}.weight")
    if shape is not None and shape[0] != embeddings.weight.shape[0]:
        model.resize_token_embeddings(shape[0], mean_resizing=False)


def _does_not_fit(source: AdapterSource, reason: str) -> CommandError:
    """`reason` may be an error of PyTorch, which has a heading and then one line for each weight."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    first = lines[1] if len(lines) > 1 and lines[0].endswith(":") else " ".join(lines)
    return CommandError(
        f"{source.name} does not fit the base model: {first.rstrip('.')}. Give the model that the adapter was trained "
        "on as --model."
    )


def _require_finite(adapted: Any, source: AdapterSource) -> None:
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and not parameter.isfinite().all():
            name = name.removeprefix(PREFIX)
            raise CommandError(f"{source.name} has weights that are NaN or infinite, in {name}: its training failed.")

"""A clear error for a folder of `fim-lora allocate`, which holds no weights, where PEFT loads a trained adapter."""

import functools
from collections.abc import Callable
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..config import ALLOCATION_FILE


def wrap_loading() -> None:
    """Let `PeftModel.from_pretrained` and `load_adapter` refuse such a folder before they change the model.

    PEFT itself would look for the weights on the Hub under the name of the folder.
    """
    PeftModel.from_pretrained = classmethod(_wrap_load(PeftModel.from_pretrained.__func__, place_of_folder=2))
    PeftModel.load_adapter = _wrap_load(PeftModel.load_adapter, place_of_folder=1)


def require_weights(folder: str | PathLike[str], subfolder: str | None) -> None:
    """Refuse a local folder with allocated ranks and without weights. Raises `ValueError`."""
    path = Path(folder) / (subfolder or "")
    has_ranks = (path / CONFIG_NAME).is_file() and (path / ALLOCATION_FILE).is_file()
    if has_ranks and not any((path / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(
            f"{path} holds the ranks that fim-lora allocated, but no weights ({SAFETENSORS_WEIGHTS_NAME}). To start a "
            f"training, call get_peft_model(model, LoraConfig.from_pretrained({str(path)!r})). To load a trained "
            "adapter, give the folder in which it was saved."
        )


def _wrap_load(load: Callable[..., Any], place_of_folder: int) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_with_weights(*args: Any, **kwargs: Any) -> Any:
        folder = kwargs["model_id"] if "model_id" in kwargs else next(iter(args[place_of_folder:]), None)
        if isinstance(folder, (str, PathLike)):
            require_weights(fspath(folder), kwargs.get("subfolder"))
        return load(*args, **kwargs)

    return load_with_weights

"""The config of a new adapter, from the options of `fim-lora allocate`."""

from typing import Any

import typer
from peft import LoraConfig

from fim_lora_command.choices import Task

from ..config import FimConfig
from .models import PEFT_TASK_TYPES


def new_lora_config(
    r: int, lora_alpha: int | None, target_modules: list[str] | str | None, task: Task, **fim_options: Any
) -> LoraConfig:
    """The config that awaits its ranks. `fim_options` are fields of `FimConfig`, which checks them."""
    try:
        fim_config = FimConfig(**fim_options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha or r,
        target_modules=target_modules,
        task_type=PEFT_TASK_TYPES[task],
        init_lora_weights="fim",
        fim_config=fim_config,
    )

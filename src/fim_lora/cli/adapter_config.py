"""Reading `adapter_config.json`, which may be damaged or come from a stranger."""

from pathlib import Path

from peft import LoraConfig

from fim_lora_command.errors import CommandError

from .output import ADAPTER_CONFIG


def read_lora_config(folder: Path, fix: str) -> LoraConfig:
    """The LoRA config in a folder; `fix` is the end of the error message if there is none."""
    path = folder / ADAPTER_CONFIG
    # PEFT would look for a missing file on the Hub.
    if not path.is_file():
        raise CommandError(f"{path}: no such file. {fix}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CommandError(f"{path} cannot be read: {str(error).rstrip('.')}. {fix}") from error
    if not isinstance(config, LoraConfig):
        raise CommandError(f"{path} is not a LoRA config but {type(config).__name__}. {fix}")
    return config

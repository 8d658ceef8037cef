"""The device of a run."""

import torch

from fim_lora_command.errors import wrong_usage


def device_of(name: str | None) -> torch.device:
    """The device of this name, or the default one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Creating an empty tensor shows whether this build of torch and this computer have the device.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise wrong_usage("--device", f"{name!r} cannot be used: {error}") from error

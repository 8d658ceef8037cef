"""The state on which a call depends besides its arguments and weights, so that it can be repeated."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from typing_extensions import Self


@dataclass(frozen=True)
class RandomState:
    """State of the random number generators of the host, and of devices of one type: their indices and states."""

    host: Tensor
    devices: list[int]
    states: list[Tensor]
    device_type: str

    @classmethod
    def capture(cls, *tensors: Any) -> Self:
        """Capture the current state of the host and of the devices of all tensors in these nested values."""
        # Not `torch.utils.checkpoint.get_device_states`, which selects each device: `torch.mps` cannot do that.
        present = [leaf.device for leaf in tree_flatten(tensors)[0] if isinstance(leaf, Tensor)]
        device_type = next((device.type for device in present if device.type not in ("cpu", "meta")), "cuda")
        devices = sorted({device.index or 0 for device in present if device.type == device_type})
        module = torch.get_device_module(device_type)
        return cls(torch.get_rng_state(), devices, [module.get_rng_state(index) for index in devices], device_type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block, random numbers repeat those drawn after the capture. Outside it, nothing changes."""
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.host)
            module = torch.get_device_module(self.device_type)
            # The states may come from another process, with another number of devices.
            for index, state in zip(self.devices, self.states, strict=False):
                module.set_rng_state(state, index)
            yield


@dataclass(frozen=True)
class CallState:
    """State of random numbers and autocast at a call: by device type, whether autocast is on, and its dtype."""

    random: RandomState
    autocast: Mapping[str, tuple[bool, torch.dtype]]

    @classmethod
    def capture(cls, *tensors: Any) -> Self:
        """Capture the current state of the host and of the devices of all tensors in these nested values."""
        random = RandomState.capture(*tensors)
        types = {"cpu", random.device_type}
        return cls(random, {name: (torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in types})

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block, a call behaves as at the capture. Outside it, nothing changes."""
        with ExitStack() as stack:
            for device_type, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, dtype, enabled=enabled))
            stack.enter_context(self.random.restored())
            yield

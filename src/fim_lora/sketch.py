"""`Sketch`: the random projection through which a layer is read where the examples are long."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 16
"""Random vectors for each example, k."""

MOST_EXACT_POSITIONS = 128
"""Examples up to this length are read exactly in every layer."""


def most_exact_positions(d_in: int, d_out: int) -> int:
    """Up to how many positions an example is read exactly: as long as it costs little.

    The exact norm by Gram matrices costs `2 T² (d_in + d_out)` operations, the forward and the backward pass of the
    layer `4 T d_in d_out`. The first is an eighth of the second at `T = d_in d_out / 4 (d_in + d_out)`, an eighth of
    the width of a square layer.

    Args:
        d_in: Inputs of the layer.
        d_out: Outputs of the layer.

    Returns:
        The larger of that length and `MOST_EXACT_POSITIONS`.
    """
    return max(MOST_EXACT_POSITIONS, d_in * d_out // (4 * (d_in + d_out)))


@dataclass
class Sketch:
    """Random signs for one layer in one calibration batch, independent of those of all others.

    They have a generator of their own, so the random numbers of the user's training are what they would be without,
    and the same batches give the same scores.

    Attributes:
        layer: Name of the layer.
        batch: Number of the batch in this process.
        process: Rank of this process.
        used: Whether signs were drawn, so that the norms of this batch are estimates.
    """

    layer: str
    batch: int
    process: int = 0
    used: bool = False

    def generator(self, device: torch.device) -> torch.Generator:
        """Random numbers for the signs.

        Args:
            device: Where they are drawn.

        Returns:
            A new generator, the same one for the same layer, batch and process.
        """
        self.used = True
        # A string, because Python seeds by it in the same way everywhere.
        seed = random.Random(f"{self.layer} {self.batch} {self.process}").getrandbits(63)
        return torch.Generator(device).manual_seed(seed)


def random_signs(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Independent signs, so that `E[ω ωᵀ]` is the identity.

    Args:
        shape: Their shape.
        generator: Draws them, on its device.
        dtype: Their dtype.

    Returns:
        +1 and -1.
    """
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device, dtype=dtype)
    return bits.mul_(2).sub_(1)

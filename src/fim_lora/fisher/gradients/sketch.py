"""`Sketch`: the random projection through which layers are read if examples are long."""

import random
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .products import (
    MAX_TEMPORARY_BYTES,
    compute_dtype,
    copied_features,
    multiplies_small_right_uncopied,
    multiplies_uncopied,
    product,
    product_with_small_right,
    slices,
)

WIDTH = 16
"""Random vectors for each example, k."""

MAX_EXACT_POSITIONS = 128
"""Examples up to this length are read exactly in every layer."""


def max_exact_positions(d_in: int, d_out: int) -> int:
    """Number of positions up to which an example is read exactly: as long as it costs little.

    The exact norm by Gram matrices costs `2 T² (d_in + d_out)` operations, the forward and the backward pass of the
    layer `4 T d_in d_out`. The first is an eighth of the second at `T = d_in d_out / 4 (d_in + d_out)`, an eighth of
    the width of a square layer. The limit is that length, or `MAX_EXACT_POSITIONS` if it is larger.
    """
    return max(MAX_EXACT_POSITIONS, d_in * d_out // (4 * (d_in + d_out)))


@dataclass
class Sketch:
    """Random signs for one layer in one calibration batch, independent of those of all other layers and batches.

    They have their own generator, so they do not change the random numbers of the user's training, and the same
    batches give the same scores. `batch` is the number of the batch in this process. `used` tells whether signs were
    drawn, so that the norms of this batch are estimates.
    """

    layer: str
    batch: int
    process: int = 0
    used: bool = False

    def generator(self, device: torch.device) -> torch.Generator:
        """A new generator of the signs, the same one for the same layer, batch and process."""
        self.used = True
        # A string, because Python seeds by it in the same way on every machine.
        seed = random.Random(f"{self.layer} {self.batch} {self.process}").getrandbits(63)
        return torch.Generator(device).manual_seed(seed)


def random_signs(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Independent signs, +1 and -1, so that `E[ω ωᵀ]` is the identity."""
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device, dtype=dtype)
    return bits.mul_(2).sub_(1)


def sketched_squared_norms(
    x: Tensor, g: Tensor, sketch: Sketch, max_temporary_bytes: int = MAX_TEMPORARY_BYTES
) -> Tensor:
    """`(1/k) Σ_j ‖G_t ω_j‖²` with random signs ω, `2 T k (d_in + d_out)` operations per example.

    It is an unbiased estimate (Hutchinson 1990, of the trace of `G_tᵀ G_t`). Its variance is at most
    `2/k · ‖G_tᵀ G_t‖²_F`, so its standard deviation is at most `sqrt(2/k)` of the value. Equality is approached if
    `G_t` has rank one, and r equal singular values divide the deviation by `sqrt(r)`. Every example has its own signs,
    so the standard error over examples includes this noise.

    Shapes are as in `squared_norms`. The bounded temporary memory consists of signs, of their products with `x` and
    `g`, and of copies in the computing precision of positions of `x` and `g`.
    """
    if x.shape[2] > g.shape[2]:
        x, g = g, x  # the norm of the transpose is the same, and the narrower side needs fewer signs
    dtype = compute_dtype(x, g)
    examples, positions, d_in, d_out = *x.shape, g.shape[2]
    # Half of the memory for the signs and G ω, half for x ω and the copies, with the intermediate results of both.
    numbers = max_temporary_bytes // dtype.itemsize
    per_position = 5 * WIDTH + copied_features((x, x), dtype=dtype)
    per_position += 0 if multiplies_small_right_uncopied(g, dtype) else d_out
    block = min(max(numbers // 2 // per_position, 1), positions)
    per_example = WIDTH * (2 * d_in + 5 * d_out)
    group_size = max(min(numbers // 2 // per_example, numbers // 2 // (block * per_position)), 1)
    generator = sketch.generator(x.device)
    signs_dtype = x.dtype if multiplies_uncopied(x, x, dtype) else dtype

    norms = []
    for group in slices(examples, group_size):
        signs = random_signs((group.stop - group.start, d_in, WIDTH), generator, signs_dtype)
        projections = (
            product_with_small_right(g[group, span].mT, product(x[group, span], signs, dtype))
            for span in slices(positions, block)
        )
        norms.append(torch.linalg.vector_norm(reduce(Tensor.add_, projections), dim=(1, 2)))
    return torch.cat(norms).square_() / WIDTH

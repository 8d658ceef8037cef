"""Attribution of the rows of a layer's input to the examples of the batch, by documented rules."""

from collections.abc import Sequence

import torch
from torch import Tensor


class UnattributableError(Exception):
    """Rows of the input of a layer do not belong to an example."""


def by_example(x: Tensor, g: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Make the examples the leading dimension of the input x of a linear layer and of the gradient g of its output.

    The first rule that applies decides:

    1. The leading dimension is the batch: nothing changes.
    2. The second of three or more dimensions is the batch (sequence first): the two are swapped.
    3. The leading dimension is a multiple of the batch, as after `hidden.view(-1, d)`: consecutive rows belong to
       the same example.
    4. Otherwise rows cannot be attributed to examples. Tokens routed to an expert are such rows, unless their number
       happens to be a multiple of the batch, which cannot be distinguished from rule 3. Rows cannot be attributed
       either if rules 2 and 3 both apply and contradict each other: windows of an image or of a video, with as many
       positions as there are examples, look like a sequence whose length is a multiple of the batch.

    `x` is B × …, (B·k) × … or T × B × …, and `g` has the same leading dimensions. Both are returned with leading
    dimension B. Raises `UnattributableError` by rule 4.
    """
    if x.ndim == 1:
        x, g = x.unsqueeze(0), g.unsqueeze(0)
    if rules_contradict(x.shape[:-1], batch_size):
        raise UnattributableError
    if x.shape[0] != batch_size and x.ndim >= 3 and x.shape[1] == batch_size:
        return x.transpose(0, 1), g.transpose(0, 1)
    return by_leading_dimension(x, g, batch_size)


def rules_contradict(shape: Sequence[int], batch_size: int) -> bool:
    """Whether rules 2 and 3 of `by_example` both apply to rows of this shape, the input without its features."""
    if batch_size == 1 or len(shape) < 2 or shape[0] == batch_size:
        return False
    return shape[1] == batch_size and shape[0] % batch_size == 0


def by_leading_dimension(x: Tensor, g: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """As `by_example` without rule 2, for a layer whose second dimension is never the batch, such as channels.

    `x` and `g`, as B × … or (B·k) × …, are returned as B × … or B × k × …. Raises `UnattributableError` if the leading
    dimension is not a multiple of the batch.
    """
    if x.shape[0] == batch_size:
        return x, g
    if x.shape[0] % batch_size:
        raise UnattributableError
    rows = x.shape[0] // batch_size
    return x.reshape(batch_size, rows, *x.shape[1:]), g.reshape(batch_size, rows, *g.shape[1:])


def flatten_positions(value: Tensor) -> Tensor:
    """Reshape (B × … × d) to (B × T × d)."""
    return value.reshape(value.shape[0], -1, value.shape[-1])


def concatenate_calls(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join the `x` and `g` of all calls as positions of one call: the gradient of the weight is the sum over them."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([x for x, _ in pairs], dim=1), torch.cat([g for _, g in pairs], dim=1)

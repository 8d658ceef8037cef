"""Training mode and `requires_grad`, set for a while and restored."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def requires_grad_restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Restore `requires_grad` of every parameter afterward, also after an exception."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and restore the mode of every module at the end."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module, _ in training:
            if type(module).__module__.startswith("bitsandbytes."):
                # In eval mode bitsandbytes may use kernels for inference, which are coarser and pass no gradient.
                # Nothing else in its layers depends on the mode.
                module.training = True
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def frozen_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode and freeze its parameters; restore both per module and per parameter at the end."""
    with requires_grad_restored(model.parameters()), eval_mode(model):
        model.requires_grad_(False)
        yield

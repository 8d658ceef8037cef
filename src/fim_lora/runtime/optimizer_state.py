"""The state of an optimizer, carried over to parameters that get another shape."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from .user_warnings import warn_user

# The second moments of Adam, and their running maximum with `amsgrad`.
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True)
class StateMap:
    """How the gradient of a parameter changes when the parameter is replaced by one of another shape.

    Attributes:
        first: The linear map from the old gradient to the new one.
        second: The same with squared coefficients: the map of the variances of uncorrelated entries.
    """

    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def require_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer of PyTorch, without the wrapper of Accelerate; raises `TypeError` for anything else."""
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: pass a torch.optim.Optimizer.")
    return inner


def carried_state(optimizer: Optimizer, maps: Mapping[nn.Parameter, StateMap]) -> dict[nn.Parameter, dict[str, Any]]:
    """The state that the parameters of `maps` will have, computed from their present state; nothing changes yet.

    Adam and AdamW keep the step, the mapped first moment and the mapped second moment. The state of other optimizers
    is dropped, with a warning: they begin anew for these parameters.
    """
    present = {parameter: optimizer.state[parameter] for parameter in maps if parameter in optimizer.state}
    if not isinstance(optimizer, (Adam, AdamW)):
        if any(present.values()):
            warn_user(
                f"The state of {type(optimizer).__name__} cannot be carried over to other ranks, so it is dropped for "
                f"{len(present)} parameters: they go on as at the first step. Adam and AdamW of PyTorch go on without "
                "a jump.",
            )
        return {parameter: {} for parameter in present}
    return {parameter: _adam_state(state, maps[parameter]) for parameter, state in present.items()}


def _adam_state(state: Mapping[str, Any], mapped: StateMap) -> dict[str, Any]:
    new = dict(state)
    if "exp_avg" in new:
        new["exp_avg"] = mapped.first(new["exp_avg"]).contiguous()
    for name in _SECOND_MOMENTS:
        if name in new:
            new[name] = mapped.second(new[name]).contiguous()
    return new


def set_state(
    optimizer: Optimizer, state: Mapping[nn.Parameter, dict[str, Any]], removed: Mapping[nn.Parameter, object]
) -> None:
    """Give parameters this state, and forget the removed parameters."""
    for parameter, values in state.items():
        if values:
            optimizer.state[parameter] = values
        else:
            optimizer.state.pop(parameter, None)
    for parameter in removed:
        optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in removed]

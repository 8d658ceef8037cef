"""Parameters of any module, such as the experts of a mixture, by running the module again for every example."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ...runtime.flags import requires_grad_restored
from ...runtime.offloading import onloaded
from .attribution import UnattributableError
from .call import LayerCall
from .components import AdaptedLayer, ComponentMoments, moments_of_core_gradients, register_component_type, whole_layer
from .registry import TargetLayer, WeightShape, leading_only, register_layer_type

# Largest difference between the outputs of the two runs of a layer, relative to the norm. It is far above the
# differences between kernels for different shapes in bfloat16, and far below those of rows of the wrong example.
_OUTPUT_TOLERANCE = 0.05


def _parameter_shape(layer: Any) -> WeightShape:
    """PEFT gives each of the experts an adapter of rank r."""
    d_out, d_in, experts = layer.out_features, layer.in_features, layer.num_experts
    return WeightShape(d_out, d_in, num_entries=experts * d_out * d_in, parameters_per_rank=experts * (d_out + d_in))


@register_layer_type(
    "peft.tuners.lora.layer.ParamWrapper",
    weight_shape=_parameter_shape,
    needs_replay=True,
    all_outputs=True,
    batch_dimensions=leading_only,
)
def measure_parameter(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """`‖G_t‖²_F` (B) over all entries of the parameter: over all experts, if it holds several.

    The rows of inputs and outputs belong to examples, such as (B · T × d) of experts. The gradients of all outputs
    count. The temporary memory is one gradient of the parameter, and what the module keeps for one example. Raises
    `UnattributableError` if the output for an example alone differs from that in its batch, `RuntimeError` if the
    module gives another output when it is run again, and `TypeError` if the parameter cannot have a gradient.
    """
    with onloaded(target.module):
        weight = getattr(target.module, str(target.parameter_name))
        if not weight.dtype.is_floating_point:
            raise TypeError(
                f"Parameter {target.name!r} has dtype {weight.dtype}, so it cannot have a gradient or an eFIM. Remove "
                "it from `target_parameters`."
            )
        norms = [_norm_of_example(target, weight, calls, example, batch_size) for example in range(batch_size)]
        return torch.stack(norms)


@register_component_type("peft.tuners.lora.layer.ParamWrapper", observed="all outputs", module=whole_layer)
def measure_parameter_components(
    target: AdaptedLayer, calls: Sequence[LayerCall], batch_size: int
) -> ComponentMoments:
    """Moments of one part for each expert, from the gradients of A: `∂ℓ_t/∂A · Aᵀ = s · Bᵀ G_t Aᵀ = Γ_t`.

    The module with its adapters runs again for every example; errors are those of `measure_parameter`.
    """
    weight, experts = target.lora.lora_A[target.adapter_name].weight, target.lora.num_experts
    with onloaded(target.base_layer):
        gradients = [gradient_of_example(target, weight, calls, example, batch_size) for example in range(batch_size)]
    a = weight.detach().unflatten(0, (experts, -1))
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    core = [
        a.new_zeros(experts, a.shape[1], a.shape[1])
        if gradient is None
        else gradient.to(a.dtype).view_as(a) @ a.mT * scale
        for gradient, scale in gradients
    ]
    return moments_of_core_gradients(torch.stack(core))


def _norm_of_example(
    target: TargetLayer, weight: Tensor, calls: Sequence[LayerCall], example: int, batch_size: int
) -> Tensor:
    """`‖G_t‖²_F`, a scalar."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    gradient, scale = gradient_of_example(target, weight, calls, example, batch_size)
    if gradient is None:
        return torch.zeros((), dtype=dtype, device=weight.device)
    return torch.linalg.vector_norm(gradient, dtype=dtype).square() * scale**2


def gradient_of_example(
    target: TargetLayer, weight: Tensor, calls: Sequence[LayerCall], example: int, batch_size: int
) -> tuple[Tensor | None, Tensor]:
    """The gradient of a parameter for one example, divided by a scale, and the scale; `None` for zero.

    The module runs again for the example. The scale is the largest gradient of an output, so that gradients do not
    vanish in half precision.
    """
    by_call = [_rows_of_example(call.gradients, example, batch_size) for call in calls]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=weight.device)
    largest = [
        gradient.abs().amax().to(dtype)
        for gradients in by_call
        for gradient in gradients
        if gradient is not None and gradient.numel()
    ]
    scale = torch.stack(largest).amax() if largest else zero
    if scale == 0:
        return None, zero
    with requires_grad_restored([weight]):
        weight.requires_grad_(True)
        pairs = [
            (output, gradient / scale)
            for call, gradients in zip(calls, by_call, strict=True)
            for output, gradient in zip(_run_again(target, call, example, batch_size), gradients, strict=True)
            if gradient is not None and output.requires_grad  # an output may not depend on the parameter
        ]
        if not pairs:
            return None, zero
        outputs, seeds = zip(*pairs, strict=True)
        (gradient,) = torch.autograd.grad(outputs, weight, seeds, allow_unused=True)
    return gradient, scale


def _run_again(target: TargetLayer, call: LayerCall, example: int, batch_size: int) -> list[Any]:
    """All outputs for one example. Those with a gradient are checked against the outputs of the whole batch."""
    args, kwargs = _rows_of_example((call.args, call.kwargs), example, batch_size)
    with torch.enable_grad(), call.restored_state():
        # `forward`, because the hooks of the module have already run for this call.
        outputs = tree_leaves(target.module.forward(*args, **kwargs))
    expected = [
        output if gradient is not None else None for output, gradient in zip(call.outputs, call.gradients, strict=True)
    ]
    if _is_divisible(expected, batch_size) and _is_close(outputs, _rows_of_example(expected, example, batch_size)):
        return outputs
    if batch_size > 1:
        raise UnattributableError
    raise RuntimeError(
        f"{type(target.module).__name__} of {target.name!r} gave another output when it was run again with the same "
        "arguments, so the gradient of its parameter cannot be computed. Switch off what is random or stateful in it, "
        "or remove the parameter from `target_parameters`."
    )


def _is_divisible(outputs: Sequence[Tensor | None], batch_size: int) -> bool:
    """Whether the rows of every output can be divided among the examples; those of a mean over the batch cannot."""
    return batch_size == 1 or not any(
        output is not None and (output.ndim == 0 or output.shape[0] % batch_size) for output in outputs
    )


def _is_close(outputs: Sequence[Any], expected: Sequence[Tensor | None]) -> bool:
    """Whether the outputs equal the expected ones up to the tolerance; `None` is not compared."""
    return len(outputs) == len(expected) and all(
        before is None or (output.shape == before.shape and _differs_little(output, before))
        for output, before in zip(outputs, expected, strict=True)
    )


def _differs_little(output: Tensor, before: Tensor) -> bool:
    # A batch that overflowed is left out later, by its gradients, and routers may mask logits by -inf.
    is_finite = before.isfinite()
    if not torch.equal(output.isfinite(), is_finite):
        return False
    difference = torch.where(is_finite, output - before, 0)
    return bool(difference.norm() <= _OUTPUT_TOLERANCE * torch.where(is_finite, before, 0).norm())


def _rows_of_example(values: Any, example: int, batch_size: int) -> Any:
    """The rows of one example of every tensor; tensors that cannot be divided among the examples stay whole."""

    def rows_of(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] % batch_size:
            return value
        rows = value.shape[0] // batch_size
        return value[example * rows : (example + 1) * rows]

    return tree_map(rows_of, values)

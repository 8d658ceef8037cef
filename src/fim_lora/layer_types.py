"""Layer types: how the calls of a layer make the per-example gradients of its weight, one function each.

A new layer type is one function below `@register_layer_type`. It takes the target layer, its calls in one forward
pass and the number of examples, and returns `‖G_t‖²_F` of every example t for the loss as it was back-propagated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.pytorch_utils import Conv1D

from .attention import attention_matrices
from .calls import LayerCall
from .examples import UnattributableError, by_example, by_leading_dimension
from .gradient_norms import convolution_squared_norms, embedding_squared_norms, squared_norms
from .offloading import onloaded

SquaredNorms = Callable[["TargetLayer", Sequence[LayerCall], int], Tensor]

TENSOR_PARALLELISM = (
    "Tensor parallelism is not supported: calibrate with a model that is not split, or sharded by FSDP or ZeRO-3."
)

# How far the output of a layer that is run again may be from the first, relative to its norm: far above what other
# kernels for other shapes make of it in bfloat16, far below what rows of the wrong example would.
_SAME_OUTPUT = 0.05


@dataclass(frozen=True)
class Weight:
    """Dimensions of the base weight of a layer, and what PEFT's adapter for it costs.

    Attributes:
        d_out: Outputs of the matrix that A and B make up.
        d_in: Inputs of it.
        num_entries: Entries of the weight. `None` for `d_out · d_in`.
        parameters_per_rank: Adapter parameters of one rank. `None` for `d_in + d_out`.
        rank_step: PEFT takes only ranks divisible by it.
    """

    d_out: int
    d_in: int
    num_entries: int | None = None
    parameters_per_rank: int | None = None
    rank_step: int = 1

    @property
    def entries(self) -> int:
        """Entries over which the eFIM is averaged."""
        return self.num_entries or self.d_out * self.d_in


@dataclass(frozen=True)
class LayerType:
    """What has to be known of a class of layers.

    Attributes:
        squared_norms: `‖G_t‖²_F` (B) from the target layer, its calls and the number of examples. Raises
            `UnattributableError` if rows of the input belong to no example.
        weight: The dimensions, from PEFT's LoRA layer or from the plain base layer.
        runs_again: Whether `squared_norms` runs the layer again, for which it needs all arguments, outputs and the
            state of the random numbers of a call.
        all_outputs: Whether `squared_norms` takes the gradients of all outputs of a layer that is run again.
            Otherwise only the first one may have a gradient.
    """

    squared_norms: SquaredNorms
    weight: Callable[[Any], Weight]
    runs_again: bool = False
    all_outputs: bool = False


@dataclass(frozen=True)
class TargetLayer:
    """A frozen weight that an adapter targets.

    Attributes:
        name: Name in the base model.
        module: The base module, whose calls are watched.
        layer_type: How its calls make its eFIM.
        weight: Dimensions of the weight.
        parameter_name: The parameter of `module`, if PEFT targets it by `target_parameters`.
    """

    name: str
    module: Any
    layer_type: LayerType
    weight: Weight
    parameter_name: str | None = None


_LAYER_TYPES: dict[str, LayerType] = {}


def register_layer_type(
    *classes: type[nn.Module] | str,
    weight: Callable[[Any], Weight],
    runs_again: bool = False,
    all_outputs: bool = False,
) -> Callable[[SquaredNorms], SquaredNorms]:
    """Decorator: the function below it is `LayerType.squared_norms` of these classes and their subclasses.

    Args:
        classes: Classes of base layers or of PEFT's LoRA layers. Names, with the module, stand for classes that
            PEFT defines only if the library of the quantisation is installed.
        weight: `LayerType.weight`.
        runs_again: `LayerType.runs_again`.
        all_outputs: `LayerType.all_outputs`.

    Returns:
        The decorator.
    """

    def register(function: SquaredNorms) -> SquaredNorms:
        for layer_class in classes:
            name = layer_class if isinstance(layer_class, str) else _name_of(layer_class)
            _LAYER_TYPES[name] = LayerType(function, weight, runs_again, all_outputs)
        return function

    return register


def target_layer(name: str, layer: nn.Module) -> TargetLayer:
    """Look a layer up: first the class of PEFT's LoRA layer, then that of the base layer, most derived class first.

    Args:
        name: Name in the base model.
        layer: PEFT's LoRA layer, or a plain base layer.

    Returns:
        The target layer.

    Raises:
        TypeError: If neither of the classes nor a base class of them is registered.
    """
    base = _base(layer)
    for layer_class in (*type(layer).__mro__, *type(base).__mro__):
        found = _LAYER_TYPES.get(_name_of(layer_class))
        if found is not None:
            return TargetLayer(name, base, found, found.weight(layer), getattr(layer, "parameter_name", None))
    supported = ", ".join(sorted({registered.rpartition(".")[2] for registered in _LAYER_TYPES}))
    raise TypeError(
        f"Layer {name!r} is a {_name_of(type(base))}, for which no eFIM is defined (supported: {supported}). Take it "
        "out of `target_modules`, or add it with `exclude_modules`."
    )


def _name_of(layer_class: type) -> str:
    return f"{layer_class.__module__}.{layer_class.__qualname__}"


# --- Dimensions ---


def _linear_weight(layer: Any) -> Weight:
    return Weight(layer.out_features, layer.in_features)


# The dimensions come from attributes, because a sharded or offloaded weight may be empty at the time.


def _conv1d_weight(layer: Any) -> Weight:
    base = _base(layer)
    return Weight(base.nf, base.nx)


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _embedding_weight(layer: Any) -> Weight:
    base = _base(layer)
    return Weight(base.embedding_dim, base.num_embeddings)


def _convolution_weight(layer: Any) -> Weight:
    """A (r × C_in × kernel) has no groups in PEFT, B (C_out × r / groups) has."""
    base = _base(layer)
    d_in = base.in_channels * math.prod(base.kernel_size)
    return Weight(
        d_out=base.out_channels,
        d_in=d_in,
        num_entries=base.out_channels * d_in // base.groups,
        parameters_per_rank=d_in + base.out_channels // base.groups,
        rank_step=base.groups,
    )


def _attention_weight(layer: Any) -> Weight:
    """One adapter of rank r for the three input projections together, one for the output projection."""
    width = _base(layer).embed_dim
    return Weight(3 * width, width, num_entries=4 * width**2, parameters_per_rank=6 * width)


def _parameter_weight(layer: Any) -> Weight:
    """PEFT gives each of the experts an adapter of rank r."""
    d_out, d_in, experts = layer.out_features, layer.in_features, layer.num_experts
    return Weight(d_out, d_in, num_entries=experts * d_out * d_in, parameters_per_rank=experts * (d_out + d_in))


# --- The layer types ---


# Quantised layers that are no subclass of nn.Linear are known by PEFT's class for them.
@register_layer_type(
    nn.Linear,
    "peft.tuners.lora.aqlm.AqlmLoraLinear",
    "peft.tuners.lora.awq.AwqLoraLinear",
    "peft.tuners.lora.eetq.EetqLoraLinear",
    "peft.tuners.lora.gptq.GPTQLoraLinear",
    "peft.tuners.lora.hqq.HqqLoraLinear",
    "peft.tuners.lora.inc.IncLoraLinear",
    "peft.tuners.lora.te.TeLinear",
    weight=_linear_weight,
)
@register_layer_type(Conv1D, weight=_conv1d_weight)
def linear_squared_norms(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """A linear layer, quantised or not: `G_t = g_tᵀ x_t`; every dimension before the features is a position.

    Long examples are read through `LayerCall.sketch`, if there is one.

    Args:
        target: The layer.
        calls: Calls with input (B × … × d_in) and gradient (B × … × d_out).
        batch_size: Examples, B.

    Returns:
        `‖G_t‖²_F` (B).

    Raises:
        UnattributableError: If rows of the input belong to no example.
        ValueError: If only a part of the layer is in this process.
    """
    for call in calls:
        found = (call.gradient.shape[-1], call.input.shape[-1])
        if found != (target.weight.d_out, target.weight.d_in):
            raise ValueError(
                f"Layer {target.name!r} is ({target.weight.d_out}, {target.weight.d_in}), but in this process it is "
                f"{found}. {TENSOR_PARALLELISM}"
            )
    pairs = [by_example(call.input, call.gradient, batch_size) for call in calls]
    x, g = _concatenated([(_positions(x), _positions(g)) for x, g in pairs])
    return squared_norms(x, g, sketch=calls[0].sketch)


@register_layer_type(nn.Embedding, weight=_embedding_weight)
def embedding(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """An embedding: row i of `G_t` is the sum of `g` over the positions of example t that hold id i.

    The row of `padding_idx` has no gradient, as in PyTorch. An `embed_scale` of the layer is part of its output and
    so of its gradient, as PEFT has it.

    Args:
        target: The layer.
        calls: Calls with ids (B × …) and gradient (B × … × d).
        batch_size: Examples, B.

    Returns:
        `‖G_t‖²_F` (B).

    Raises:
        UnattributableError: If ids belong to no example, such as positions that all examples share.
    """
    pairs = [by_leading_dimension(call.input, call.gradient, batch_size) for call in calls]
    ids, g = _concatenated([(ids.reshape(batch_size, -1), _positions(g)) for ids, g in pairs])
    scale = float(getattr(target.module, "embed_scale", 1.0))
    return embedding_squared_norms(ids, g, target.module.padding_idx) * scale**2


@register_layer_type(nn.Conv1d, nn.Conv2d, nn.Conv3d, weight=_convolution_weight)
def convolution(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """A convolution with any stride, padding, dilation and groups, by PyTorch's own gradient of the weight.

    Args:
        target: The layer.
        calls: Calls with input (B × C_in × …) and gradient (B × C_out × …).
        batch_size: Examples, B.

    Returns:
        `‖G_t‖²_F` (B).

    Raises:
        UnattributableError: If rows of the input belong to no example.
    """
    layer = target.module
    batched = layer.weight.ndim
    pairs = []
    for call in calls:
        x, g = call.input, call.gradient
        if x.ndim < batched:
            x, g = x.unsqueeze(0), g.unsqueeze(0)
        x, g = by_leading_dimension(x, g, batch_size)
        pairs.append(
            (x.reshape(batch_size, -1, *x.shape[1 - batched :]), g.reshape(batch_size, -1, *g.shape[1 - batched :]))
        )
    return convolution_squared_norms(layer, pairs)


@register_layer_type(nn.MultiheadAttention, weight=_attention_weight, runs_again=True)
def attention(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """`nn.MultiheadAttention`, of which PEFT adapts `in_proj_weight` and `out_proj.weight` at one rank.

    The projections are linear layers; the attention between them is run again to get their gradients.

    Args:
        target: The layer.
        calls: Calls with query, key and value, and the gradient of the first output.
        batch_size: Examples, B.

    Returns:
        `‖G_t‖²_F` (B), summed over both weights.

    Raises:
        UnattributableError: If rows of the input belong to no example.
    """
    with onloaded(target.module, target.module.out_proj):
        matrices = [
            [by_leading_dimension(x, g, batch_size) for x, g in attention_matrices(target.module, call)]
            for call in calls
        ]
    by_matrix = [[(_positions(x), _positions(g)) for x, g in pairs] for pairs in zip(*matrices, strict=True)]
    return torch.stack([squared_norms(*_concatenated(pairs)) for pairs in by_matrix]).sum(0)


@register_layer_type(
    "peft.tuners.lora.layer.ParamWrapper", weight=_parameter_weight, runs_again=True, all_outputs=True
)
def parameter(target: TargetLayer, calls: Sequence[LayerCall], batch_size: int) -> Tensor:
    """A parameter of any module, such as the experts of a mixture, by running the module again for every example.

    If it has several outputs, the gradients of all of them count. The temporary memory is one gradient of the
    parameter, and what the module keeps for one example.

    Args:
        target: The module and its parameter.
        calls: Calls whose rows of input and output belong to examples, such as (B · T × d) of experts.
        batch_size: Examples, B.

    Returns:
        `‖G_t‖²_F` (B), over all entries of the parameter: over all experts, if it holds several.

    Raises:
        UnattributableError: If an example alone gives another output than in its batch.
        RuntimeError: If the module gives another output when it is run again with the same arguments.
        TypeError: If the parameter cannot have a gradient.
    """
    with onloaded(target.module):
        weight = getattr(target.module, str(target.parameter_name))
        if not weight.dtype.is_floating_point:
            raise TypeError(
                f"Parameter {target.name!r} has dtype {weight.dtype}: it can have no gradient and no eFIM."
            )
        norms = [_norm_of_example(target, weight, calls, example, batch_size) for example in range(batch_size)]
        return torch.stack(norms)


def _norm_of_example(
    target: TargetLayer, weight: Tensor, calls: Sequence[LayerCall], example: int, batch_size: int
) -> Tensor:
    """`‖G_t‖²_F`, a scalar. The gradient runs at a scale of 1, so that it does not vanish in half precision."""
    gradients = [_rows_of_example(call.gradients, example, batch_size) for call in calls]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=dtype, device=weight.device)
    largest = [
        one.abs().amax().to(dtype) for of_call in gradients for one in of_call if one is not None and one.numel()
    ]
    scale = torch.stack(largest).amax() if largest else total
    if scale == 0:
        return total
    needed = weight.requires_grad
    try:
        weight.requires_grad_(True)
        pairs = [
            (output, gradient / scale)
            for call, of_call in zip(calls, gradients, strict=True)
            for output, gradient in zip(_run_again(target, call, example, batch_size), of_call, strict=True)
            if gradient is not None and output.requires_grad  # one may be made without the parameter
        ]
        outputs, seeds = [output for output, _ in pairs], [seed for _, seed in pairs]
        (gradient,) = torch.autograd.grad(outputs, weight, seeds, allow_unused=True) if pairs else (None,)
    finally:
        weight.requires_grad_(needed)
    if gradient is None:
        return total
    return torch.linalg.vector_norm(gradient, dtype=dtype).square() * scale**2


def _run_again(target: TargetLayer, call: LayerCall, example: int, batch_size: int) -> list[Any]:
    """All outputs for one example, of which those with a gradient are what they were in the batch."""
    args, kwargs = _rows_of_example((call.args, call.kwargs), example, batch_size)
    with torch.enable_grad(), call.replayed():
        # `forward`, because the hooks of the module have seen this call.
        outputs = tree_leaves(target.module.forward(*args, **kwargs))
    expected = [
        output if gradient is not None else None for output, gradient in zip(call.outputs, call.gradients, strict=True)
    ]
    if _are_of_examples(expected, batch_size) and _are_same(outputs, _rows_of_example(expected, example, batch_size)):
        return outputs
    if batch_size > 1:
        raise UnattributableError
    raise RuntimeError(
        f"{type(target.module).__name__} of {target.name!r} gave another output when it was run again with the same "
        "arguments, so the gradient of its parameter cannot be found. Switch off what is random or stateful in it, or "
        "take the parameter out of `target_parameters`."
    )


def _are_of_examples(outputs: Sequence[Tensor | None], batch_size: int) -> bool:
    """Whether the rows of all of them can be divided among the examples; a mean over the batch has none."""
    return batch_size == 1 or not any(
        output is not None and (output.ndim == 0 or output.shape[0] % batch_size) for output in outputs
    )


def _are_same(outputs: Sequence[Any], expected: Sequence[Tensor | None]) -> bool:
    """Whether outputs are those that are expected, where one is."""
    return len(outputs) == len(expected) and all(
        before is None
        or (output.shape == before.shape and bool((output - before).norm() <= _SAME_OUTPUT * before.norm()))
        for output, before in zip(outputs, expected, strict=True)
    )


def _rows_of_example(values: Any, example: int, batch_size: int) -> Any:
    """Rows of one example of all tensors, where the rows can be divided among the examples."""

    def rows_of(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] % batch_size:
            return value
        rows = value.shape[0] // batch_size
        return value[example * rows : (example + 1) * rows]

    return tree_map(rows_of, values)


def _positions(value: Tensor) -> Tensor:
    """(B × … × d) as (B × T × d)."""
    return value.reshape(value.shape[0], -1, value.shape[-1])


def _concatenated(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All calls as positions of one: the gradient of the weight is the sum over them."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([x for x, _ in pairs], dim=1), torch.cat([g for _, g in pairs], dim=1)

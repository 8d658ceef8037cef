"""The registry of layer types, in which a layer is looked up by its class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .call import LayerCall

SquaredNorms = Callable[["TargetLayer", Sequence[LayerCall], int], Tensor]


def leading_or_second(module: Any) -> tuple[int, ...]:
    """`LayerType.batch_dimensions` of a layer of vectors or ids, whose input may have the sequence first."""
    return (0, 1)


def leading_only(module: Any) -> tuple[int, ...]:
    """`LayerType.batch_dimensions` of a layer whose second dimension is never the batch, such as channels."""
    return (0,)


Observed = Literal["input", "output", "call", "all outputs"]
"""What is kept of a call until its gradients arrive; see `TargetLayer.observed`."""

TENSOR_PARALLELISM = (
    "Tensor parallelism is not supported: calibrate with a model that is not split, or sharded by FSDP or ZeRO-3."
)


@dataclass(frozen=True)
class WeightShape:
    """Dimensions of the base weight of a layer, and the cost of PEFT's adapter for it.

    Attributes:
        d_out: Number of outputs of the matrix B A.
        d_in: Number of inputs of the matrix B A.
        num_entries: Number of entries of the weight; `None` for `d_out · d_in`.
        parameters_per_rank: Adapter parameters of one rank; `None` for `d_in + d_out`.
        rank_step: PEFT accepts only ranks that are divisible by it.
    """

    d_out: int
    d_in: int
    num_entries: int | None = None
    parameters_per_rank: int | None = None
    rank_step: int = 1

    @property
    def rank_parameters(self) -> int:
        """Adapter parameters of one rank."""
        return self.parameters_per_rank or self.d_out + self.d_in

    @property
    def entries(self) -> int:
        """Number of entries over which the eFIM is averaged."""
        return self.num_entries or self.d_out * self.d_in


@dataclass(frozen=True)
class LayerType:
    """How the layers of a class are measured. `register_layer_type` creates it.

    Attributes:
        squared_norms: Function of the target layer, its calls in one forward pass and the number of examples B. It
            returns `‖G_t‖²_F` (B), for the loss as it was back-propagated: without the factor B² that a mean over the
            batch needs. It raises `UnattributableError` if rows of the input do not belong to an example.
        weight_shape: Function of PEFT's LoRA layer or of the plain base layer, which returns the dimensions. It reads
            them from attributes, because a sharded or offloaded weight may be empty at that time.
        needs_replay: Whether `squared_norms` runs the layer again. Its calls then have all arguments, the outputs and
            the state of the random numbers; otherwise they have only the input and the gradient of the output.
        all_outputs: Whether `squared_norms` of a layer that needs replay uses the gradients of all outputs. Otherwise
            only the first output may have a gradient.
        batch_dimensions: Function of PEFT's LoRA layer, its A, or the base layer, which returns those of the first two
            dimensions of its input that may hold the examples.
    """

    squared_norms: SquaredNorms
    weight_shape: Callable[[Any], WeightShape]
    needs_replay: bool = False
    all_outputs: bool = False
    batch_dimensions: Callable[[Any], tuple[int, ...]] = leading_or_second


@dataclass(frozen=True)
class TargetLayer:
    """A frozen weight that an adapter targets, under its name in the base model.

    `module` is the base module, whose calls are recorded. `parameter_name` is the name of its targeted parameter, or
    `None` if PEFT targets the module and not one of its parameters.
    """

    name: str
    module: Any
    layer_type: LayerType
    weight_shape: WeightShape
    parameter_name: str | None = None

    @property
    def observed(self) -> Observed:
        """What is kept of each call: its input, its output, or the whole call with one or all of its outputs."""
        if self.layer_type.all_outputs:
            return "all outputs"
        return "call" if self.layer_type.needs_replay else "input"

    @property
    def is_run_again(self) -> bool:
        """Whether the whole call is kept, to run it again."""
        return self.observed in ("call", "all outputs")

    @property
    def batch_dimensions(self) -> tuple[int, ...]:
        """Those of the first two dimensions of the input that may hold the examples."""
        return self.layer_type.batch_dimensions(self.module)


_LAYER_TYPES: dict[str, LayerType] = {}


def register_layer_type(
    *classes: type[nn.Module] | str,
    weight_shape: Callable[[Any], WeightShape],
    needs_replay: bool = False,
    all_outputs: bool = False,
    batch_dimensions: Callable[[Any], tuple[int, ...]] = leading_or_second,
) -> Callable[[SquaredNorms], SquaredNorms]:
    """Decorator that registers a function as `LayerType.squared_norms` of some classes and of their subclasses.

    A class that is registered again gets the new function. A subclass that is registered itself has precedence over
    its base classes, and the class of PEFT's LoRA layer has precedence over that of the base layer.

    Example:
        A linear layer that PEFT can adapt, but that is not a subclass of `nn.Linear`:

        ```python
        from fim_lora import register_layer_type
        from fim_lora.fisher.gradients.norms import squared_norms
        from fim_lora.fisher.layers.attribution import by_example, concatenate_calls, flatten_positions
        from fim_lora.fisher.layers.registry import WeightShape


        def my_linear_shape(layer):
            return WeightShape(layer.out_features, layer.in_features)


        @register_layer_type(MyLinear, weight_shape=my_linear_shape)
        def measure_my_linear(target, calls, batch_size):
            # Examples first: x (B × … × d_in) and g (B × … × d_out).
            pairs = [by_example(call.input, call.gradient, batch_size) for call in calls]
            # A second call of the layer adds positions: x (B × T × d_in) and g (B × T × d_out).
            x, g = concatenate_calls([(flatten_positions(x), flatten_positions(g)) for x, g in pairs])
            return squared_norms(x, g)  # (B)
        ```

    Args:
        *classes: Classes of base layers or of PEFT's LoRA layers. A full name, such as `"package.module.Class"`,
            represents a class that is defined only if an optional library is installed.
        weight_shape: See `LayerType.weight_shape`. It must not be a lambda, because models are pickled together with
            the hooks on their layers.
        needs_replay: See `LayerType.needs_replay`.
        all_outputs: See `LayerType.all_outputs`.
        batch_dimensions: See `LayerType.batch_dimensions`; not a lambda either.

    Returns:
        The decorator, which returns the function unchanged.
    """

    def register(function: SquaredNorms) -> SquaredNorms:
        for layer_class in classes:
            name = layer_class if isinstance(layer_class, str) else _full_name(layer_class)
            _LAYER_TYPES[name] = LayerType(function, weight_shape, needs_replay, all_outputs, batch_dimensions)
        return function

    return register


def target_layer(name: str, layer: nn.Module) -> TargetLayer:
    """The target layer of PEFT's LoRA layer or of a plain base layer.

    The class of the LoRA layer is looked up first, then that of the base layer, most derived class first. Raises
    `TypeError` if none of these classes is registered.
    """
    base = base_layer_of(layer)
    for layer_class in (*type(layer).__mro__, *type(base).__mro__):
        found = _LAYER_TYPES.get(_full_name(layer_class))
        if found is not None:
            return TargetLayer(name, base, found, found.weight_shape(layer), getattr(layer, "parameter_name", None))
    supported = ", ".join(sorted({registered.rpartition(".")[2] for registered in _LAYER_TYPES}))
    raise TypeError(
        f"Layer {name!r} is a {_full_name(type(base))}, for which no eFIM is defined (supported: {supported}). Remove "
        "it from `target_modules`, or add it to `exclude_modules`."
    )


def base_layer_of(layer: Any) -> Any:
    """The layer inside PEFT's LoRA layer, or the layer itself if it is a plain base layer."""
    # `fisher` does not depend on PEFT, so PEFT's layers are recognized by their method. It is looked up in the class,
    # because wrappers of PEFT and PyTorch forward attributes of an instance to the module inside them.
    return layer.get_base_layer() if hasattr(type(layer), "get_base_layer") else layer


def _full_name(layer_class: type) -> str:
    return f"{layer_class.__module__}.{layer_class.__qualname__}"

"""The number of examples in a batch, and the number of terms of its loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..orders import tensors_of

# Names of inputs and labels, most reliable first, whose leading dimension is the batch in every model of transformers.
# Positions, masks and indices can have other ones.
_NAMES_WITH_EXAMPLES = (
    *("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"),
    *("pixel_values", "input_features", "input_values", "labels", "label", "targets", "target", "y"),
)


class BatchSize(NamedTuple):
    """Examples in a batch, `None` if nothing shows them, and whether the batch leaves no other reading."""

    examples: int | None
    is_certain: bool


def batch_size_of(batch: Any, main_input_name: Any = None) -> BatchSize:
    """Number of examples in a batch, which is a tensor or a nesting of mappings and sequences of tensors.

    It is the leading dimension of the main input (`model.main_input_name` in transformers) if the batch has it, else
    of the first usual input or label in it, else that which all tensors have in common. Where tensors differ, it is
    the length of those of one dimension if all others have it among their first two, such as labels of sequences that
    come first; and otherwise the leading dimension of the first tensor, without certainty. A list of mappings is a
    list of examples.

    Args:
        batch: The batch.
        main_input_name: A name, or several. Anything else is ignored, because the attribute may belong to others.
    """
    if isinstance(batch, Mapping):
        for name in (*_names(main_input_name), *_NAMES_WITH_EXAMPLES):
            value = batch.get(name)
            if isinstance(value, Tensor) and value.ndim > 0 and not _may_be_flattened(value, batch):
                return BatchSize(value.shape[0], True)
    if isinstance(batch, (list, tuple)) and len(batch) > 1 and all(isinstance(one, Mapping) for one in batch):
        return BatchSize(len(batch), True)  # a list of examples
    shapes = [tensor.shape for tensor in tensors_of(batch) if tensor.ndim > 0]
    if not shapes:
        return BatchSize(None, False)
    lengths = {shape[0] for shape in shapes if len(shape) == 1}
    if len(lengths) == 1 and all(lengths & set(shape[:2]) for shape in shapes):
        return BatchSize(lengths.pop(), True)
    return BatchSize(shapes[0][0], len({shape[0] for shape in shapes}) == 1)


def loss_terms_of(batch: Any, batch_size: int | None, model: nn.Module) -> int | None:
    """Number of terms that the loss of a batch is the mean of, or `batch_size` where the batch does not show it.

    Integer labels of two or more dimensions, as `transformers` models take them, have one term for each label that is
    not -100. The first label of a sequence is no term where the model predicts each label from the positions before.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return batch_size
    if _shifts_labels(model):
        labels = labels[:, 1:]
    return int((labels != -100).sum()) or batch_size


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the loss of a `transformers` model is that of the next token, as far as its class shows it."""
    # The outermost one of transformers, because the model may be adapted, or a part of another one.
    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or inner.config.is_encoder_decoder:
        return False
    kind = inner.loss_type
    return kind in ("ForCausalLM", "ForConditionalGeneration") or (
        kind is None and type(inner).__name__.endswith("LMHeadModel")
    )


def _names(main_input_name: Any) -> tuple[str, ...]:
    names = (main_input_name,) if isinstance(main_input_name, str) else main_input_name
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, (tuple, list)) else ()


def _may_be_flattened(labels: Tensor, batch: Mapping[str, Any]) -> bool:
    """Whether labels of one dimension may be those of all positions, because another tensor has fewer rows."""
    others = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim > 1]
    return labels.ndim == 1 and any(0 < rows < len(labels) and len(labels) % rows == 0 for rows in others)

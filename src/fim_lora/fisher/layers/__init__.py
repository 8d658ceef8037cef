"""Layer types: one file each, which registers a function for the per-example gradient norms of the weight."""

# Importing a file registers its layer type: a new layer type has to be added here.
from . import attention, convolution, embedding, linear, parameter  # noqa: F401
from .registry import register_layer_type

__all__ = ["register_layer_type"]

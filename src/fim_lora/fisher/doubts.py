"""`Doubts`: what passes leave open about their examples, and the warnings that say so."""

from collections.abc import Collection
from dataclasses import dataclass

from ..runtime.user_warnings import warn_user

DECLARE = (
    "Say how many examples a batch has, and how rows follow each other, with `with fim_lora.calibration_batch(model, "
    "num_examples, rows=...)` around each forward and backward pass, or pass a `dataloader`"
)
NAME_THE_LABELS = "Name the input or the labels `input_ids` or `labels`, with the batch as their leading dimension"


@dataclass
class Doubts:
    """What was assumed about batches, because they did not show it.

    Attributes:
        advice: What the user can do, as a sentence without a full stop.
        several_forward_passes: Whether several forward passes of a loop of one's own came before one backward pass.
        uncertain_batch_size: Whether the inputs of a forward pass left their number of examples open.
    """

    advice: str = DECLARE
    several_forward_passes: bool = False
    uncertain_batch_size: bool = False

    def warn(self, ambiguous_layers: Collection[str]) -> None:
        """Warn of every assumption, and of layers whose rows could belong to the examples in several ways."""
        if self.several_forward_passes:
            warn_user(
                "The model was called several times before one backward pass, and every call was taken for another "
                "view of the same examples. If the calls are pieces of one batch, the scores are wrong. "
                f"{self.advice}.",
            )
        if self.uncertain_batch_size:
            warn_user(
                "The batches do not show how many examples they hold: the leading dimensions of their tensors differ, "
                "or they have no tensors. That of the first tensor, or of each layer's input, was taken, and the "
                "scores are wrong if it is not the number of examples. "
                f"{self.advice}.",
            )
        if ambiguous_layers:
            warn_user(
                f"The rows of the inputs of {len(ambiguous_layers)} layers could belong to the examples of a batch in "
                "several ways. They were taken as consecutive rows of each example, or as sequences whose second "
                f"dimension is the batch: {sorted(ambiguous_layers)}. {self.advice}.",
            )

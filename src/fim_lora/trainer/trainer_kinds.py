"""What an example is to the trainers of TRL, and which of them can be calibrated with their own batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

# Trainers of TRL whose dataloader yields all that the loss needs, and whose loss is a mean over the examples. Trainers
# of other libraries are taken to be like transformers' `Trainer`.
_WITH_COMPLETE_BATCHES = {
    "CPOTrainer",
    "DPOTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "PRMTrainer",
    "RewardTrainer",
    "SFTTrainer",
}

# Arguments of trainers that put all chosen texts before all rejected ones, and an example is a pair: in the batches,
# or only when they call the model.
_PAIRS_IN_BATCHES = {"DPOConfig", "RewardConfig"}
_PAIRS_IN_PASSES = {"CPOConfig", "ORPOConfig", "OnlineDPOConfig"}


def require_complete_batches(trainer: Trainer) -> None:
    """Refuse a trainer of TRL whose batches do not determine the loss, such as GRPO, which generates its texts.

    Raises `ValueError` with the name of the trainer.
    """
    kind = _trainer_of_trl(type(trainer))
    if kind is None or kind.__name__ in _WITH_COMPLETE_BATCHES:
        return
    raise ValueError(
        f"{kind.__name__} cannot be calibrated with its own batches, because they do not determine its loss, or it "
        "was not tested. Call `initialize_lora_fim_ranks(trainer.model, dataloader)` instead, before `train()`, with "
        "a dataloader of similar texts with labels."
    )


def rows_per_example_in_batches(trainer: Trainer) -> int:
    """Rows of a batch of the trainer's dataloader that make up one example."""
    # The batches of such trainers, as DPO before TRL 1.0, have chosen and rejected texts apart.
    concatenates = hasattr(trainer, "concatenated_forward")
    return 2 if _is_any(trainer.args, _PAIRS_IN_BATCHES) and not concatenates else 1


def rows_per_example_in_passes(arguments: TrainingArguments) -> int:
    """Rows of a call of the model in the training that make up one example, for a trainer with these arguments."""
    if _is_any(arguments, {"XPOConfig", "NashMDConfig"}):
        return 1  # derived from OnlineDPOConfig, but they call the model with one text of each pair after the other
    if _is_any(arguments, {"TPOConfig"}):
        return 3 if arguments.tpo_alpha else 2  # chosen, rejected and, if its loss has a weight, the reference
    return 2 if _is_any(arguments, _PAIRS_IN_BATCHES | _PAIRS_IN_PASSES) else 1


def _is_any(arguments: TrainingArguments, names: set[str]) -> bool:
    return any(parent.__name__ in names for parent in type(arguments).__mro__)


def _trainer_of_trl(kind: type[Trainer]) -> type[Trainer] | None:
    """The trainer of TRL that a class is or derives from; private base classes do not count."""
    from transformers import Trainer  # loads much that `import fim_lora` does not need

    for parent in kind.__mro__:
        is_of_trl = parent.__module__.partition(".")[0] == "trl" and issubclass(parent, Trainer)
        if is_of_trl and not parent.__name__.startswith("_"):
            return parent
    return None

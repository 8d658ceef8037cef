"""The classes of a trained classifier: which output of its head each label of the data means."""

from collections.abc import Sequence
from dataclasses import replace

from .data import CalibrationData
from .errors import CommandError


def with_classes(data: CalibrationData, num_classes: int, names: Sequence[str]) -> CalibrationData:
    """The data with its labels in the order of the head's outputs, which no adapter states.

    Integers are the numbers of the outputs, also if the data lacks some of them. Strings are in the order of `names`,
    those of the base model, if these are the labels. Otherwise they are sorted, if there is one for each output.
    """
    column = data.columns["label"]
    numbers = [label for label in data.labels if isinstance(label, int)]
    if isinstance(data.labels, range):  # the data itself names all classes
        if len(data.labels) != num_classes:
            raise _not_the_head(data, f"{len(data.labels)} classes", num_classes)
        return data
    if numbers:
        if min(numbers) < 0 or max(numbers) >= num_classes:
            raise _not_the_head(data, f"the labels {min(numbers)} to {max(numbers)}", num_classes)
        return replace(data, labels=range(num_classes), label_names=[str(label) for label in range(num_classes)])
    if len(names) == num_classes and set(data.labels) <= set(names):
        return replace(data, labels=list(names), label_names=list(names))
    if len(data.labels) != num_classes:
        raise CommandError(
            f"Column {column!r} of {data.name} has {len(data.labels)} different labels, but the adapter's head has "
            f"{num_classes} outputs, so it is not known which output a label means: replace the labels by the numbers "
            "of the outputs, from 0, in the order of the training."
        )
    return data


def _not_the_head(data: CalibrationData, found: str, num_classes: int) -> CommandError:
    return CommandError(
        f"Column {data.columns['label']!r} of {data.name} has {found}, but the adapter's head has {num_classes} "
        f"outputs, 0 to {num_classes - 1}: give data for the task of the adapter."
    )

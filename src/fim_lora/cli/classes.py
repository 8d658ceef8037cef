"""The classes of a trained classifier: which output of its head each label of the data means."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fim_lora_command.errors import CommandError

from .data import CalibrationData, is_integer
from .models import ModelSource, named, read_config


@dataclass(frozen=True)
class Head:
    """A classification head: its name in messages, the number of its outputs, and their names in their order.

    `is_named` means that the names are those of this head, and not the defaults `LABEL_0` and so on, or those of
    another head on the same base model.
    """

    name: str
    num_classes: int
    names: Sequence[str]
    is_named: bool


def head_of(source: ModelSource) -> Head | None:
    """The trained classification head of a model, or `None` if its checkpoint has no such head."""
    config = read_config(source)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    names = class_names(config)
    if len(names) == 1 or config.problem_type not in (None, "single_label_classification"):
        raise CommandError(
            f"{source.name} is trained for {config.problem_type or 'regression'}, but --task seq-cls needs a model "
            "with one of several classes for each text: call the library in Python with your own loss."
        )
    return Head(f"the head of {source.name}", len(names), names, is_named=not _are_defaults(names))


def class_names(config: Any) -> list[str]:
    """Names of the outputs of a classification head, in their order; `LABEL_0` and so on by default."""
    return [str(name) for _, name in sorted(config.id2label.items())]


def with_classes_of_model(data: CalibrationData, source: ModelSource) -> CalibrationData:
    """The data with its labels in the order of the model's head; as it is, if the model's head is not trained."""
    head = head_of(source)
    if head is None:
        return data
    matched = _matched(data, head)
    if matched is None and not head.is_named and len(data.labels) == head.num_classes:
        return data
    return with_classes(data, head)


def with_classes(data: CalibrationData, head: Head) -> CalibrationData:
    """The data with its labels in the order of the head's outputs.

    Labels are the names of the outputs, whatever their case, or their numbers, also if the data lacks some of them.
    Other strings are sorted, if there is one for each output and the outputs have no names.
    """
    matched = _matched(data, head)
    if matched is not None:
        return matched
    column, count = f"Column {data.columns['label']!r} of {data.name}", len(data.labels)
    outputs = f"{head.name} has {head.num_classes} outputs"
    if isinstance(data.labels, range):  # the data itself names all classes
        raise CommandError(f"{column} has {count} classes, but {outputs}: give data for the task of the head.")
    if numbers := [label for label in data.labels if isinstance(label, int)]:
        raise CommandError(
            f"{column} has the labels {min(numbers)} to {max(numbers)}, but {outputs}, 0 to {head.num_classes - 1}: "
            "give data for the task of the head."
        )
    if head.is_named:
        raise CommandError(
            f"{column} has the labels {named(data.label_names)}, but {outputs} with the names {named(head.names)}: "
            "replace the labels by these names, or by the numbers of the outputs, from 0."
        )
    if count != head.num_classes:
        raise CommandError(
            f"{column} has {count} different labels, but {outputs}, so it is not known which output a label means: "
            "replace the labels by the numbers of the outputs, from 0, in the order of the training."
        )
    return data


def with_same_classes(data: CalibrationData, other: CalibrationData, head: Head) -> CalibrationData:
    """The data with its labels in the order of the head's outputs, where `other` has shown it."""
    return _matched(data, head) or replace(data, labels=other.labels, label_names=other.label_names)


def _matched(data: CalibrationData, head: Head) -> CalibrationData | None:
    """The data by the names or by the numbers of the outputs, or `None` if its labels are neither."""
    by_name = _by_name(data, head)
    if by_name is not None:
        return replace(data, labels=by_name, label_names=list(head.names))
    by_number = _by_number(data, head)
    if by_number is None:
        return None
    names = head.names if head.is_named else data.label_names
    if len(names) != head.num_classes:
        names = [str(number) for number in range(head.num_classes)]
    return replace(data, labels=by_number, label_names=list(names))


def _by_name(data: CalibrationData, head: Head) -> list[str | int] | None:
    """The label for each output; an output that the data lacks has its name, which is no label of the data."""
    by_name = dict(zip(map(_folded, data.label_names), data.labels, strict=True))
    names = [_folded(name) for name in head.names]
    fits = len(set(names)) == len(names) == head.num_classes and len(by_name) == len(data.labels)
    if not fits or not by_name.keys() <= set(names):
        return None
    return [by_name.get(folded, name) for folded, name in zip(names, head.names, strict=True)]


def _by_number(data: CalibrationData, head: Head) -> Sequence[str | int] | None:
    if isinstance(data.labels, range):
        return data.labels if len(data.labels) == head.num_classes else None
    numbers = [int(label) for label in data.labels if isinstance(label, int) or is_integer(label)]
    if len(numbers) < len(data.labels) or min(numbers) < 0 or max(numbers) >= head.num_classes:
        return None
    outputs = range(head.num_classes)
    return [str(number) for number in outputs] if isinstance(data.labels[0], str) else outputs


def _folded(name: str) -> str:
    return name.strip().casefold()


def _are_defaults(names: Sequence[str]) -> bool:
    return list(names) == [f"LABEL_{number}" for number in range(len(names))]

"""Tokenization: from rows to token ids and labels, and from these to padded batches."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from jinja2 import TemplateError
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from fim_lora_command.errors import CommandError, warn

from ..runtime.progress import progress_bar
from .cells import messages_of, parsed, text_of
from .data import CalibrationData, Row
from .known_formats import in_usual_form

# Label of the positions that the loss of transformers models ignores.
IGNORED = -100

# A running text is tokenized in pieces of about this many characters, cut at line ends, so that progress is visible.
_PIECE_CHARACTERS = 2**20


@dataclass(frozen=True)
class Example:
    """One tokenized example: the inputs of the model, without padding.

    `prompt_changed` means that the tokens of the prompt change when the completion follows.
    """

    feature: dict[str, Any]
    truncated: bool = False
    prompt_changed: bool = False

    @property
    def has_target(self) -> bool:
        """Whether there is a token or a class to predict; the first token of a sequence is not predicted."""
        labels = self.feature["labels"]
        return isinstance(labels, int) or any(label != IGNORED for label in labels[1:])


@dataclass(frozen=True)
class Examples:
    """The tokenized examples; with `is_classification`, their labels are classes, not tokens."""

    examples: Sequence[Example]
    is_classification: bool

    @property
    def num_truncated(self) -> int:
        """Number of examples that were longer than the maximum length."""
        return sum(example.truncated for example in self.examples)

    @property
    def token_ids(self) -> list[list[int]]:
        """Token ids of each example, without padding."""
        return [example.feature["input_ids"] for example in self.examples]

    def batches(self, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> DataLoader[Any]:
        """Pad the examples into batches, in their order."""
        collate = (
            DataCollatorWithPadding(tokenizer)
            if self.is_classification
            else DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        )
        features: Any = [example.feature for example in self.examples]
        return DataLoader(features, batch_size=batch_size, collate_fn=collate)


def tokenize(
    data: CalibrationData,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_length: int,
    seed: int,
    show_progress_bar: bool = True,
) -> Examples:
    """Draw `count` examples, or all if there are fewer, and tokenize them.

    Warns of examples without a token to predict, and of prompts whose tokens change when the completion follows.
    """
    if {"messages", "conversations"} & data.columns.keys() and tokenizer.chat_template is None:
        raise CommandError(
            f"{data.name} has conversations, but the tokenizer has no chat template: use the chat version of the "
            "model, or data with a column of plain text."
        )
    if data.is_stream:
        examples = _blocks(data, tokenizer, count, max_length, seed, show_progress_bar)
    else:
        rows = progress_bar(data.draw(count, seed), description="Tokenizing", unit="example", show=show_progress_bar)
        examples = [_encode(tokenizer, row, max_length, data.labels) for row in rows]
    if not any(example.has_target for example in examples):
        raise CommandError(
            f"No example of {data.name} has a token to predict within {max_length} tokens: {_advice(examples)}."
        )
    _warn_of_problems(examples, max_length)
    return Examples(examples, is_classification="label" in data.columns)


def _encode(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int, labels: Sequence[str | int]) -> Example:
    if "label" in row.values:
        return _encode_labeled(tokenizer, row, max_length, labels)
    row = in_usual_form(row)
    if "messages" in row.values:
        return _encode_messages(tokenizer, row, max_length)
    if "prompt" in row.values:
        return _encode_prompt_and_completion(tokenizer, row, max_length)
    text = _with_end(tokenizer, text_of(row, "text"))
    return _causal_example(tokenizer(text)["input_ids"], max_length)


def _encode_prompt_and_completion(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Example:
    """As in TRL: the completion ends the sequence, and only its tokens count in the loss."""
    prompt, completion = text_of(row, "prompt"), _with_end(tokenizer, text_of(row, "completion"))
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + completion)["input_ids"]
    changed = ids[: len(prompt_ids)] != prompt_ids
    return _causal_example(ids, max_length, num_prompt_tokens=len(prompt_ids), prompt_changed=changed)


def _encode_messages(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Example:
    """As in TRL by default: all tokens of the conversation count in the loss, and the template gets the tools."""
    messages, tools = messages_of(row), parsed(row, "tools", list)
    options = _template_options(tokenizer, row)
    try:
        # Some templates write an introduction to an empty list of tools.
        encoded: Any = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=True, return_dict=True, **options
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise CommandError(
            f"The chat template cannot render {row.place}: {error}. Correct or remove the row."
        ) from error
    return _causal_example(encoded["input_ids"], max_length)


def _template_options(tokenizer: PreTrainedTokenizerBase, row: Row) -> Mapping[str, Any]:
    """Variables of the chat template, without arguments of `apply_chat_template` itself, such as a template."""
    options = parsed(row, "chat_template_kwargs", Mapping) or {}
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    reserved = arguments - {"add_generation_prompt", "continue_final_message", "documents", "kwargs"}
    if found := sorted(reserved & options.keys()):
        raise CommandError(
            f"chat_template_kwargs of {row.place} has {found[0]!r}, which is not a variable of the chat template: "
            "remove it."
        )
    return options


def _encode_labeled(
    tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int, labels: Sequence[str | int]
) -> Example:
    text, label = text_of(row, "text"), row.values["label"]
    if label not in labels:
        raise CommandError(f"The label {label!r} of {row.place} is not one of the data's labels: remove the row.")
    # The tokenizer truncates, because it keeps the closing special token of encoders.
    feature = dict(tokenizer(text, truncation=True, max_length=max_length))
    truncated = len(tokenizer(text)["input_ids"]) > max_length
    return Example(feature | {"labels": labels.index(label)}, truncated=truncated)


def _causal_example(
    ids: list[int], max_length: int, num_prompt_tokens: int = 0, prompt_changed: bool = False
) -> Example:
    labels = [IGNORED] * num_prompt_tokens + ids[num_prompt_tokens:]
    length = min(len(ids), max_length)
    feature = {"input_ids": ids[:length], "attention_mask": [1] * length, "labels": labels[:length]}
    return Example(feature, truncated=len(ids) > max_length, prompt_changed=prompt_changed)


def _blocks(
    data: CalibrationData,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_length: int,
    seed: int,
    show_progress_bar: bool,
) -> list[Example]:
    """Cut a running text into blocks, and draw some of them at random."""
    column = data.columns["text"]
    text = "\n".join(value for value in data.rows[column] if value)
    if not text.strip():
        raise CommandError(f"{data.name} holds no text: give another file.")
    # Models that were trained with a token at the beginning give meaningless losses without it.
    first = tokenizer("")["input_ids"][:1]
    beginning = first if first == [tokenizer.bos_token_id] else []
    size = max_length - len(beginning)
    ids: list[int] = []
    for piece in progress_bar(_pieces(text), description="Tokenizing", unit="MB", show=show_progress_bar):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids), size)
    drawn = Random(seed).sample(starts, min(count, len(starts)))
    return [_causal_example(beginning + ids[start : start + size], max_length) for start in drawn]


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def _with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """As in TRL: an example ends with the end-of-sequence token, if the tokenizer has one."""
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _warn_of_problems(examples: Sequence[Example], max_length: int) -> None:
    without_target = sum(not example.has_target for example in examples)
    if without_target:
        warn(
            f"{without_target} of {len(examples)} examples have no token to predict within {max_length} tokens and "
            f"count with a gradient of zero: {_advice(examples)}, or remove such rows."
        )
    changed = sum(example.prompt_changed for example in examples)
    if changed:
        warn(
            f"In {changed} of {len(examples)} examples the last tokens of the prompt change when the completion "
            "follows, so the loss may start about one token too early or too late: end prompts or begin completions "
            "with a space or a line break."
        )


def _advice(examples: Sequence[Example]) -> str:
    """What gives examples without a token to predict one; the first token of a sequence is not predicted."""
    without_target = [example for example in examples if not example.has_target]
    if any(example.truncated for example in without_target):
        return "raise --max-length"
    return "a text needs two tokens or more"

"""Tokenization: from rows to token ids and labels, and from these to padded batches."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from jinja2 import TemplateError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from fim_lora_command.errors import CommandError, warn

from .data import CalibrationData, Row

# Label of the positions that the loss of transformers models ignores.
IGNORED = -100

# A running text is tokenized in pieces of about this many characters, cut at line ends, so that progress is visible.
_PIECE_CHARACTERS = 2**20

_MAX_EXCERPT_LENGTH = 80


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
    show_progress_bar: bool,
) -> Examples:
    """Draw `count` examples, or all if there are fewer, and tokenize them.

    Warns of examples without a token to predict, and of prompts whose tokens change when the completion follows.
    """
    if "messages" in data.columns and tokenizer.chat_template is None:
        raise CommandError(
            f"{data.name} has messages, but the tokenizer has no chat template: use the chat version of the "
            "model, or data with a column of plain text."
        )
    if data.is_stream:
        examples = _blocks(data, tokenizer, count, max_length, seed, show_progress_bar)
    else:
        rows = tqdm(data.draw(count, seed), desc="Tokenizing", unit="example", disable=not show_progress_bar)
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
    if "messages" in row.values:
        return _encode_messages(tokenizer, row, max_length)
    if "prompt" in row.values:
        return _encode_prompt_and_completion(tokenizer, row, max_length)
    text = _with_end(tokenizer, _text(row, "text"))
    return _causal_example(tokenizer(text)["input_ids"], max_length)


def _encode_prompt_and_completion(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Example:
    """As in TRL: the completion ends the sequence, and only its tokens count in the loss."""
    prompt, completion = _text(row, "prompt"), _with_end(tokenizer, _text(row, "completion"))
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + completion)["input_ids"]
    changed = ids[: len(prompt_ids)] != prompt_ids
    return _causal_example(ids, max_length, num_prompt_tokens=len(prompt_ids), prompt_changed=changed)


def _encode_messages(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Example:
    """As in TRL by default: all tokens of the conversation count in the loss, and the template gets the tools."""
    messages, tools = _messages(row), _parsed(row, "tools", list)
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
    options = _parsed(row, "chat_template_kwargs", Mapping) or {}
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
    text, label = _text(row, "text"), row.values["label"]
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
    for piece in tqdm(_pieces(text), desc="Tokenizing", unit="MB", disable=not show_progress_bar):
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


def _text(row: Row, role: str) -> str:
    value = row.values[role]
    if value is None:
        raise CommandError(f"The {role} of {row.place} is missing: remove the row.")
    if not isinstance(value, str):
        raise CommandError(
            f"The {role} of {row.place} is not text but {type(value).__name__}: {_excerpt(value)}. "
            "Convert the column to text, or choose another one."
        )
    if not value.strip():
        raise CommandError(f"The {role} of {row.place} is empty: remove the row.")
    return value


def _messages(row: Row) -> list[dict[str, Any]]:
    messages = row.values["messages"]
    if not messages:
        raise CommandError(f"The messages of {row.place} are empty: remove the row.")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise CommandError(
            f"The messages of {row.place} are not a list of {{'role': …, 'content': …}}: {_excerpt(messages)}. "
            "Correct or remove the row."
        )
    return _without_none(messages)


def _parsed(row: Row, role: str, kind: type) -> Any:
    """A value that may be left out or be written as JSON, as TRL accepts it; dictionaries without empty keys."""
    value = row.values.get(role)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise CommandError(f"The {role} of {row.place} are not valid JSON: {error}. Correct the row.") from error
    if value is None or value == "":
        return None
    parts = value if isinstance(value, list) else []
    if not isinstance(value, kind) or not all(isinstance(one, Mapping) for one in parts):
        wanted = "a list of JSON schemas" if kind is list else "a dictionary of arguments"
        raise CommandError(
            f"The {role} of {row.place} are not {wanted} but {type(value).__name__}: {_excerpt(value)}. Correct the "
            "row."
        )
    return _without_none(value)


def _without_none(value: Any) -> Any:
    """Arrow gives each dictionary the keys of all of them, but templates check whether a key is present."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message


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


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_EXCERPT_LENGTH else f"{text[:_MAX_EXCERPT_LENGTH]}…"

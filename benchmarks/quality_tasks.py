"""The tasks of `quality.py`: data, pretrained models, batches that depend only on the seed, and metrics."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

Batch = dict[str, Tensor]

HUB = "hub"
"""In place of a folder with the data files: read the same data from the hub."""

# The splits do not depend on the seed of a run, so that all runs are measured on the same rows.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Example:
    """One tokenized example.

    Attributes:
        input_ids: Token ids.
        labels: The class, or one label for each token, with -100 for tokens without a loss.
        prompt: For a question, all tokens before the answer, not truncated.
        answer: For a question, the text of the reference answer.
    """

    input_ids: list[int]
    labels: int | list[int]
    prompt: list[int] | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Splits:
    """The examples of a task.

    Attributes:
        train: Examples for training and calibration.
        development: Examples for selecting the learning rate, which are never reported.
        test: Examples for the reported metrics.
        num_labels: Number of classes; 0 for a language model.
    """

    train: list[Example]
    development: list[Example]
    test: list[Example]
    num_labels: int


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Name of the task in the results.
        metric: The main metric: `"accuracy"` (higher is better) or `"loss"` (lower is better).
        read: Reads the rows for training and for the test from a folder or `HUB`.
        causal: Whether the model is a causal language model.
        targets: Module names of `all-linear` and of `attention`.
        learning_rates: The learning rates to start with, the same for every method.
        batch_size: Examples in a batch.
        steps: Training steps.
        max_length: Largest number of tokens in an example.
        development_size: Examples in the development split, which are taken from the training rows.
        test_size: Largest number of examples in the test split.
        is_packed: Whether texts stand one after another, cut into examples of `max_length` tokens.
    """

    name: str
    metric: str
    read: Callable[[str], tuple[list[dict[str, Any]], list[dict[str, Any]]]]
    causal: bool
    targets: dict[str, list[str]]
    learning_rates: tuple[float, ...]
    batch_size: int
    steps: int
    max_length: int
    development_size: int
    test_size: int
    is_packed: bool = False


def _banking77(source: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    train, test = _rows(source, ("banking_train.csv", "banking_test.csv"), ("mteb/banking77",))
    label = "label" if source == HUB else "category"
    return [{"text": row["text"], "label": row[label]} for row in train], [
        {"text": row["text"], "label": row[label]} for row in test
    ]


def _sst2(source: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    train, test = _rows(source, ("sst2_train.tsv", "sst2_test.tsv"), ("SetFit/sst2",))
    return _with_names(train), _with_names(test)


def _with_names(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # The files have no header; `_read_file` names the columns as on the hub.
    return [{"text": row["text"], "label": row["label"]} for row in rows]


def _gsm8k(source: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return _rows(source, ("gsm8k_train.jsonl", "gsm8k_test.jsonl"), ("openai/gsm8k", "main"))


GERMAN_FILE = "plone.po"
"""The German catalog of `plone.app.locales`, `locales/de/LC_MESSAGES/plone.po` in its source package."""

_SHORTEST_TEXT = 40


def _german(source: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The longer messages of the catalog; every eighth is for the test."""
    if source == HUB:
        raise ValueError(f"The German texts are not on the hub: pass the folder with {GERMAN_FILE} as --data.")
    content = (Path(source) / GERMAN_FILE).read_text(encoding="utf-8")
    found = re.findall(r'^msgstr ((?:"(?:[^"\\]|\\.)*"\s*)+)', content, re.MULTILINE)
    texts = ["".join(json.loads(part) for part in re.findall(r'"(?:[^"\\]|\\.)*"', message)) for message in found[1:]]
    rows = [{"text": text} for text in sorted({text for text in texts if len(text) >= _SHORTEST_TEXT})]
    random.Random(0).shuffle(rows)
    return rows[len(rows) // 8 :], rows[: len(rows) // 8]


def _rows(
    source: str, files: tuple[str, str], hub_name: tuple[str, ...]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if source == HUB:
        loaded = datasets.load_dataset(*hub_name)
        return list(loaded["train"]), list(loaded["test"])
    train, test = (list(_read_file(Path(source) / name)) for name in files)
    return train, test


def _read_file(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return datasets.load_dataset("json", data_files=str(path), split="train")
    if path.suffix == ".tsv":
        options: dict[str, Any] = {"sep": "\t", "header": None, "names": ["text", "label"], "quoting": 3}
        return datasets.load_dataset("csv", data_files=str(path), split="train", **options)
    return datasets.load_dataset("csv", data_files=str(path), split="train")


_BERT_TARGETS = {"attention": ["query", "key", "value", "attention.output.dense"]}
_BERT_TARGETS["all-linear"] = [*_BERT_TARGETS["attention"], "intermediate.dense", "output.dense"]
_LLAMA_TARGETS = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}
_LLAMA_TARGETS["all-linear"] = [*_LLAMA_TARGETS["attention"], "gate_proj", "up_proj", "down_proj"]

_SHORT_TASKS = (
    Task("banking77", "accuracy", _banking77, False, _BERT_TARGETS, (1e-3, 2e-3, 4e-3, 8e-3), 16, 120, 48, 400, 1000),
    Task("sst2", "accuracy", _sst2, False, _BERT_TARGETS, (5e-4, 1e-3, 2e-3, 4e-3), 16, 120, 48, 400, 1000),
    Task("gsm8k", "loss", _gsm8k, True, _LLAMA_TARGETS, (1e-3, 2e-3, 4e-3, 8e-3), 2, 40, 192, 32, 64),
    Task("german", "loss", _german, True, _LLAMA_TARGETS, (2e-3, 4e-3, 8e-3), 2, 100, 128, 32, 64, is_packed=True),
)
_LONG_TASKS = (
    Task("banking77-long", "accuracy", _banking77, False, _BERT_TARGETS, (1e-3, 2e-3, 4e-3), 32, 400, 48, 400, 1000),
    Task("gsm8k-long", "loss", _gsm8k, True, _LLAMA_TARGETS, (1e-3, 2e-3, 4e-3), 8, 120, 192, 64, 256),
)
TASKS = {task.name: task for task in (*_SHORT_TASKS, *_LONG_TASKS)}
"""The tasks by name."""

DEFAULT_TASKS = [task.name for task in _SHORT_TASKS if task.name != "german"]
"""The short tasks whose data are on the hub. The long ones train on 7 and 12 times as many examples and need a GPU."""


def load_splits(task: Task, source: str, tokenizer: Any) -> Splits:
    """Read and tokenize a task.

    Args:
        task: The task.
        source: Folder with the data files, or `HUB`.
        tokenizer: Tokenizer of the model.

    Returns:
        The splits, which are the same in every run.
    """
    train, test = task.read(source)
    size = task.development_size
    if task.is_packed:
        packed, packed_test = (_packed(rows, tokenizer, task.max_length) for rows in (train, test))
        return Splits(packed[size:], packed[:size], packed_test[: task.test_size], 0)
    shuffle = random.Random(_SPLIT_SEED)
    shuffle.shuffle(train)
    shuffle.shuffle(test)
    names = [] if task.causal else sorted({row["label"] for row in train})
    encode = _encode_solution if task.causal else _encode_sentence
    examples = [
        [encode(row, tokenizer, task.max_length, names) for row in rows] for rows in (train, test[: task.test_size])
    ]
    return Splits(examples[0][size:], examples[0][:size], examples[1], len(names))


def _encode_sentence(row: dict[str, Any], tokenizer: Any, max_length: int, names: list[Any]) -> Example:
    ids = tokenizer(row["text"], truncation=True, max_length=max_length)["input_ids"]
    return Example(ids, names.index(row["label"]))


def _encode_solution(row: dict[str, Any], tokenizer: Any, max_length: int, names: list[Any]) -> Example:
    """Tokenize a question with its answer. Only tokens of the answer have a label."""
    question = tokenizer(f"Question: {row['question']}\nAnswer: ", add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    labels = [-100] * len(question) + answer
    return Example((question + answer)[:max_length], labels[:max_length], question, row["answer"])


def _packed(rows: Sequence[dict[str, Any]], tokenizer: Any, length: int) -> list[Example]:
    texts = [tokenizer(row["text"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for row in rows]
    ids = [token for text in texts for token in text]
    chunks = [ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    return [Example(chunk, list(chunk)) for chunk in chunks]


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a hub id, folder or GGUF file, and make sure that it has a padding token."""
    path, options = _path_and_options(source)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(task: Task, source: str, num_labels: int, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the pretrained model, with a new classifier if the task needs one.

    Args:
        task: The task.
        source: Hub id, folder or GGUF file.
        num_labels: Number of classes.
        seed: Seed of the classifier's initial values.
        device: Device of the model.
        dtype: Precision of the model. The classifier is trained, so it is in float32, as adapters are.

    Returns:
        The model.
    """
    path, options = _path_and_options(source)
    torch.manual_seed(seed)
    if task.causal:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        model.config.use_cache = False
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels, dtype=dtype, **options)
        model.classifier.float().register_forward_pre_hook(_in_float32)
    return model.to(device)


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A module-level function, so that a copy of the classifier, as PEFT makes, keeps this hook.
    return tuple(tensor.float() for tensor in inputs)


def _path_and_options(source: str) -> tuple[str, dict[str, Any]]:
    if source.endswith(".gguf"):
        return str(Path(source).parent), {"gguf_file": Path(source).name}
    return source, {}


def batches(examples: Sequence[Example], batch_size: int, pad: int, device: torch.device) -> Iterator[Batch]:
    """Pad examples into batches and keep their order.

    Args:
        examples: Tokenized examples.
        batch_size: Examples in a batch; the last batch may have fewer.
        pad: Padding token.
        device: Device of the batches.

    Yields:
        Batches of token ids and mask (B × T) and labels (B for classes, B × T for tokens).
    """
    for first in range(0, len(examples), batch_size):
        chosen = examples[first : first + batch_size]
        length = max(len(example.input_ids) for example in chosen)
        ids = torch.tensor([_padded(example.input_ids, length, pad) for example in chosen])
        mask = torch.tensor([_padded([1] * len(example.input_ids), length, 0) for example in chosen])
        labels = [
            example.labels if isinstance(example.labels, int) else _padded(example.labels, length, -100)
            for example in chosen
        ]
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _padded(values: list[int], length: int, pad: int) -> list[int]:
    return values + [pad] * (length - len(values))


_BATCHES_PER_POOL = 32
"""Within this number of batches, examples of similar length share a batch, as with `group_by_length` of transformers'
`Trainer`. This avoids padding, which is more than half of the work for short sentences."""


def training_order(lengths: Sequence[int], batch_size: int, num_batches: int, seed: int) -> list[int]:
    """Indices of the training examples of a run: shuffled epochs, grouped into batches of similar length.

    The batches within a pool are in random order.

    Args:
        lengths: Number of tokens in each example of the training split.
        batch_size: Examples in a batch.
        num_batches: Number of batches.
        seed: Seed of the run.

    Returns:
        `num_batches * batch_size` indices, which are the same for every method.
    """
    order = random.Random(f"order {seed}")
    indices: list[int] = []
    while len(indices) < num_batches * batch_size:
        epoch = list(range(len(lengths)))
        order.shuffle(epoch)
        indices += epoch
    pool_size = _BATCHES_PER_POOL * batch_size
    grouped: list[int] = []
    for first in range(0, num_batches * batch_size, pool_size):
        pool = sorted(indices[first : first + pool_size], key=lambda index: lengths[index])
        pool_batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        order.shuffle(pool_batches)
        grouped += [index for batch in pool_batches for index in batch]
    return grouped[: num_batches * batch_size]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, data: Iterator[Batch]) -> dict[str, float]:
    """Loss and accuracy over batches. The model is left in eval mode.

    Args:
        model: The model.
        task: The task.
        data: The batches.

    Returns:
        `loss` in nats and `accuracy`: means over examples for classification, over answer tokens for causal tasks.
    """
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for batch in data:
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        if task.causal:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            logits, labels = logits[labels != -100], labels[labels != -100]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return {"loss": loss / count, "accuracy": correct / count}


MAX_NEW_TOKENS = 160
"""Largest number of tokens in a generated answer."""


@torch.no_grad()
def exact_match(
    model: Any, examples: Sequence[Example], tokenizer: Any, batch_size: int, device: torch.device
) -> float:
    """The share of questions whose greedy answer has the number of the reference. The model is left in eval mode.

    Args:
        model: A causal language model.
        examples: Examples with prompt and reference answer.
        tokenizer: Tokenizer of the model.
        batch_size: Questions in a batch.
        device: Device of the model.

    Returns:
        The share, between 0 and 1.
    """
    model.eval()
    pad = tokenizer.pad_token_id
    questions = sorted(
        ((example.prompt or [], example.answer or "") for example in examples), key=lambda pair: len(pair[0])
    )
    correct = 0
    for first in range(0, len(questions), batch_size):
        chosen = questions[first : first + batch_size]
        length = max(len(prompt) for prompt, _ in chosen)
        # Padded on the left, so that every answer directly follows its question.
        ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt, _ in chosen], device=device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt, _ in chosen], device=device)
        answers = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(answers[:, length:], skip_special_tokens=True)
        correct += sum(is_correct(text, reference) for text, (_, reference) in zip(texts, chosen, strict=True))
    return correct / len(questions)


def is_correct(text: str, reference: str) -> bool:
    """Whether the number after `####` is that of the reference. A text without a number is not correct."""
    number = _final_number(text)
    return number is not None and number == _final_number(reference)


def _final_number(text: str) -> str | None:
    found = re.search(r"####\s*\$?\s*(-?)\s*\$?\s*(\d[\d,]*(?:\.\d+)?)", text)
    if found is None:
        return None
    number = found[2].replace(",", "")
    return found[1] + (number.rstrip("0").rstrip(".") if "." in number else number)

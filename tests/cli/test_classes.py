"""The labels of the data and the outputs of a trained classification head: by name, by number, or an error.

The truth is the loss of the model itself, in transformers, with the numbers that its training had.
"""

import json
import shutil

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from fim_lora import FimConfig, RankAllocation, get_fim_scores
from fim_lora.cli.classes import with_classes_of_model
from fim_lora.cli.data import load_data
from fim_lora.cli.models import find_model
from fim_lora_command.errors import CommandError
from helpers.cli_inputs import (
    VOCABULARY,
    allocate,
    compress,
    error_line,
    save_adapter,
    texts,
    word_tokenizer,
    write_jsonl,
)

NAMES = ["entailment", "neutral", "contradiction"]


def save_classifier(folder, names=NAMES, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(VOCABULARY), num_labels=len(names), initializer_range=0.3, **sizes, **options)
    if names[0] != "LABEL_0":
        config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("trained") / "nli")


@pytest.fixture(scope="module")
def with_default_names(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("trained") / "default", ["LABEL_0", "LABEL_1", "LABEL_2"])


def rows_of(labels, file):
    rows = [{"text": text, "label": label} for text, label in zip(texts(len(labels)), labels, strict=True)]
    if file.suffix == ".jsonl":
        return write_jsonl(file, rows)
    file.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    return file


def scores_by_transformers(model, numbers):
    """The scores with the numbers of the outputs, from a model that the command has not touched."""
    tokenizer = word_tokenizer()
    batches = [
        {**tokenizer([text], return_tensors="pt"), "labels": torch.tensor([number])}
        for text, number in zip(texts(len(numbers)), numbers, strict=True)
    ]
    from peft import LoraConfig

    config = LoraConfig(
        target_modules=["query"], init_lora_weights="fim", fim_config=FimConfig(fim_calibration_batches=len(numbers))
    )
    base = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    return get_fim_scores(base, batches, config, show_progress_bar=False)


WRITTEN = {
    "names": (["entailment", "neutral", "contradiction", "neutral"], ".jsonl"),
    "other-case": (["Entailment", "NEUTRAL", " contradiction", "NEUTRAL"], ".jsonl"),
    "some-names": (["contradiction", "neutral", "neutral", "contradiction"], ".jsonl"),
    "numbers": ([0, 1, 2, 1], ".jsonl"),
    "some-numbers": ([2, 2, 1, 1], ".jsonl"),
    "digits": (["0", "1", "2", "1"], ".jsonl"),
    "table": (["contradiction", "neutral", "entailment", "neutral"], ".csv"),
    "numbers-in-a-table": ([2, 0, 1, 1], ".csv"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_scores_are_those_of_the_trained_order(trained, tmp_path, name):
    labels, suffix = WRITTEN[name]
    numbers = [
        NAMES.index(label.strip().lower()) if str(label).strip().lower() in NAMES else int(label) for label in labels
    ]
    path = rows_of(labels, tmp_path / f"data{suffix}")
    options = ["--task", "seq-cls", "--target-modules", "query", "--batch-size", 1, "--batches", 4]
    assert allocate(trained, path, tmp_path / "out", *options) == 0
    found = RankAllocation.load(tmp_path / "out" / "fim_allocation.json").scores
    expected = scores_by_transformers(trained, numbers)
    assert {name: score.mean for name, score in found.items()} == pytest.approx(
        {name: score.mean for name, score in expected.items()}, rel=1e-4
    )


def ordered(model, path):
    return with_classes_of_model(load_data(str(path), "train", None, "seq-cls", {}), find_model(str(model)))


def test_class_labels_of_the_data_are_matched_by_name_and_else_by_number(trained, with_default_names, tmp_path):
    for names, model, expected in (
        (["contradiction", "entailment", "neutral"], trained, [1, 2, 0]),
        (["e", "n", "c"], trained, range(3)),
        (["contradiction", "entailment", "neutral"], with_default_names, range(3)),
    ):
        kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = [{"text": f"w{number}", "label": number} for number in range(3)]
        path = tmp_path / f"{names[0]}{model.name}.parquet"
        datasets.Dataset.from_list(rows, features=kinds).to_parquet(path)
        assert list(ordered(model, path).labels) == list(expected)


def test_default_names_leave_the_labels_sorted(with_default_names, tmp_path):
    for number, (labels, expected) in enumerate(
        [
            (["no", "yes", "maybe"], ["maybe", "no", "yes"]),
            ([1, 2, 3], [1, 2, 3]),
            (["LABEL_2", "LABEL_0", "LABEL_2"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
            ([2, 0, 2], [0, 1, 2]),
        ]
    ):
        assert list(ordered(with_default_names, rows_of(labels, tmp_path / f"{number}.jsonl")).labels) == expected


def test_default_names_of_more_than_ten_outputs_are_in_the_order_of_their_numbers(tmp_path):
    names = [f"LABEL_{number}" for number in range(12)]
    model = save_classifier(tmp_path / "model", names)
    assert list(ordered(model, rows_of(names[::-1], tmp_path / "data.jsonl")).labels) == names


def test_a_head_that_is_not_trained_takes_any_labels(bert, tmp_path):
    path = rows_of(["z", "a", "m", "b"], tmp_path / "data.jsonl")
    assert list(ordered(bert, path).labels) == ["a", "b", "m", "z"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["a", "b", "c"],
            "has the labels a, b, c, but the head of .* has 3 outputs with the names entailment, neutral",
        ),
        (["entailment", "contradiction", "other"], "replace the labels by these names, or by the numbers"),
        (["entailment", "Entailment", "neutral"], "replace the labels by these names"),
        ([0, 1, 2, 3], "has the labels 0 to 3, but the head of .* has 3 outputs, 0 to 2"),
        ([1, 2, 3], "has the labels 1 to 3, but the head of .* has 3 outputs, 0 to 2"),
    ],
)
def test_labels_that_are_not_those_of_the_head(trained, tmp_path, capsys, labels, message):
    path = rows_of(labels, tmp_path / "data.jsonl")
    with pytest.raises(CommandError, match=message):
        ordered(trained, path)
    capsys.readouterr()
    assert allocate(trained, path, tmp_path / "out", "--task", "seq-cls") == 1
    assert error_line(capsys).startswith("Column 'label' of ")


def test_another_number_of_labels_than_outputs(with_default_names, tmp_path):
    for labels in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(
            CommandError, match=f"has {len(labels)} different labels, but the head of .* has 3 outputs"
        ):
            ordered(with_default_names, rows_of(labels, tmp_path / f"{len(labels)}.jsonl"))
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(num_classes=2)})
    datasets.Dataset.from_list([{"text": "w1", "label": 0}], features=kinds).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(CommandError, match=r"has 2 classes, but the head of .* has 3 outputs"):
        ordered(with_default_names, tmp_path / "two.parquet")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["relevance"], {}, "is trained for regression"),
        (NAMES, {"problem_type": "multi_label_classification"}, "is trained for multi_label_classification"),
    ],
)
def test_heads_for_other_problems(tmp_path, names, options, message):
    model = save_classifier(tmp_path / "model", names, **options)
    with pytest.raises(CommandError, match=message):
        ordered(model, rows_of(["a", "b"], tmp_path / "data.jsonl"))


def test_compress_reads_each_file_by_the_names_and_the_numbers_of_the_outputs(trained, tmp_path):
    adapter = save_adapter(trained, tmp_path / "adapter", num_labels=3)
    # The two files write the labels differently.
    data = rows_of(["Contradiction", "Entailment", "Neutral", "Neutral"], tmp_path / "data.jsonl")
    held_out = rows_of([2, 0, 1, 1], tmp_path / "held_out.jsonl")
    losses = {}
    for name, path in (("names", data), ("numbers", held_out)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        options = ["--keep", 0.5, "--eval-data", path, "--batch-size", 1]
        assert compress(adapter, data, tmp_path / "out", *options) == 0
        content = json.loads((tmp_path / "out" / "fim_compression.json").read_text())
        losses[name] = content["loss_before"]
        assert content["provenance"]["classes"] == NAMES
    assert losses["names"] == pytest.approx(losses["numbers"], abs=1e-6)

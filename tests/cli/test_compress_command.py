"""`fim-lora compress`: what it writes and prints, and that stock PEFT agrees."""

import functools
import json
import re
import shutil

import pytest
import torch
from matplotlib.image import imread
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from fim_lora import LoraCompression
from helpers.cli_inputs import (
    CHAT_TEMPLATE,
    COMPRESSED_FILES,
    compress,
    files,
    save_adapter,
    texts,
    word_tokenizer,
    write_jsonl,
)
from helpers.stock_peft import stock

# Prints the loss of an adapter over rows of data, each one with the weight of its labels, and the ranks and scalings.
STOCK_LOSS = """
    import json
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    options = {options!r}
    cls = AutoModelForSequenceClassification if options else AutoModelForCausalLM
    base = cls.from_pretrained({model!r}, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained({model!r})
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, {adapter!r}).eval()
    total = count = 0
    for text, label in {rows!r}:
        ids = torch.tensor([tokenizer(text if options else text + tokenizer.eos_token)["input_ids"]])
        labels = torch.tensor([label]) if options else ids
        size = 1 if options else ids.shape[1] - 1
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * size
        count += size
    layers = {{name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}}
    found = {{name: [layer.r["default"], layer.scaling["default"]]
              for name, layer in layers.items() if isinstance(layer, LoraLayer)}}
    print(json.dumps([total / count, found]))
"""


def stock_loss(model, adapter, rows, **options):
    """The loss, and layer name to rank and scaling, in stock PEFT."""
    code = STOCK_LOSS.format(model=str(model), adapter=str(adapter), rows=rows, options=options)
    return json.loads(stock_output(code))


@functools.cache
def stock_output(code):
    """The line of JSON that the code prints, among progress bars. The same adapter is measured once."""
    [line] = re.findall(r"^\[[\d.].*$", stock(code), re.MULTILINE)
    return line


def result_of(folder):
    return LoraCompression.load(folder / "fim_compression.json")


def provenance_of(folder):
    return json.loads((folder / "fim_compression.json").read_text())["provenance"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    rows = [{"text": text} for text in texts(9, length=5)[3:]]
    return write_jsonl(tmp_path_factory.mktemp("data") / "held_out.jsonl", rows)


def test_compress_writes_five_files_and_nothing_else(adapter, data, tmp_path, capsys):
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    assert compress(adapter, data, tmp_path / "out", "--keep", 0.5) == 0
    assert files(tmp_path / "out") == COMPRESSED_FILES
    assert files(tmp_path) == ["out"]
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    captured = capsys.readouterr()
    assert captured.err == ""
    result = result_of(tmp_path / "out")
    assert result.size == ("keep", 0.5)
    assert 0.4 < result.share <= 0.5
    for number in (result.num_parameters_before, result.num_parameters, max(result.ranks.values())):
        assert f"{number:,}" in captured.out
    for word in (
        "adapter file",
        "kB",
        "predicted loss",
        "Fisher information of 2 and gains of 2 examples in 2 batches",
        "calibrating",
        "GiB",
        "q_proj",
    ):
        assert word in captured.out
    assert imread(tmp_path / "out" / "rank_map.png").size > 0
    assert imread(tmp_path / "out" / "size_curve.png").size > 0


@pytest.mark.parametrize("options", [["--keep", 0.4], ["--rank", 1, "--serving"], ["--keep", 1]])
def test_stock_peft_measures_the_same_losses(llama, adapter, data, held_out, tmp_path, options):
    assert compress(adapter, data, tmp_path / "out", *options, "--eval-data", held_out) == 0
    result = result_of(tmp_path / "out")
    rows = [(json.loads(line)["text"], None) for line in held_out.read_text().splitlines()]
    before, _ = stock_loss(llama, adapter, rows)
    after, layers = stock_loss(llama, tmp_path / "out", rows)
    assert (result.loss_before, result.loss_after) == pytest.approx((before, after), abs=1e-5)
    assert {name: rank for name, (rank, _) in layers.items()} == {
        name: rank for name, rank in result.ranks.items() if rank > 0
    }
    assert [scaling for _, scaling in layers.values()] == pytest.approx([6 / 4] * len(layers))
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.base_model_name_or_path) == (max(result.ranks.values()), str(llama))
    if options == ["--keep", 1]:
        assert after == pytest.approx(before, abs=1e-5)
    else:
        assert abs(after - before) > 1e-3


def test_stock_peft_measures_the_same_losses_of_a_classifier(bert, classifier, tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(texts(12), "abc" * 4, strict=True)]
    labeled = write_jsonl(tmp_path / "labeled.jsonl", rows)
    # The evaluation data lacks a class, and must be numbered as the calibration data.
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [row for row in rows if row["label"] != "a"])
    assert compress(classifier, labeled, tmp_path / "out", "--keep", 0.5, "--eval-data", held_out) == 0
    result = result_of(tmp_path / "out")
    numbered = [(row["text"], "abc".index(row["label"])) for row in rows if row["label"] != "a"]
    assert result.loss_before == pytest.approx(stock_loss(bert, classifier, numbered, num_labels=3)[0], abs=1e-5)
    assert result.loss_after == pytest.approx(stock_loss(bert, tmp_path / "out", numbered, num_labels=3)[0], abs=1e-5)
    assert provenance_of(tmp_path / "out")["classes"] == ["a", "b", "c"]


def test_a_decoder_classifies_padded_texts(llama, tmp_path):
    save_adapter(llama, tmp_path / "trained", num_labels=3)
    rows = [{"text": " ".join(["w1"] * (2 + number)), "label": number % 3} for number in range(6)]
    labeled = write_jsonl(tmp_path / "labeled.jsonl", rows)
    assert compress(tmp_path / "trained", labeled, tmp_path / "out", "--keep", 0.5, "--eval-data", labeled) == 0
    numbered = [(row["text"], row["label"]) for row in rows]
    for loss, folder in (("loss_before", "trained"), ("loss_after", "out")):
        expected, _ = stock_loss(llama, tmp_path / folder, numbered, num_labels=3)
        assert getattr(result_of(tmp_path / "out"), loss) == pytest.approx(expected, abs=1e-5)


def test_everything_but_the_factors_stays(classifier, labeled, tmp_path):
    assert compress(classifier, labeled, tmp_path / "out", "--keep", 0.5, "--column", "text=sentence") == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (classifier, tmp_path / "out"))
    others = {name for name in before if "lora_" not in name}
    assert {name for name in after if "lora_" not in name} == others != set()
    for name in others:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (classifier, tmp_path / "out")]
    changed = {key for key in configs[0] if configs[0][key] != configs[1][key]}
    assert changed <= {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}


def test_embeddings_that_were_saved_with_the_adapter_stay(llama, data, tmp_path):
    save_adapter(llama, tmp_path / "trained", modules_to_save=["embed_tokens"], target_modules=["q_proj", "up_proj"])
    assert compress(tmp_path / "trained", data, tmp_path / "out", "--keep", 0.5) == 0
    name = "base_model.model.model.embed_tokens.weight"
    before, after = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("trained", "out"))
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_tokens_that_were_added_in_the_training_stay(llama, data, tmp_path):
    save_adapter(llama, tmp_path / "trained", vocabulary=50)
    assert compress(tmp_path / "trained", data, tmp_path / "out", "--keep", 0.5) == 0
    before, after = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("trained", "out"))
    others = {name for name in before if "lora_" not in name}
    assert {before[name].shape[0] for name in others} == {50}
    assert {name for name in after if "lora_" not in name} == others
    for name in others:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_has_the_dtype_of_before(llama, data, tmp_path, dtype):
    save_adapter(llama, tmp_path / "trained", dtype=dtype)
    assert compress(tmp_path / "trained", data, tmp_path / "out", "--keep", 0.5, "--dtype", "float32") == 0
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    sizes = [(tmp_path / place / "adapter_model.safetensors").stat().st_size for place in ("out", "trained")]
    assert sizes[0] < 0.75 * sizes[1]


def test_the_smallest_adapter_within_a_loss(adapter, data, held_out, tmp_path):
    options = ["--max-loss-increase", 0.01, "--eval-data", held_out, "--r-max", 3]
    assert compress(adapter, data, tmp_path / "out", *options) == 0
    result = result_of(tmp_path / "out")
    assert (result.size, result.r_max) == (("max_loss_increase", 0.01), 3)
    assert result.loss_increase <= 0.01
    assert max(result.ranks.values()) <= 3
    assert result.share < 1


def test_without_data_the_base_needs_no_tokenizer(llama, adapter, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "base")
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    options = ["--without-data", "--keep", 0.5, "--model", tmp_path / "base"]
    assert compress(adapter, None, tmp_path / "out", *options) == 0
    result = result_of(tmp_path / "out")
    assert result.predicted is None
    assert result.criterion.startswith("without data")
    assert provenance_of(tmp_path / "out")["data"] is None
    assert "without data" in capsys.readouterr().out


def test_the_loss_is_measured_without_calibration_data_too(adapter, held_out, tmp_path):
    options = ["--without-data", "--keep", 0.5, "--eval-data", held_out, "--eval-batches", 2]
    assert compress(adapter, None, tmp_path / "out", *options) == 0
    assert result_of(tmp_path / "out").loss_increase is not None


def test_the_files_say_where_they_come_from(llama, adapter, data, held_out, tmp_path):
    options = ["--keep", 0.5, "--seed", 7, "--max-length", 64, "--eval-data", held_out, "--r-max", 4]
    assert compress(adapter, data, tmp_path / "out", *options) == 0
    provenance = provenance_of(tmp_path / "out")
    assert set(provenance["versions"]) >= {"fim-lora", "peft", "transformers", "torch", "python"}
    assert provenance["adapter"]["name"] == str(adapter)
    assert provenance["model"]["name"] == str(llama)
    assert {len(provenance[key]["sha256"]) for key in ("adapter", "data", "eval_data")} == {64}
    for key, value in {"seed": 7, "max_length": 64, "batch_size": 2, "task": "causal-lm", "dtype": "float32"}.items():
        assert provenance[key] == value


def test_by_default_it_reads_until_two_halves_agree(adapter, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts(40)])
    options = ["--data", data, "--keep", 0.5]
    assert compress(adapter, None, tmp_path / "out", *options) == 0
    batches = int(result_of(tmp_path / "out").criterion.split(" in ")[1].split()[0])
    assert batches in (2, 4, 8, 16, 20)  # powers of two, or all


def test_the_tokenizer_of_the_adapter_is_used(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "trained")
    word_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "trained")
    rows = [
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": text}]} for text in texts(4)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert compress(tmp_path / "trained", data, tmp_path / "out", "--keep", 0.5) == 0


def test_the_task_of_an_adapter_that_does_not_say_it(llama, data, tmp_path, capsys):
    """PEFT writes the class of the base model instead. Other tools may not."""
    adapter = save_adapter(llama, tmp_path / "trained", task_type=None)
    assert compress(adapter, data, tmp_path / "out", "--keep", 0.5) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    for mapping in (None, {"base_model_class": "LlamaModel"}, {"base_model_class": 3}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": mapping}))
        assert compress(adapter, data, tmp_path / "other", "--keep", 0.5) == 1
        assert "has no task_type: give --task causal-lm or --task seq-cls" in capsys.readouterr().err
    assert compress(adapter, data, tmp_path / "other", "--keep", 0.5, "--task", "causal-lm") == 0


def test_the_task_of_a_classifier_that_does_not_say_it(bert, tmp_path):
    adapter = save_adapter(bert, tmp_path / "trained", num_labels=3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    mapping = {"base_model_class": "BertForSequenceClassification"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": mapping, "task_type": None}))
    rows = [{"text": text, "label": place % 3} for place, text in enumerate(texts(6))]
    labeled = write_jsonl(tmp_path / "labeled.jsonl", rows)
    assert compress(adapter, labeled, tmp_path / "out", "--keep", 0.5) == 0


@pytest.mark.parametrize(
    "options", [{"layer_replication": [[0, 2], [1, 2]]}, {"init_lora_weights": "gaussian"}, {"bias": "lora_only"}]
)
def test_adapters_with_other_settings(llama, data, held_out, tmp_path, options):
    save_adapter(llama, tmp_path / "trained", target_modules=["q_proj", "up_proj"], **options)
    assert compress(tmp_path / "trained", data, tmp_path / "out", "--keep", 0.5, "--eval-data", held_out) == 0
    rows = [(json.loads(line)["text"], None) for line in held_out.read_text().splitlines()]
    result = result_of(tmp_path / "out")
    assert result.loss_before == pytest.approx(stock_loss(llama, tmp_path / "trained", rows)[0], abs=1e-5)
    assert result.loss_after == pytest.approx(stock_loss(llama, tmp_path / "out", rows)[0], abs=1e-5)


def test_numbers_are_the_outputs_of_the_head(bert, classifier, tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip(texts(6), (2, 1, 2, 1, 1, 2), strict=True)]
    labeled = write_jsonl(tmp_path / "labeled.jsonl", rows)
    assert compress(classifier, labeled, tmp_path / "out", "--keep", 0.5, "--eval-data", labeled) == 0
    numbered = [(row["text"], row["label"]) for row in rows]
    expected, _ = stock_loss(bert, classifier, numbered, num_labels=3)
    assert result_of(tmp_path / "out").loss_before == pytest.approx(expected, abs=1e-5)


def test_the_names_of_the_base_model_give_the_order(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.id2label = {0: "positive", 1: "negative", 2: "neutral"}
    config.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "trained", num_labels=3)
    rows = [{"text": text, "label": label} for text, label in zip(texts(6), ["positive", "neutral"] * 3, strict=True)]
    labeled = write_jsonl(tmp_path / "labeled.jsonl", rows)
    assert compress(adapter, labeled, tmp_path / "out", "--keep", 0.5, "--eval-data", labeled) == 0
    numbered = [(row["text"], {"positive": 0, "neutral": 2}[row["label"]]) for row in rows]
    expected, _ = stock_loss(tmp_path / "base", adapter, numbered, num_labels=3)
    assert result_of(tmp_path / "out").loss_before == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("likely", [True, False])
def test_a_classifier_that_is_worse_than_guessing_is_told(bert, classifier, tmp_path, capsys, likely):
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model, tokenizer = PeftModel.from_pretrained(base, classifier).eval(), word_tokenizer()
    rows = []
    for text in texts(4):  # two batches, of which the calibration runs one with a part of the adapter
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits
        rows.append({"text": text, "label": int(logits.argmax() if likely else logits.argmin())})
    labeled = write_jsonl(tmp_path / "labeled.jsonl", rows)
    capsys.readouterr()
    assert compress(classifier, labeled, tmp_path / "out", "--keep", 0.5) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (0 if likely else 1)
    if not likely:
        pairs = [(row["text"], row["label"]) for row in rows]
        expected, _ = stock_loss(bert, classifier, pairs, num_labels=3)
        assert f"before the compression is {expected:.3g}, more than the 1.1 of guessing" in lines[0]

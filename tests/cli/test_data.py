"""Data files, their columns and labels, and the tokens made of them."""

import csv
import json
import random

import datasets
import pytest
import trl

from fim_lora.cli.data import find_columns, load_data
from fim_lora.cli.tokenization import IGNORED, tokenize
from fim_lora_command.errors import CommandError
from helpers.cli_inputs import CHAT_TEMPLATE, ID, WORDS, texts, word_tokenizer, write_jsonl


def load(path, task="causal-lm", split="train", **columns):
    return load_data(str(path), split, None, task, columns)


def features(data, count=100, max_length=20, tokenizer=None, seed=0):
    examples = tokenize(data, tokenizer or word_tokenizer(), count, max_length, seed, show_progress_bar=False)
    return [example.feature for example in examples.examples]


def ids(*words):
    return [ID[word] for word in words]


ROWS = [{"text": text, "label": label} for text, label in zip(texts(6), "abcabc", strict=True)]


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, suffix):
    data = load(write_rows(tmp_path / f"data{suffix}", ROWS), "seq-cls")
    assert data.rows.to_list() == ROWS
    assert data.columns == {"text": "text", "label": "label"}
    assert list(data.labels) == ["a", "b", "c"]
    assert len(data.sha256) == 64


def test_a_folder_with_splits_is_loaded_by_datasets(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:2])
    assert len(load(folder, split="test").rows) == 2
    assert len(load(folder, split="train[:3]").rows) == 3


def test_words_that_pandas_takes_for_missing_stay_text(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text\nNA\nnull\nw1\n")
    assert load(path).rows["text"][:] == ["NA", "null", "w1"]


def test_a_text_file_is_cut_into_blocks(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("w0 w1 w2\nw3 w4\n\nw5 w6\n")
    blocks = sorted(feature["input_ids"] for feature in features(load(path), max_length=3))
    assert blocks == [ids("w0", "w1", "w2"), ids("w3", "w4", "w5"), ids("w6")]
    assert all(feature["labels"] == feature["input_ids"] for feature in features(load(path), max_length=3))


def test_blocks_begin_as_the_tokenizer_begins(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(bos_token="w39")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w39 $A", special_tokens=[("w39", ID["w39"])]
    )
    path = tmp_path / "data.txt"
    path.write_text("w0 w1 w2 w3")
    blocks = sorted(feature["input_ids"] for feature in features(load(path), max_length=3, tokenizer=tokenizer))
    assert blocks == [ids("w39", "w0", "w1"), ids("w39", "w2", "w3")]


def test_text_ends_with_the_end_token_and_has_loss_everywhere(tmp_path):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"text": "w1 w2"}, {"text": "w1 w2 </s>"}]))
    assert (
        features(data)
        == [{"input_ids": ids("w1", "w2", "</s>"), "attention_mask": [1, 1, 1], "labels": ids("w1", "w2", "</s>")}] * 2
    )


def test_prompt_and_completion_have_loss_on_the_completion_only(tmp_path):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"prompt": "w1 w2 ", "completion": "w3 w4"}]))
    assert features(data) == [
        {
            "input_ids": ids("w1", "w2", "w3", "w4", "</s>"),
            "attention_mask": [1] * 5,
            "labels": [IGNORED, IGNORED, *ids("w3", "w4", "</s>")],
        }
    ]


def test_truncation_keeps_the_mask_aligned_and_is_counted(tmp_path):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"prompt": "w1 w2 ", "completion": "w3 w4"}]))
    examples = tokenize(data, word_tokenizer(), 1, 3, 0, show_progress_bar=False)
    assert examples.num_truncated == 1
    assert examples.examples[0].feature == {
        "input_ids": ids("w1", "w2", "w3"),
        "attention_mask": [1] * 3,
        "labels": [IGNORED, IGNORED, ID["w3"]],
    }


def test_a_prompt_that_fills_the_length_is_warned_of(tmp_path, capsys):
    rows = [{"prompt": "w1 w2 w3 ", "completion": "w4"}, {"prompt": "w1 ", "completion": "w4"}]
    features(load(write_jsonl(tmp_path / "data.jsonl", rows)), max_length=3)
    assert "1 of 2 examples have no token to predict within 3 tokens" in capsys.readouterr().err


def test_only_such_prompts_are_an_error(tmp_path):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"prompt": "w1 w2 w3 ", "completion": "w4"}]))
    with pytest.raises(CommandError, match="raise --max-length"):
        features(data, max_length=3)


def test_a_prompt_whose_tokens_change_is_warned_of(tmp_path, capsys):
    features(load(write_jsonl(tmp_path / "data.jsonl", [{"prompt": "w1 w", "completion": "2 w3 w4"}])))
    assert "In 1 of 1 examples the last tokens of the prompt change" in capsys.readouterr().err


def test_messages_have_loss_on_all_tokens(tmp_path):
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}]))
    [feature] = features(data, tokenizer=word_tokenizer(CHAT_TEMPLATE))
    truth = ids("user", ":", "w1", "</s>", "assistant", ":", "w2", "w3", "</s>")
    assert feature["input_ids"] == feature["labels"] == truth


def test_messages_need_a_chat_template(tmp_path):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}]))
    with pytest.raises(CommandError, match="no chat template"):
        features(data)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "The messages of row 1 of .* are empty"),
        (["hello"], "are not a list of"),
        ("hello", "are not a list of"),
        ([{"role": "user"}], "are not a list of"),
        ([{"role": "robot", "content": "w1"}], "cannot render row 1 of .*unknown role robot"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}]))
    with pytest.raises(CommandError, match=message):
        features(data, tokenizer=word_tokenizer(CHAT_TEMPLATE))


TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% for key in tool.function.parameters.properties %}"
    "{{ key }} {% endfor %}{% endfor %}{% if tools is not none and not tools %}w39 {% endif %}"
    "{% if polite %}{{ greeting }} {% endif %}" + CHAT_TEMPLATE
)


def tool(name, *properties):
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in properties}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def rendered_by_trl(row, tokenizer):
    """Token ids of a row, from the function of TRL."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    example = {key: value for key, value in row.items() if key != "tools"}
    return tokenizer(trl.apply_chat_template(example, tokenizer, tools=tools)["text"])["input_ids"]


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_chat_template_gets_tools_and_arguments_as_in_trl(tmp_path, as_text, suffix):
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    tools = [[tool("w3", "w4")], [tool("w5", "w6", "w7"), tool("w3", "w4")], [], None]
    arguments = {"polite": True, "greeting": "w8"}
    rows = [{"messages": messages, "tools": json.dumps(one) if as_text and one else one} for one in tools]
    if as_text:
        rows[2]["tools"] = "[]"
    rows = [row | {"chat_template_kwargs": arguments} for row in rows]
    data = load(write_rows(tmp_path / f"data{suffix}", rows))
    assert data.columns == {"messages": "messages", "tools": "tools", "chat_template_kwargs": "chat_template_kwargs"}
    tokenizer = word_tokenizer(TOOLS_TEMPLATE)
    found = sorted(feature["input_ids"] for feature in features(data, tokenizer=tokenizer))
    assert found == sorted(rendered_by_trl(row, tokenizer) for row in rows)
    assert any(ids("w5", "w6", "w7", "w3", "w4", "w8") == one[:6] for one in found)


def test_tools_may_have_another_column_and_a_chat_none(tmp_path):
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages, "functions": [tool("w3")]}])
    tokenizer = word_tokenizer(TOOLS_TEMPLATE)
    [without] = features(load(path), tokenizer=tokenizer)
    [with_tools] = features(load(path, tools="functions"), tokenizer=tokenizer)
    assert with_tools["input_ids"] == ids("w3") + without["input_ids"]
    with pytest.raises(CommandError, match="no column 'tool' for the role 'tools'"):
        load(path, tools="tool")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": "[{"}, "The tools of row 1 of .* are not valid JSON"),
        ({"tools": "{}"}, "The tools of row 1 of .* are not a list of JSON schemas but dict"),
        ({"tools": ["w3"]}, "are not a list of JSON schemas but list"),
        ({"chat_template_kwargs": ["x"]}, "The chat_template_kwargs of row 1 of .* are not a dictionary"),
        ({"chat_template_kwargs": {"tokenize": False}}, "row 1 of .* has 'tokenize', which is not a variable"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "has 'chat_template', which is not a variable"),
        ({"chat_template_kwargs": {"max_length": 5}}, "has 'max_length', which is not a variable"),
    ],
)
def test_bad_tools(tmp_path, values, message):
    row = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]} | values
    data = load(write_jsonl(tmp_path / "data.jsonl", [row]))
    with pytest.raises(CommandError, match=message):
        features(data, tokenizer=word_tokenizer(TOOLS_TEMPLATE))


def test_keys_that_arrow_adds_are_not_rendered(tmp_path):
    calls = [{"function": {"name": "w3", "arguments": {"w4": "w5"}}}, {"function": {"name": "w6", "arguments": {}}}]
    rows = [{"messages": [{"role": "assistant", "content": "w1", "tool_calls": [call]}]} for call in calls]
    template = (
        "{{ messages[0].content }}{% for call in messages[0].tool_calls %} {{ call.function.name }}"
        "{% for key in call.function.arguments %} {{ key }}{% endfor %}{% endfor %}"
    )
    data = load(write_rows(tmp_path / "data.parquet", rows))
    found = sorted(feature["input_ids"] for feature in features(data, tokenizer=word_tokenizer(template)))
    assert found == [ids("w1", "w3", "w4"), ids("w1", "w6")]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [([["a"], ["b"]], "List"), ([{"x": 1}, {"x": 2}], "dict"), ([["a", "b"], []], "List"), ([b"a", b"b"], "binary")],
)
def test_labels_that_are_not_single_values(tmp_path, labels, kind):
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_dict({"text": ["w1", "w2"], "label": labels}).to_parquet(path)
    with pytest.raises(CommandError, match=f"Column 'label' of .* holds {kind}: labels must be strings or integers"):
        load(path, "seq-cls")


def test_labels_of_several_types(tmp_path):
    rows = [{"text": "w1", "label": "a"}, {"text": "w2", "label": 3}]
    with pytest.raises(CommandError, match=r"data.jsonl") as error:
        load(write_jsonl(tmp_path / "data.jsonl", rows), "seq-cls")
    assert "no kernel" not in str(error.value)


def test_texts_of_one_token_need_another_advice_than_long_prompts(tmp_path, capsys):
    tokenizer = word_tokenizer(eos_token=None)
    one = load(write_jsonl(tmp_path / "one.jsonl", [{"text": "w1"}]))
    with pytest.raises(CommandError, match="within 3 tokens: a text needs two tokens or more"):
        features(one, max_length=3, tokenizer=tokenizer)
    both = load(write_jsonl(tmp_path / "both.jsonl", [{"text": "w1"}, {"text": "w1 w2"}]))
    features(both, max_length=3, tokenizer=tokenizer)
    assert "a text needs two tokens or more, or remove such rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "sorted_labels"), [(["no", "yes", "no"], ["no", "yes"]), ([5, 2, 5], [2, 5]), ([0, 1, 0], [0, 1])]
)
def test_labels_are_sorted_and_numbered(tmp_path, labels, sorted_labels):
    rows = [{"text": f"w{number}", "label": label} for number, label in enumerate(labels)]
    data = load(write_jsonl(tmp_path / "data.jsonl", rows), "seq-cls")
    assert list(data.labels) == sorted_labels
    assert list(data.label_names) == [str(label) for label in sorted_labels]
    found = {tuple(feature["input_ids"]): feature["labels"] for feature in features(data)}
    assert found == {(ID[row["text"]],): sorted_labels.index(row["label"]) for row in rows}


def test_labels_come_from_all_rows_and_not_from_those_drawn(tmp_path):
    data = load(write_rows(tmp_path / "data.csv", ROWS), "seq-cls")
    assert len(features(data, count=1)) == 1
    assert len(data.labels) == 3


def test_class_labels_keep_their_ids_and_names(tmp_path):
    kinds = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "never"])}
    )
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list([{"text": "w1", "label": 0}, {"text": "w2", "label": 1}], features=kinds).to_parquet(
        path
    )
    data = load(path, "seq-cls")
    assert list(data.labels) == [0, 1, 2]
    assert list(data.label_names) == ["z", "a", "never"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None], "Row 2 of .* has no value in column 'label'"),
        (["a", ""], "Row 2 of .* has an empty label"),
        ([0.5, 1.0], "labels must be strings or integers"),
        (["a", "a"], "holds one label only"),
    ],
)
def test_bad_labels(tmp_path, labels, message):
    rows = [{"text": "w1", "label": label} for label in labels]
    with pytest.raises(CommandError, match=message):
        load(write_jsonl(tmp_path / "data.jsonl", rows), "seq-cls")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "w1"}, {"text": " "}], "The text of row 2 of .*data.jsonl is empty"),
        ([{"text": "w1"}, {"text": None}], "The text of row 2 of .*data.jsonl is missing"),
        ([{"text": 1}], "The text of row 1 of .*data.jsonl is not text but int: 1"),
        ([{"prompt": "w1", "completion": ""}], "The completion of row 1 of .* is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    data = load(write_jsonl(tmp_path / "data.jsonl", rows))
    with pytest.raises(CommandError, match=message):
        features(data)


def test_rows_are_drawn_at_random_and_named_by_their_place_in_the_file(tmp_path):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"text": word} for word in WORDS]))
    drawn = data.draw(5, seed=3)
    assert [row.values["text"] for row in drawn] == [WORDS[n] for n in random.Random(3).sample(range(len(WORDS)), 5)]
    assert all(f"row {WORDS.index(row.values['text']) + 1} of" in row.place for row in drawn)
    assert drawn == data.draw(5, seed=3) != data.draw(5, seed=4)


def test_fewer_rows_than_wanted_are_all_used(tmp_path):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"text": "w1"}, {"text": "w2"}]))
    assert len(features(data, count=8)) == 2


def test_padding(tmp_path):
    data = load(write_jsonl(tmp_path / "data.jsonl", [{"text": "w1 w2"}]))
    longer = load(write_jsonl(tmp_path / "longer.jsonl", [{"text": "w1 w2 w3 w4"}]))
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "right"
    short, long = (tokenize(rows, tokenizer, 1, 9, 0, show_progress_bar=False) for rows in (data, longer))
    both = type(short)([*short.examples, *long.examples], is_classification=False)
    [batch] = both.batches(tokenizer, 2)
    assert batch["input_ids"].tolist()[0] == ids("w1", "w2", "</s>", "<pad>", "<pad>")
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0]
    assert batch["labels"].tolist()[0] == [*ids("w1", "w2", "</s>"), IGNORED, IGNORED]


@pytest.mark.parametrize(
    ("found", "task", "given", "columns"),
    [
        (["text", "x"], "causal-lm", {}, {"text": "text"}),
        (["prompt", "completion", "text"], "causal-lm", {}, {"prompt": "prompt", "completion": "completion"}),
        (["prompt", "completion", "text"], "causal-lm", {"text": "text"}, {"text": "text"}),
        (["messages", "text"], "causal-lm", {}, {"messages": "messages"}),
        (["q", "completion"], "causal-lm", {"prompt": "q"}, {"prompt": "q", "completion": "completion"}),
        (["sentence", "label"], "seq-cls", {"text": "sentence"}, {"text": "sentence", "label": "label"}),
    ],
)
def test_columns(found, task, given, columns):
    assert find_columns("data", found, task, given) == columns


def test_unknown_columns_are_listed_with_the_way_out():
    with pytest.raises(CommandError, match=r"'question', 'answer'.*--column prompt='question' --column completion="):
        find_columns("data", ["question", "answer"], "causal-lm", {})
    with pytest.raises(CommandError, match="no column 'nope' for the role 'text': choose one of 'a', 'b'"):
        find_columns("data", ["a", "b"], "causal-lm", {"text": "nope"})
    with pytest.raises(
        CommandError, match="--column instruction='Instruction' --column output='output' --column input='input'"
    ):
        find_columns("data", ["Instruction", "input", "output"], "causal-lm", {})
    with pytest.raises(
        CommandError, match="--column instruction='instruction' --column output='response' --column input='context'"
    ):
        find_columns("data", ["instruction", "context", "response"], "causal-lm", {})
    with pytest.raises(CommandError, match="--column text='sentence' --column label='category'"):
        find_columns("data", ["id", "category", "sentence"], "seq-cls", {})
    with pytest.raises(CommandError, match="Name the columns to use: --column text=NAME --column label=NAME"):
        find_columns("data", ["id", "x"], "seq-cls", {})
    with pytest.raises(CommandError, match="--task causal-lm needs"):
        find_columns("data", ["text", "label"], "causal-lm", {"label": "label"})
    with pytest.raises(CommandError, match="from its first line"):
        find_columns("data.tsv", ["a" * 100, "0"], "seq-cls", {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", '{"text": "w1"}\n{"text": \n', "data.jsonl cannot be read"),
        ("data.json", "nonsense", "data.json cannot be read"),
        ("data.csv", 'text\n"never closed\n', "data.csv cannot be read"),
        ("data.parquet", "nonsense", "data.parquet cannot be"),
        ("data.xml", "<a/>", "unknown type of data file"),
        ("data.csv", "text\n", "data.csv has no rows"),
        ("data.txt", "  \n", "data.txt is empty"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CommandError, match=message):
        features(load(path))


def test_unknown_split(tmp_path):
    with pytest.raises(CommandError, match=r"cannot be loaded: .*nope"):
        load(write_jsonl(tmp_path / "data.jsonl", ROWS), split="nope")


@pytest.mark.parametrize("name", ["./nope", "nope.jsonl", "a/b/c", "owner/nope"])
def test_missing_data(name):
    with pytest.raises((CommandError, OSError)):
        load(name)

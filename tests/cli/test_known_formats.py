"""Data in the formats of Alpaca and ShareGPT."""

import pytest

from fim_lora.cli.data import load_data
from fim_lora.cli.known_formats import in_usual_form
from fim_lora.cli.tokenization import IGNORED, tokenize
from fim_lora_command.errors import CommandError
from helpers.cli_inputs import CHAT_TEMPLATE, ID, word_tokenizer, write_jsonl

# Written here as its authors published it.
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
w1 w2

### Response:
"""
WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
w1 w2

### Input:
w3 {w4}

### Response:
"""


def load(folder, rows, **columns):
    return load_data(str(write_jsonl(folder / "data.jsonl", rows)), "train", None, "causal-lm", columns)


def usual(folder, rows, **columns):
    data = load(folder, rows, **columns)
    drawn = sorted(data.draw(len(rows), seed=0), key=lambda row: row.place)
    return [in_usual_form(row).values for row in drawn]


def turns(*pairs):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in pairs]}


def test_alpaca_has_the_prompts_of_its_authors(tmp_path):
    rows = [
        {"instruction": "w1 w2", "input": "w3 {w4}", "output": "w5"},
        {"instruction": "w1 w2", "input": "", "output": "w6"},
        {"instruction": "w1 w2", "input": None, "output": "w7"},
    ]
    assert usual(tmp_path, rows) == [
        {"prompt": WITH_INPUT, "completion": "w5"},
        {"prompt": WITHOUT_INPUT, "completion": "w6"},
        {"prompt": WITHOUT_INPUT, "completion": "w7"},
    ]


def test_alpaca_without_the_column_of_inputs_and_under_other_names(tmp_path):
    assert usual(tmp_path, [{"instruction": "w1 w2", "output": "w5"}]) == [
        {"prompt": WITHOUT_INPUT, "completion": "w5"}
    ]
    row = {"instruction": "w1 w2", "context": "w3 {w4}", "response": "w5", "category": "x"}
    assert usual(tmp_path, [row], input="context", output="response") == [{"prompt": WITH_INPUT, "completion": "w5"}]


def test_alpaca_may_have_the_columns_of_its_relatives_if_they_are_empty(tmp_path):
    row = {"instruction": "w1 w2", "input": "", "output": "w5", "system": "", "history": []}
    assert usual(tmp_path, [row]) == [{"prompt": WITHOUT_INPUT, "completion": "w5"}]


def test_only_the_output_of_alpaca_counts_in_the_loss(tmp_path):
    data = load(tmp_path, [{"instruction": "w1 w2", "input": "", "output": "w5 w6 </s>"}])
    [example] = tokenize(data, word_tokenizer(), 1, 100, 0, show_progress_bar=False).examples
    expected = [ID["w5"], ID["w6"], ID["</s>"]]
    assert example.feature["labels"][-3:] == expected
    assert set(example.feature["labels"][:-3]) == {IGNORED}
    assert not example.prompt_changed


def test_a_column_of_whole_texts_is_read_before_the_parts_of_alpaca(tmp_path):
    assert load(tmp_path, [{"instruction": "w1", "input": "", "output": "w2", "text": "w3"}]).columns == {
        "text": "text"
    }


def test_sharegpt_has_the_roles_of_chat_templates(tmp_path):
    names = ["system", "human", "gpt", "tool", "function", "observation", "user", "assistant"]
    roles = ["system", "user", "assistant", "tool", "tool", "tool", "user", "assistant"]
    [values] = usual(tmp_path, [turns(*((name, f"w{number}") for number, name in enumerate(names)))])
    assert values == {"messages": [{"role": role, "content": f"w{number}"} for number, role in enumerate(roles)]}


def test_sharegpt_gives_the_tokens_of_the_same_messages(tmp_path):
    rows = [turns(("human", "w1 w2"), ("gpt", "w3"))]
    messages = [{"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]}]
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    first, second = (
        tokenize(load(tmp_path, one), tokenizer, 1, 50, 0, show_progress_bar=False).examples
        for one in (rows, messages)
    )
    assert first == second


def test_sharegpt_may_have_a_system_message_beside_and_messages_of_templates(tmp_path):
    rows = [
        {"system": "w9", "conversations": [{"role": "user", "content": "w1"}]},
        {"system": "", "conversations": [{"role": "user", "content": "w2"}]},
    ]
    assert [values["messages"] for values in usual(tmp_path, rows)] == [
        [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1"}],
        [{"role": "user", "content": "w2"}],
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "output": "w1"}, "The instruction of row 1 of .* is empty"),
        ({"instruction": "w1", "output": None}, "The output of row 1 of .* is missing"),
        ({"instruction": "w1", "input": 3, "output": "w1"}, "The input of row 1 of .* is not text but int"),
        ({"instruction": "w1", "output": "w2", "history": [["w3", "w4"]]}, "row 1 of .* has a history, for which"),
        ({"instruction": "w1", "output": "w2", "system": "w3"}, "row 1 of .* has a system, for which"),
        ({"conversations": "w1"}, "The conversations of row 1 of .* are not a list"),
        (turns(("narrator", "w1")), "has a turn from 'narrator'; known are human, user, gpt"),
        (turns(("human", None)), "has a turn without text"),
        (turns(("system", "w1")) | {"system": "w2"}, "has a system message in two places"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, row, message):
    with pytest.raises(CommandError, match=message):
        usual(tmp_path, [row])


def test_sharegpt_needs_a_chat_template(tmp_path):
    data = load(tmp_path, [turns(("human", "w1"), ("gpt", "w2"))])
    with pytest.raises(CommandError, match="has no chat template"):
        tokenize(data, word_tokenizer(), 1, 50, 0, show_progress_bar=False)

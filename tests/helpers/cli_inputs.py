"""A tiny model folder with a tokenizer of whole words, and a short way to run the command."""

import json

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fim_lora_command import main
from helpers.trained_adapters import fill

WORDS = [f"w{number}" for number in range(40)]
VOCABULARY = ["<unk>", "<pad>", "</s>", *WORDS, "user", "assistant", ":"]
ID = {word: index for index, word in enumerate(VOCABULARY)}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "{{ message.role }} : {{ message.content }} </s> {% endfor %}"
)


def word_tokenizer(chat_template=None, **special):
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def save_llama(folder, chat_template=CHAT_TEMPLATE, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(VOCABULARY), initializer_range=0.2, **(sizes | options))
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(chat_template).save_pretrained(folder)
    return folder


def save_bert(folder):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(model, folder, *, num_labels=None, vocabulary=None, dtype=torch.float32, **options):
    """A folder of `save_pretrained` with an adapter for a model folder, with random weights as after training.

    `vocabulary` is the number of tokens after some were added in the training.
    """
    torch.manual_seed(1)
    if num_labels is None:
        base = LlamaForCausalLM.from_pretrained(model, dtype=dtype)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=num_labels, dtype=dtype)
    task_type = "CAUSAL_LM" if num_labels is None else "SEQ_CLS"
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": task_type} | options
    if vocabulary is not None:
        base.resize_token_embeddings(vocabulary)
    adapted = get_peft_model(base, LoraConfig(**options))
    fill(adapted, std=0.1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(folder)
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count, length=6):
    return [" ".join(WORDS[(row * 7 + word) % len(WORDS)] for word in range(length)) for row in range(count)]


def allocate(model, data, output, *options):
    """Exit code of `fim-lora allocate` with few batches."""
    fixed = ["--model", model, "--data", data, "--output", output, "--batches", 2, "--batch-size", 2]
    return main(["allocate", *[str(word) for word in (*fixed, *options)]])


def compress(adapter, data, output, *options):
    """Exit code of `fim-lora compress` with few batches."""
    given = [] if data is None else ["--data", data, "--batches", 2]
    fixed = ["--output", output, "--batch-size", 2]
    return main(["compress", *[str(word) for word in (adapter, *given, *fixed, *options)]])


COMPRESSED_FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "fim_compression.json",
    "fim_size_curve.json",
    "rank_map.png",
    "size_curve.png",
]
OUR_FILES = ["adapter_config.json", "fim_allocation.json", "rank_map.png"]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def error_line(capsys):
    """The one line on stderr."""
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fim-lora: error: ")
    return line.removeprefix("fim-lora: error: ")

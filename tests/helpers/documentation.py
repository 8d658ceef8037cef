"""The code blocks of README and docs, and what they need to run: small models and files under the names they use."""

import contextlib
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fim_lora import FimConfig, initialize_lora_fim_ranks
from fim_lora_command import main
from helpers.cli_inputs import VOCABULARY, save_adapter, save_llama, texts, write_jsonl

ROOT = Path(__file__).parent.parent.parent
# A block, its language, and the text before it.
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_NUM_BATCHES = 16


@dataclass(frozen=True)
class Block:
    """A code block of a page. `line` is the line of the page before its first line."""

    page: str
    line: int
    language: str
    code: str

    def run_python(self, names):
        """Run the block; a traceback has the lines of the page."""
        exec(compile("\n" * self.line + self.code, str(ROOT / self.page), "exec"), names)

    @property
    def commands(self):
        """The words of every command of a shell block, and the file that its output goes to."""
        for line in self.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                output = words[words.index(">") + 1] if ">" in words else None
                yield words[: words.index(">")] if output else words, output


def pages():
    """README, CONTRIBUTING and all of docs, as paths in the repository."""
    return ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def blocks(page, *languages):
    """The blocks of a page in some languages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        language, code = match.groups()
        if language in languages:
            yield Block(page, text[: match.start(2)].count("\n"), language, code)


def run_page(page, replacements, names_for_every_block):
    """Run the Python blocks of a page and its `fim-lora` commands, in order, in one namespace and the current folder.

    `replacements` has small equivalents of what a block names, such as a model on the Hub. `names_for_every_block`
    makes the objects that blocks use without making them: new ones for each block.
    """
    names = {"__name__": "__main__"}
    for block in blocks(page, "python", "sh"):
        code = block.code
        for written, small in replacements.items():
            code = code.replace(written, small)
        block = Block(page, block.line, block.language, code)
        if block.language == "python":
            names |= names_for_every_block()
            block.run_python(names)
        else:
            run_commands(block)
    return names


def run_commands(block):
    """Run the `fim-lora` commands of a shell block."""
    for words, output in block.commands:
        if words[0] == "fim-lora":
            if "--output" in words:  # another way on the same page may have made this folder
                shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
            with contextlib.ExitStack() as stack:
                if output:
                    stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(output).open("w"))))
                assert main(words[1:]) == 0, f"{block.page}: {shlex.join(words)}"


def small_model(folder):
    """A folder with a tiny model and a tokenizer, in the place of one on the Hub."""
    return save_llama(folder / "model")


def small_adapter(model, folder):
    """A folder with a trained adapter of the tiny model."""
    return save_adapter(model, folder / "trained")


def write_data(folder):
    """The data files that the commands name."""
    for name in ("data.jsonl", "train.jsonl", "held_out.jsonl"):
        write_jsonl(folder / name, [{"text": text} for text in texts(64)])


def load_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def text_batches(batch_size=2, length=8):
    """Batches of token ids of the tiny model, with labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, length)
    ids = [torch.randint(3, len(VOCABULARY), shape, generator=generator) for _ in range(_NUM_BATCHES)]
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


def awaiting_config():
    """A config of an adapter that awaits its ranks."""
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights="fim", fim_config=FimConfig())


def awaiting_model(folder):
    """The tiny model with such an adapter."""
    return get_peft_model(load_model(folder), awaiting_config())


def trained_model(model, adapter):
    return PeftModel.from_pretrained(load_model(model), adapter, is_trainable=True)


def allocated(folder):
    """A model whose adapter has its ranks, and the allocation."""
    model = awaiting_model(folder)
    return model, initialize_lora_fim_ranks(model, text_batches(), show_progress_bar=False)


def text_dataset():
    return Dataset.from_dict({"text": texts(64)})


def classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)


def classified_sentences(length=12):
    """Rows of token ids of the tiny model, each with a class."""
    rows = torch.cat([batch["input_ids"] for batch in text_batches(batch_size=8, length=length)])
    return [{"input_ids": row, "labels": number % 3} for number, row in enumerate(rows)]

"""Train an adapter from `fim-lora allocate` with stock PEFT, without importing fim_lora.

Usage: python examples/train_with_stock_peft.py ADAPTER_FOLDER DATA.jsonl TRAINED_FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from smollm2_path import smollm2_path

STEPS, BATCH_SIZE, LENGTH, LEARNING_RATE = 16, 4, 128, 1e-3
HELD_OUT = 16  # texts at the end of the file, for the held-out loss


def make_batch(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Tokenize and pad texts, and add labels (-100 for padding)."""
    batch = dict(tokenizer(texts, return_tensors="pt", truncation=True, max_length=LENGTH, padding=True))
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@torch.no_grad()
def held_out_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """The mean loss per token in eval mode."""
    model.eval()
    loss: float = model(**batch).loss.item()
    model.train()
    return loss


def main(adapter: Path, data: Path, trained: Path) -> None:
    """Train a few steps, check that the loss on held-out texts falls, and save the trained adapter.

    Args:
        adapter: Folder with the `adapter_config.json`.
        data: JSONL file with a field `text` in each line.
        trained: Folder for the trained adapter.

    Raises:
        SystemExit: If the loss did not fall, or if fim_lora was imported.
    """
    torch.manual_seed(0)
    weights = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    base = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)

    model = get_peft_model(base, LoraConfig.from_pretrained(str(adapter)))
    model.print_trainable_parameters()

    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(len(texts) - HELD_OUT).tolist()
    held_out = make_batch(tokenizer, texts[-HELD_OUT:])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    before = held_out_loss(model, held_out)
    print(f"held-out loss before training {before:.3f}")
    for step in range(STEPS):
        rows = order[step * BATCH_SIZE :][:BATCH_SIZE]
        loss = model(**make_batch(tokenizer, [texts[row] for row in rows])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:2d}  loss {loss.item():.3f}")
    after = held_out_loss(model, held_out)
    print(f"held-out loss after {STEPS} steps {after:.3f}")

    if after >= before:
        raise SystemExit(
            f"The held-out loss did not fall: it was {before:.3f} before training and is {after:.3f} now."
        )
    if any(name.startswith("fim_lora") for name in sys.modules):
        raise SystemExit("fim_lora was imported, but this example must run with stock PEFT only.")
    model.save_pretrained(str(trained))
    print(f"trained adapter saved to {trained}")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))

"""Train an adapter that `fim-lora allocate` made, with stock PEFT: fim_lora is not imported here.

Usage: python examples/train_with_stock_peft.py ADAPTER_FOLDER DATA.jsonl
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from smollm2_path import smollm2_path

STEPS, BATCH_SIZE, LENGTH, LEARNING_RATE = 16, 4, 128, 1e-3


def main(adapter: Path, data: Path) -> None:
    """Train a few steps and show that the loss falls.

    Args:
        adapter: Folder with the `adapter_config.json`.
        data: JSONL with a `text` in each line.

    Raises:
        SystemExit: If the loss has not fallen.
    """
    torch.manual_seed(0)
    weights = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    base = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)

    config = LoraConfig.from_pretrained(str(adapter))
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(len(texts))[: STEPS * BATCH_SIZE].view(STEPS, BATCH_SIZE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for rows in order.tolist():
        batch = tokenizer(
            [texts[row] for row in rows], return_tensors="pt", truncation=True, max_length=LENGTH, padding=True
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {len(losses):2d}  loss {losses[-1]:.3f}")

    first, last = statistics.mean(losses[:4]), statistics.mean(losses[-4:])
    print(f"mean loss of the first four steps {first:.3f}, of the last four {last:.3f}")
    if last >= first:
        raise SystemExit("The loss did not fall.")
    if any(name.startswith("fim_lora") for name in sys.modules):
        raise SystemExit("This process was to run stock PEFT, but fim_lora was imported.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

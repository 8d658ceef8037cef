"""Prune SmolLM2-135M without training, by three criteria, and print the held-out loss of each. Nothing is written.

Usage: python examples/prune_smollm2.py [TEXTS.jsonl]

The file has a field `text` in each line; without one, the texts are the docstrings of Python's standard library. The
first half of the texts is for calibration and the second half for the held-out loss. The weights of the 210 linear
layers of the decoder are set to zero where a score is lowest:

- magnitude: `|w|`;
- Wanda (Sun et al. 2023, arXiv:2306.11695): `|w| · ‖x_j‖`, with the norm of input feature j over all tokens;
- OBD (LeCun, Denker and Solla 1989): `½ w² F`, with the eFIM diagonal F from `fim_lora.get_fim_diagonals`.

All criteria prune the same share of every layer. They are compared twice, each time with the same groups for all of
them: the lowest scores of every layer, and the lowest scores of every output row, as in the paper on Wanda.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fim_lora import FimDiagonals, get_fim_diagonals, obd_saliency
from smollm2_path import smollm2_path
from stdlib_docstrings import docstrings

LENGTH, CALIBRATION_SEQUENCES, HELD_OUT_SEQUENCES, BATCH_SIZE = 128, 64, 24, 4
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
GROUPS = ("layer", "row")

Score = Callable[[str], Tensor]


def sequences(tokenizer: Any, texts: list[str], number: int) -> Tensor:
    """Token ids (number × LENGTH) of texts in random order, with the end-of-text token after each.

    Raises:
        SystemExit: If there are not enough texts.
    """
    texts = random.Random(0).sample(texts, len(texts))
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    if len(ids) < number * LENGTH:
        raise SystemExit(f"The texts have {len(ids)} tokens, but {number * LENGTH} are needed in each half.")
    return torch.tensor(ids[: number * LENGTH]).view(number, LENGTH)


@torch.no_grad()
def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss per token of every sequence."""
    by_batch = []
    for batch in ids.split(BATCH_SIZE):
        logits = model(input_ids=batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        by_batch.append(loss.mean(1))
    return torch.cat(by_batch)


def input_norms(model: nn.Module, layers: Mapping[str, nn.Linear], ids: Tensor) -> dict[str, Tensor]:
    """`‖x_j‖` of every input feature of every layer, over all tokens."""
    squares = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}

    def add(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares[name] += args[0].square().sum((0, 1))

    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    losses(model, ids)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


@contextmanager
def pruned(layers: Mapping[str, nn.Linear], score: Score, share: float, group: str) -> Iterator[None]:
    """Inside the block, the weights with the lowest scores of every group of every layer are zero."""
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        scores = score(name).view(layer.out_features if group == "row" else 1, -1)
        lowest = scores.topk(round(share * scores.shape[1]), largest=False, sorted=False).indices
        layer.weight.data.view_as(scores).scatter_(1, lowest, 0)
    yield
    for name, layer in layers.items():
        layer.weight.data.copy_(before[name])


def main(texts: list[str]) -> None:
    """Measure, prune and print a table in Markdown."""
    started = time.monotonic()
    weights = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32).eval()
    calibration = sequences(tokenizer, texts[: len(texts) // 2], CALIBRATION_SEQUENCES)
    held_out = sequences(tokenizer, texts[len(texts) // 2 :], HELD_OUT_SEQUENCES)

    batches = [{"input_ids": ids, "labels": ids} for ids in calibration.split(BATCH_SIZE)]
    diagonals = get_fim_diagonals(model, batches, ["model.layers"], num_batches=len(batches))
    layers = {name: model.get_submodule(name) for name in diagonals}
    norms = input_norms(model, layers, calibration)
    print(f"{diagonals} after {time.monotonic() - started:.0f} s")
    print_table(model, held_out, layers, criteria(layers, norms, diagonals))
    print(f"\n{time.monotonic() - started:.0f} s in total")


def criteria(
    layers: Mapping[str, nn.Linear], norms: Mapping[str, Tensor], diagonals: FimDiagonals
) -> dict[str, Score]:
    """Name of a criterion to its score: a function of the name of a layer, with one number for each weight."""
    return {
        "magnitude": lambda name: layers[name].weight.detach().abs(),
        "Wanda": lambda name: layers[name].weight.detach().abs() * norms[name],
        "OBD": lambda name: obd_saliency(layers[name].weight, diagonals[name]),
    }


def print_table(
    model: nn.Module, held_out: Tensor, layers: Mapping[str, nn.Linear], scores: Mapping[str, Score]
) -> None:
    """Print the held-out loss by share and group, and the difference between OBD and Wanda with its standard error."""
    dense = losses(model, held_out)
    zeros = sum(int(layer.weight.eq(0).sum()) for layer in layers.values())
    total = sum(layer.weight.numel() for layer in layers.values())
    print(f"{len(layers)} layers, {total:,} weights, of which {zeros / total:.1%} are zero before pruning")
    print(f"Held-out loss per token before pruning: {dense.mean():.3f}, over {held_out.numel():,} tokens\n")
    print(f"| pruned | lowest of each | {' | '.join(scores)} | OBD - Wanda |")
    print(f"| ---: | --- | {'---: | ' * len(scores)}---: |")
    for share in SHARES:
        for group in GROUPS:
            found = {}
            for criterion, score in scores.items():
                with pruned(layers, score, share, group):
                    found[criterion] = losses(model, held_out)
            difference = found["OBD"] - found["Wanda"]
            error = difference.std() / len(difference) ** 0.5
            columns = " | ".join(f"{loss.mean():.3f}" for loss in found.values())
            print(f"| {share:.0%} | {group} | {columns} | {difference.mean():+.3f} ± {error:.3f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
        main([json.loads(line)["text"] for line in lines])
    else:
        main(list(docstrings()))

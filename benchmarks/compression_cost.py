"""The cost of shrinking an adapter: the calibration against LoRA training, and the truncation by itself.

    python benchmarks/compression_cost.py --decoder FILE.gguf

Times are ratios within one run, in interleaved rounds. Memory is the peak beyond the loaded model, each in a process
of its own. Training has no optimizer here, whose state would only add to its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fim_lora import compress_lora, get_lora_spectrum
from peak_memory import ALLOCATOR_ENVIRONMENT, MIB, extra_peak
from quality_tasks import TASKS, load_model

BATCHES, BATCH_SIZE, POSITIONS = 4, 4, 128
ROUNDS = 3
TARGETS = TASKS["gsm8k"].targets["all-linear"]


def trained_model(decoder: str, r: int) -> Any:
    """SmolLM2 with an adapter on all linear layers, random and not zero, as after a training."""
    model = load_model(TASKS["gsm8k"], decoder, 0, 0, torch.device("cpu"), torch.float32)
    return randomized(get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS)))


def randomized(model: Any) -> Any:
    """Give B small random values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-3)
    return model


def batches_for(model: Any) -> list[dict[str, torch.Tensor]]:
    """Batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = [torch.randint(vocabulary, (BATCH_SIZE, POSITIONS), generator=generator) for _ in range(BATCHES)]
    return [{"input_ids": one, "labels": one} for one in ids]


def train_passes(model: Any, data: list[dict[str, torch.Tensor]]) -> None:
    """Forward and backward passes of LoRA training."""
    model.train()
    for batch in data:
        model(**batch).loss.backward()
        model.zero_grad()


def calibrate(model: Any, data: list[dict[str, torch.Tensor]]) -> Any:
    """The whole spectrum, with its decompositions."""
    return get_lora_spectrum(model, data, num_batches=len(data), show_progress_bar=False)


METHODS: dict[str, Callable[[Any, list[dict[str, torch.Tensor]]], Any]] = {
    "training": train_passes,
    "spectrum": calibrate,
}


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_ratio(decoder: str, r: int) -> dict[str, Any]:
    """Seconds of both methods in interleaved rounds, and the median of the ratios."""
    model = trained_model(decoder, r)
    data = batches_for(model)
    train_passes(model, data[:1])
    rounds = [{name: seconds_of(lambda: run(model, data)) for name, run in METHODS.items()} for _ in range(ROUNDS)]  # noqa: B023
    ratio = statistics.median(one["spectrum"] / one["training"] for one in rounds)
    return {"rounds": rounds, "ratio": ratio}


def memory_ratio(decoder: str, r: int) -> dict[str, float]:
    """Peak memory beyond the loaded model of both methods, in MiB, and their ratio."""
    peaks = {}
    for name in METHODS:
        command = [sys.executable, __file__, "--decoder", decoder, "--memory-of", name, "--r", str(r)]
        output = subprocess.run(
            command, env=os.environ | ALLOCATOR_ENVIRONMENT, capture_output=True, text=True, check=True
        )
        peaks[name] = float(output.stdout.split()[-1])
    return peaks | {"ratio": peaks["spectrum"] / peaks["training"]}


def print_memory(decoder: str, r: int, method: str) -> None:
    """Print the peak memory of one method."""
    model = trained_model(decoder, r)
    data = batches_for(model)
    with extra_peak(torch.device("cpu")) as peak:
        METHODS[method](model, data)
    print(peak.extra_bytes / MIB)


def truncation_seconds(decoder: str) -> dict[str, float]:
    """Seconds to decide and to truncate, for the layers of SmolLM2 at rank 64 and for 1,000 layers at rank 16."""
    seconds = {}
    model = trained_model(decoder, 64)
    spectrum = calibrate(model, batches_for(model)[:1])
    number = len(spectrum)
    seconds[f"{number} layers of rank 64"] = seconds_of(lambda: compress_lora(model, spectrum, keep=0.25))
    stack = nn.Sequential(*(nn.Linear(256, 256) for _ in range(1000)))
    many = randomized(get_peft_model(stack, LoraConfig(r=16, target_modules=r"\d+")))
    data = [{"input": torch.randn(2, 256)}]
    spectrum = get_lora_spectrum(
        many,
        data,
        num_batches=1,
        forward_fn=lambda model, batch: model(batch["input"]).square().mean(),
        show_progress_bar=False,
    )
    seconds["1,000 layers of rank 16"] = seconds_of(lambda: compress_lora(many, spectrum, keep=0.25))
    return seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", required=True, help="SmolLM2: GGUF file, folder or hub id")
    parser.add_argument("--memory-of", choices=list(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--r", type=int, default=16, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_memory(arguments.decoder, arguments.r, arguments.memory_of)
        return
    found: dict[str, Any] = {"truncation_seconds": truncation_seconds(arguments.decoder)}
    for r in (16, 64):
        found[f"r={r}"] = {"time": time_ratio(arguments.decoder, r), "memory_mib": memory_ratio(arguments.decoder, r)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

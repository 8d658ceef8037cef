"""Measure the cost of choosing ranks and of shrinking an adapter, next to plain LoRA, EVA and LoRA-GA.

    python benchmarks/cost.py MODEL

MODEL is a hub id, a folder or a GGUF file, or `shape:NAME` for a shape of `cost_shapes.py` with random weights.
`cost_sweep.py` runs many points. Every method sees the same batches: text that is concatenated and cut, so that there
is no padding.

- `lora`, the reference: forward and backward passes of plain LoRA in training mode, without an optimizer.
- `lora-upper-half`: the same, with twice the rank in the upper half of the blocks and no adapter below.
- `fim-dataloader`: `get_fim_scores` on an adapter that awaits its ranks.
- `fim-own-loop`: forward and backward passes of an adapter that awaits its ranks, observed by its hooks.
- `fim-spectrum`: `get_lora_spectrum` on an adapter with random B, as before a compression.
- `eva`: `get_eva_state_dict`, which cycles through the batches until its components have converged.
- `lora-ga`: `preprocess_loraga`, which needs the gradients of the full weights.

Time. Each round runs every method once, one after another. The order rotates from round to round, so that a drift of
the machine affects all methods equally. Setup before a run (a copy of the model that shares its weights, and the
adapter) is not timed. A ratio is paired: the seconds of a method divided by those of plain LoRA in the same round. EVA
takes minutes where the other methods take seconds, so it is not part of the rounds. It runs `--eva-repeats` times (1)
after them, with a run of plain LoRA directly before and after it. Its ratio is to the mean of the two, and its spread
shows the ratios to each of them. EVA's many small decompositions are slowed down far more than the other methods by
other work on the processor. Use a quiet machine, or compare the forward passes.

Memory. The peak during the method minus the memory in use before it. The weights are therefore not counted, and the
adapter is. On a GPU this is the memory that PyTorch has allocated. On a CPU it is the resident memory of a separate
process for each method, with an allocator that returns freed memory. `--no-memory` skips this measurement.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cost_methods import (
    CALIBRATION,
    EVA,
    METHODS,
    REFERENCE,
    Batch,
    Case,
    load_model,
    make_batches,
    number_of_layers,
    prepare_allocation,
    prepare_truncation,
    resolved_targets,
    tiny_batches,
)
from cost_report import print_report
from cost_shapes import PREFIX, in_four_bits, random_batches, random_model
from cost_timing import Row, break_down, physical_limit, print_progress, time_rows, timed
from fim_lora import get_fim_scores
from peak_memory import ALLOCATOR_ENVIRONMENT, MIB, extra_peak

DTYPES = ("float32", "bfloat16")


# --- Memory ------------------------------------------------------------------------------------------------------


def add_peaks(
    rows: list[Row], case: Case, batches: list[Batch], device: torch.device, arguments: Sequence[str]
) -> None:
    """Measure the peak memory of every row. On a CPU, each is measured in a separate process."""
    for row in rows:
        print_progress(f"memory of {row.method}")
        in_child = device.type == "cpu"
        peak = _peak_in_child(row.method, arguments) if in_child else _peak(row.method, case, batches, device)
        row.extra_peak_mib, row.memory_source = peak["extra_peak_mib"], peak["memory_source"]
    reference = next(row.extra_peak_mib for row in rows if row.method == REFERENCE)
    for row in rows:
        if row.extra_peak_mib is not None and reference:
            row.extra_peak_ratio = row.extra_peak_mib / reference


def _peak_in_child(method: str, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--peak-of", method]
    environment = os.environ | ALLOCATOR_ENVIRONMENT
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _peak(method: str, case: Case, batches: list[Batch], device: torch.device) -> dict[str, Any]:
    # EVA never converges on a tiny batch, so it is warmed up with passes of LoRA.
    METHODS[REFERENCE if method == EVA else method].prepare(case, tiny_batches(batches))()
    for parameter in case.model.parameters():
        parameter.detach().sum()  # weights that are mapped from a file become resident only when they are read
    gc.collect()
    with extra_peak(device) as peak:
        METHODS[method].prepare(case, batches)()
    return {"extra_peak_mib": peak.extra_bytes / MIB, "memory_source": peak.source}


# --- Settings and machine ----------------------------------------------------------------------------------------


def describe_settings(arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """The model, the batches and the options, as JSON types."""
    parameters = sum(parameter.numel() for parameter in case.model.parameters())
    return {
        "model": Path(arguments.model).name,
        "parameters": parameters,
        "layers": number_of_layers(case),
        "target modules": " ".join(case.target_modules),
        "rank": arguments.r,
        "batch size": arguments.batch_size,
        "length": arguments.length,
        "batches": arguments.batches,
        "repeats": arguments.repeats,
        "device": str(arguments.device),
        "dtype": arguments.dtype,
        "four bits": arguments.four_bits,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads and package versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"cpu": _cpu_model(), **gpu, "threads": torch.get_num_threads(), **versions}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# --- Command -----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help=f"hub id, local folder, GGUF file or {PREFIX}NAME")
    parser.add_argument("--data", type=Path, help="text file; default: docstrings of the standard library")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--eva-repeats", type=int, default=1, help="runs of EVA, which is slow (%(default)s)")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], metavar="NAME")
    parser.add_argument("-r", type=int, default=8, help="LoRA rank (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="lora is always added")
    parser.add_argument("--no-breakdown", action="store_true", help="do not measure the parts of the calibration")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; default: PyTorch's own choice")
    parser.add_argument("--device", type=torch.device, default=None, help="default: cuda if available, else cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="dtype of the frozen model (%(default)s)")
    parser.add_argument("--four-bits", action="store_true", help="quantize linear layers to NF4 with bitsandbytes")
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    for name in ("batch_size", "length", "batches", "repeats", "eva_repeats", "r"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    parsed.methods = [method for method in METHODS if method in parsed.methods or method == REFERENCE]
    parsed.device = parsed.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return parsed


def load_case(arguments: argparse.Namespace) -> tuple[Case, list[Batch]]:
    """Load the model and make the batches."""
    torch.manual_seed(0)
    size = arguments.batch_size, arguments.length, arguments.batches, arguments.device
    if arguments.model.startswith(PREFIX):
        model: Any = random_model(arguments.model.removeprefix(PREFIX), arguments.device)
        batches = random_batches(model.config.vocab_size, *size)
    else:
        model, tokenizer = load_model(arguments.model, arguments.device)
        batches = make_batches(tokenizer, arguments.data, *size)
    model.to(getattr(torch, arguments.dtype))
    if arguments.four_bits:
        model = in_four_bits(model, arguments.device)
        model.config.use_cache = False
    return Case(model, resolved_targets(model, arguments.target_modules, arguments.r), arguments.r), batches


def main(command_line: Sequence[str] | None = None) -> None:
    """Measure and report."""
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments = parse_arguments(command_line)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    case, batches = load_case(arguments)
    if arguments.peak_of:
        print(json.dumps(_peak(arguments.peak_of, case, batches, device)))
        return
    report: dict[str, Any] = {"settings": describe_settings(arguments, case), "machine": describe_machine(device)}
    rows = time_rows(arguments, case, batches, device)
    report["limit"] = physical_limit(case, arguments.batch_size, arguments.length, device)
    one = batches[:1]
    scores = get_fim_scores(case.fim_adapter(one), one, show_progress_bar=False)
    steps = {
        "allocation_seconds": lambda: prepare_allocation(case, one, scores),
        "truncation_seconds": lambda: prepare_truncation(case, one),
    }
    for name, prepare in steps.items():
        report[name] = statistics.median(timed(prepare(), device) for _ in range(arguments.repeats))
    with_breakdown = CALIBRATION in arguments.methods and not arguments.no_breakdown
    breakdown = break_down(case, batches, device, arguments.repeats) if with_breakdown else None
    if not arguments.no_memory:
        add_peaks(rows, case, batches, device, command_line)
    print_report(report, rows, breakdown)
    if arguments.json:
        report |= {"methods": [asdict(row) for row in rows], "breakdown": breakdown and asdict(breakdown)}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

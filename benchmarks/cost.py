"""What it costs to choose the ranks: time and memory of a calibration beside plain LoRA, EVA and LoRA-GA.

    python benchmarks/cost.py MODEL

MODEL is a hub id, a folder or a GGUF file, or `shape:NAME` for random weights of a shape in `cost_shapes.py`.
`cost_sweep.py` runs many points. Every method sees the same batches: text that is concatenated and cut, so there is
no padding.

- `lora`, the reference: forward and backward passes of plain LoRA in training mode, without an optimizer.
- `fim-dataloader`: `get_fim_scores` on an adapter that awaits its ranks.
- `fim-own-loop`: forward and backward passes of an adapter that awaits its ranks, which its hooks watch.
- `eva`: `get_eva_state_dict`, which goes round the batches until its components have converged.
- `lora-ga`: `preprocess_loraga`, which needs the gradients of the full weights.

Time. One run after the other, one of each method in a round, and the order is rotated from round to round, so a
drift of the machine hits all methods alike. What is built before a run (a copy of the model that shares its weights,
and the adapter) is not timed. A ratio is paired: a method's seconds over those of plain LoRA in the same round. EVA
takes minutes where the others take seconds, so it is no part of the rounds: it runs `--eva-repeats` times (1) after
them, with a run of plain LoRA directly before and after it; its ratio is to the mean of the two, and its spread the
ratios to either. Its many small decompositions suffer far more than the others from other work on the processor, so
use a quiet machine, or compare the forward passes.

Memory. The peak during the method over what was in use before it, so the weights are not counted, and the adapter is.
On a GPU it is what PyTorch has allocated. On a CPU it is the resident memory of a process of its own for each method,
with an allocator that returns what is freed. `--no-memory` leaves it out.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from cost_methods import (
    CALIBRATION,
    EVA,
    METHODS,
    REFERENCE,
    Batch,
    Case,
    Run,
    allocation_seconds,
    load_model,
    make_batches,
    number_of_layers,
    prepare_eva,
    prepare_frozen,
    resolved_targets,
    synchronize,
    timed_squared_norms,
    tiny_batches,
)
from cost_shapes import PREFIX, in_four_bits, pass_operations, random_batches, random_model
from peak_memory import ALLOCATOR_ENVIRONMENT, MIB, extra_peak

DTYPES = ("float32", "bfloat16")


@dataclass
class Row:
    """What was measured of a method.

    Attributes:
        method: Its key.
        label: Its name in the table.
        forward_passes: Of EVA, how many batches it took to converge in each run.
        seconds: One per run over all batches.
        ratios: The same, to plain LoRA.
        ratio: What the table shows: the median of `ratios`, or EVA's ratio to the mean of its neighbours.
        extra_peak_mib: Peak memory over the loaded model.
        extra_peak_ratio: The same, to plain LoRA.
        memory_source: How the peak was found.
    """

    method: str
    label: str
    forward_passes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    ratio: float | None = None
    extra_peak_mib: float | None = None
    extra_peak_ratio: float | None = None
    memory_source: str | None = None


@dataclass
class Breakdown:
    """Medians, in seconds, of the parts of a calibration over all batches.

    Attributes:
        calibration: The whole, measured with a clock around every norm.
        frozen_passes: Forward and backward passes of the frozen model without hooks.
        squared_norms: All calls of `squared_norms`.
        other: The rest: hooks, saved inputs, running sums.
    """

    calibration: float
    frozen_passes: float
    squared_norms: float
    other: float


# --- Time --------------------------------------------------------------------------------------------------------


def timed(run: Run, device: torch.device) -> float:
    """Seconds of a run; rubbish of earlier ones is cleared first, so that it is not collected on its account."""
    gc.collect()
    synchronize(device)
    start = perf_counter()
    run()
    synchronize(device)
    return perf_counter() - start


def time_method(method: str, case: Case, batches: list[Batch], device: torch.device) -> float:
    """Build and time one run of a method."""
    return timed(METHODS[method].prepare(case, batches), device)


def time_rounds(
    methods: Sequence[str], case: Case, batches: list[Batch], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Time the methods in turn; each round begins with another one."""
    for method in methods:
        # A GPU chooses its kernels by the shape of what they work on.
        time_method(method, case, tiny_batches(batches) if device.type == "cpu" else batches, device)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(repeats):
        first = number % len(methods)
        for method in (*methods[first:], *methods[:first]):
            seconds[method].append(time_method(method, case, batches, device))
        _progress(f"round {number + 1} of {repeats}: " + ", ".join(f"{m} {s[-1]:.2f} s" for m, s in seconds.items()))
    return seconds


def time_eva(case: Case, batches: list[Batch], device: torch.device, repeats: int) -> Row:
    """EVA between two runs of plain LoRA, so many times."""
    row = Row(EVA, METHODS[EVA].label)
    mean_ratios = []
    for number in range(repeats):
        before = time_method(REFERENCE, case, batches, device)
        run = prepare_eva(case, batches)
        eva = timed(run, device)
        after = time_method(REFERENCE, case, batches, device)
        row.forward_passes.append(run.forward_passes)
        row.seconds.append(eva)
        row.ratios += [eva / before, eva / after]
        mean_ratios.append(2 * eva / (before + after))
        _progress(f"EVA {number + 1} of {repeats}: lora {before:.2f} s, eva {eva:.2f} s, lora {after:.2f} s")
    row.ratio = statistics.median(mean_ratios)
    return row


def time_rows(arguments: argparse.Namespace, case: Case, batches: list[Batch], device: torch.device) -> list[Row]:
    """The timed rows, in the order of the table."""
    in_rounds = [method for method in arguments.methods if method != EVA]
    rows = []
    seconds = time_rounds(in_rounds, case, batches, device, arguments.repeats)
    for method, times in seconds.items():
        ratios = [own / reference for own, reference in zip(times, seconds[REFERENCE], strict=True)]
        rows.append(Row(method, METHODS[method].label, seconds=times, ratios=ratios, ratio=statistics.median(ratios)))
    if EVA in arguments.methods:
        rows.append(time_eva(case, batches, device, arguments.eva_repeats))
    return sorted(rows, key=lambda row: list(METHODS).index(row.method))


def break_down(case: Case, batches: list[Batch], device: torch.device, repeats: int) -> Breakdown:
    """Where the calibration's time goes; its parts are measured in turn as well."""
    whole, passes, norms = [], [], []
    for _ in range(repeats):
        passes.append(timed(prepare_frozen(case, batches), device))
        with timed_squared_norms(device) as seconds:
            whole.append(time_method(CALIBRATION, case, batches, device))
        norms.append(sum(seconds))
    calibration, frozen, squared = (statistics.median(times) for times in (whole, passes, norms))
    return Breakdown(calibration, frozen, squared, calibration - frozen - squared)


def physical_limit(case: Case, batch_size: int, length: int, device: torch.device) -> dict[str, float]:
    """What the matrix products of one forward and one activation-gradient backward pass take at the measured rate.

    Args:
        case: The model.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        device: Where the model is.

    Returns:
        `operations` of a batch, `operations_per_second` of a large matrix product, and `seconds_per_batch`.
    """
    operations = pass_operations(case.model, batch_size, length)
    size = 2048 if device.type == "cpu" else 8192
    dtype = next(case.model.parameters()).dtype
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    product = torch.empty(size, size, device=device, dtype=dtype)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    seconds = min(timed(multiply, device) for _ in range(10))
    rate = 2.0 * size**3 / seconds
    return {"operations": operations, "operations_per_second": rate, "seconds_per_batch": operations / rate}


# --- Memory ------------------------------------------------------------------------------------------------------


def add_peaks(
    rows: list[Row], case: Case, batches: list[Batch], device: torch.device, arguments: Sequence[str]
) -> None:
    """Measure the peak of every row: on a CPU, where it is that of the process, each in a process of its own."""
    for row in rows:
        _progress(f"memory of {row.method}")
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


# --- Report ------------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any], rows: list[Row], breakdown: Breakdown | None) -> None:
    """Print the table, the breakdown, the settings and the machine."""
    print(_table(rows))
    for row in rows:
        if row.method == EVA:
            passes = ", ".join(map(str, row.forward_passes))
            print(
                f"\nEVA ran after the rounds, between two runs of plain LoRA; its spread is the ratios to either of "
                f"them. Forward passes until it had converged: {passes}."
            )
    if breakdown is not None:
        print("\n" + _breakdown_lines(breakdown))
    limit = report["limit"]
    per_batch = statistics.median(next(row.seconds for row in rows if row.method == REFERENCE))
    per_batch /= report["settings"]["batches"]
    print(
        f"\nPhysical limit: {limit['operations'] / 1e9:.0f} billion operations a batch, at "
        f"{limit['operations_per_second'] / 1e9:.0f} billion a second {limit['seconds_per_batch']:.2f} s; plain LoRA "
        f"takes {per_batch:.2f} s, which is {per_batch / limit['seconds_per_batch']:.2f} times that."
    )
    print(f"Allocation and re-initialisation with given scores: {report['allocation_seconds']:.3f} s")
    settings, machine = report["settings"], report["machine"]
    print("\n" + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print(", ".join(f"{name} {value}" for name, value in machine.items()))


def _table(rows: list[Row]) -> str:
    header = ("method", "median s", "ratio", "[min–max]", "extra peak MiB", "ratio")
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs)
        )
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"[{min(row.ratios):.2f}–{max(row.ratios):.2f}]"
    return (
        row.label,
        f"{statistics.median(row.seconds):.2f}",
        _number(row.ratio, 2),
        spread,
        _number(row.extra_peak_mib, 1),
        _number(row.extra_peak_ratio, 2),
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _breakdown_lines(breakdown: Breakdown) -> str:
    def line(label: str, seconds: float) -> str:
        return f"  {label:<52}{seconds:8.3f} s  {seconds / breakdown.calibration:6.1%}"

    return "\n".join(
        [
            "Where the time of the calibration over a dataloader goes:",
            line("whole, with a clock around every norm", breakdown.calibration),
            line("forward + backward of the frozen model, no hooks", breakdown.frozen_passes),
            line("squared norms", breakdown.squared_norms),
            line("rest (hooks, saved inputs, sums), by difference", breakdown.other),
        ]
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads and versions."""
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


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- Command -----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="hub id, local folder or GGUF file")
    parser.add_argument("--data", type=Path, help="text file; default: docstrings of the standard library")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--eva-repeats", type=int, default=1, help="runs of EVA, which is slow (%(default)s)")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], metavar="NAME")
    parser.add_argument("-r", type=int, default=8, help="LoRA rank (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="lora is always added")
    parser.add_argument("--no-breakdown", action="store_true", help="do not measure the parts of the calibration")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    parser.add_argument("--device", type=torch.device, default=None, help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the frozen model (%(default)s)")
    parser.add_argument("--four-bits", action="store_true", help="linear layers in NF4, by bitsandbytes")
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


def describe_settings(arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """What was measured."""
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
    report["allocation_seconds"] = statistics.median(allocation_seconds(case, batches[:1], arguments.repeats))
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

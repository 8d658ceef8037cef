"""The timings of `cost.py`: methods in interleaved rounds, the parts of a calibration, and the physical limit."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from cost_methods import (
    CALIBRATION,
    EVA,
    METHODS,
    REFERENCE,
    Batch,
    Case,
    Run,
    prepare_eva,
    prepare_frozen,
    synchronize,
    timed_squared_norms,
    tiny_batches,
)
from cost_shapes import pass_operations


@dataclass
class Row:
    """The measurements of one method.

    Attributes:
        method: Key of the method.
        label: Name of the method in the table.
        forward_passes: For EVA, the number of batches until convergence, for each run.
        seconds: Seconds of each run over all batches.
        ratios: Time of each run divided by that of plain LoRA.
        ratio: The ratio in the table: the median of `ratios`, or EVA's ratio to the mean of the two runs next to it.
        extra_peak_mib: Peak memory beyond that of the loaded model, in MiB.
        extra_peak_ratio: `extra_peak_mib` divided by that of plain LoRA.
        memory_source: How the peak was measured.
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
    """Median seconds of the parts of a calibration over all batches.

    Attributes:
        calibration: The whole calibration, measured with a clock around every norm.
        frozen_passes: Forward and backward passes of the frozen model without hooks.
        squared_norms: All calls of `squared_norms`.
        other: The remainder: hooks, saved inputs, running sums.
    """

    calibration: float
    frozen_passes: float
    squared_norms: float
    other: float


def timed(run: Run, device: torch.device) -> float:
    """Seconds of a run. Garbage of earlier runs is collected before the clock starts."""
    gc.collect()
    synchronize(device)
    start = perf_counter()
    run()
    synchronize(device)
    return perf_counter() - start


def time_method(method: str, case: Case, batches: list[Batch], device: torch.device) -> float:
    """Build a run of a method, and time it."""
    return timed(METHODS[method].prepare(case, batches), device)


def time_rounds(
    methods: Sequence[str], case: Case, batches: list[Batch], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Time the methods in turn. Each round starts with a different method."""
    for method in methods:
        # A GPU selects its kernels by the shapes of the tensors, so it is warmed up with whole batches.
        time_method(method, case, tiny_batches(batches) if device.type == "cpu" else batches, device)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(repeats):
        first = number % len(methods)
        for method in (*methods[first:], *methods[:first]):
            seconds[method].append(time_method(method, case, batches, device))
        latest = ", ".join(f"{method} {times[-1]:.2f} s" for method, times in seconds.items())
        print_progress(f"round {number + 1} of {repeats}: {latest}")
    return seconds


def time_eva(case: Case, batches: list[Batch], device: torch.device, repeats: int) -> Row:
    """Time EVA `repeats` times, each between two runs of plain LoRA."""
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
        print_progress(f"EVA {number + 1} of {repeats}: lora {before:.2f} s, eva {eva:.2f} s, lora {after:.2f} s")
    row.ratio = statistics.median(mean_ratios)
    return row


def time_rows(arguments: argparse.Namespace, case: Case, batches: list[Batch], device: torch.device) -> list[Row]:
    """Time all methods, in the order of the table."""
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
    """Time the parts of the calibration, which are measured in turn."""
    whole, passes, norms = [], [], []
    for _ in range(repeats):
        passes.append(timed(prepare_frozen(case, batches), device))
        with timed_squared_norms(device) as seconds:
            whole.append(time_method(CALIBRATION, case, batches, device))
        norms.append(sum(seconds))
    calibration, frozen, squared = (statistics.median(times) for times in (whole, passes, norms))
    return Breakdown(calibration, frozen, squared, calibration - frozen - squared)


def physical_limit(case: Case, batch_size: int, length: int, device: torch.device) -> dict[str, float]:
    """Time of the matrix products of one forward and one activation-gradient backward pass, at the measured rate.

    Args:
        case: The model.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        device: Device of the model.

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


def print_progress(message: str) -> None:
    """Print to standard error, so that standard output contains only results."""
    print(message, file=sys.stderr, flush=True)

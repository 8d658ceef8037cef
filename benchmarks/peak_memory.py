"""Peak memory of a block of code: that of the device allocator on CUDA, that of the process on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

MIB = 2**20

ALLOCATOR_ENVIRONMENT = {
    # glibc raises its threshold for `mmap` when large blocks are freed, and keeps freed blocks below the threshold.
    # With fixed thresholds, every freed tensor of more than 64 KiB is returned to the system, so the resident memory
    # follows the live tensors.
    "MALLOC_MMAP_THRESHOLD_": str(64 * 1024),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_MMAP_MAX_": str(2**20),
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
"""Environment variables for measuring the resident memory of a process. Set them before the process starts."""

_SAMPLING_SECONDS = 0.001


@dataclass
class Peak:
    """Result of a measurement.

    Attributes:
        extra_bytes: Peak inside the block minus the memory in use at its start.
        source: How the peak was measured: `"cuda"`, `"VmHWM"` or `"sampling"`.
    """

    extra_bytes: int = 0
    source: str = ""


@contextmanager
def extra_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block beyond the memory in use at its start.

    On a CPU this is the kernel's high-water mark of the resident memory (VmHWM), which includes every allocation. If
    it cannot be reset, the resident memory is sampled every millisecond. The yielded result is filled in at the end
    of the block.
    """
    if device.type == "cuda":
        measure = _cuda_peak(device)
    elif _reset_high_water_mark():
        measure = _high_water_mark_peak()
    else:
        measure = _sampled_peak()
    with measure as peak:
        yield peak


@contextmanager
def _cuda_peak(device: torch.device) -> Iterator[Peak]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    peak = Peak(source="cuda")
    yield peak
    torch.cuda.synchronize(device)
    peak.extra_bytes = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _high_water_mark_peak() -> Iterator[Peak]:
    peak = Peak(source="VmHWM")
    _reset_high_water_mark()
    before = _high_water_mark()
    yield peak
    peak.extra_bytes = _high_water_mark() - before


def _reset_high_water_mark() -> bool:
    """Set the high-water mark to the current resident memory; `False` if the system does not support or permit it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@contextmanager
def _sampled_peak() -> Iterator[Peak]:
    process, done = psutil.Process(), threading.Event()
    samples = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(_SAMPLING_SECONDS):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    peak = Peak(source="sampling")
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
    peak.extra_bytes = max(samples) - samples[0]

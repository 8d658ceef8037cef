"""Facts about a run of a command: versions, durations, memory, and what the data held."""

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

import torch

from ..runtime.progress import waiting_lines
from .data import CalibrationData
from .tokenization import Examples

_RECORDED_PACKAGES = ("fim-lora", "peft", "transformers", "torch", "datasets")


def recorded_versions() -> dict[str, str]:
    """Versions of Python and of the packages on which a result depends."""
    return {name: version(name) for name in _RECORDED_PACKAGES} | {"python": platform.python_version()}


def dtype_name(model: Any) -> str:
    """The dtype of a model's weights, such as `"float32"`."""
    return str(model.dtype).removeprefix("torch.")


def data_fact(data: CalibrationData) -> str:
    """What the data held, for people to read."""
    columns = ", ".join(f"{role} = {column!r}" for role, column in data.columns.items())
    contents = "text in blocks" if data.is_stream else f"{len(data.rows):,} rows, {columns}"
    return f"{data.name}, split {data.split}: {contents}"


def truncation_fact(examples: Examples, max_length: int) -> str:
    """How many examples were cut, for people to read."""
    return f"{examples.num_truncated} of {len(examples.examples)} examples to {max_length} tokens"


@contextmanager
def timed_loading(seconds: dict[str, float]) -> Iterator[None]:
    """As `timed`, for what shows no progress by itself: downloads, and weights that are read."""
    with timed(seconds, "loading"), waiting_lines("loading"):
        yield


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the duration to the stage, which may have several parts."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def peak_memory(device: torch.device) -> str:
    """Peak memory of the process and of the device, for people to read."""
    peaks = []
    with suppress(ImportError):
        import resource  # does not exist on Windows

        # macOS counts in bytes, other systems in kilobytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        peaks.append(f"{peak / 2**30:.2f} GiB in the process")
    if device.type == "cuda":
        peaks.append(f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}")
    return ", ".join(peaks) or "unknown"

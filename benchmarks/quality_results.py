"""The runs of `quality.py` and their result files: one JSON file for each run, which is never overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from learning_rates import TUNED_BY, tuned_rate


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: Name of the task.
        targets: `"attention"` or `"all-linear"`.
        rank: Rank of uniform LoRA.
        method: Name of the method.
        learning_rate: Peak learning rate of the adapter.
        seed: Seed of all random choices.
        steps: Training steps.
        dtype: Precision of the pretrained model. Trained parameters are in float32.
    """

    task: str
    targets: str
    rank: int
    method: str
    learning_rate: float
    seed: int
    steps: int
    dtype: str = "float32"

    @property
    def file(self) -> Path:
        """Path of the result, relative to the folder of results."""
        method = self.method.replace("/", "_")
        name = f"{method}-lr{self.learning_rate:g}-seed{self.seed}.json"
        precision = "" if self.dtype == "float32" else f"-{self.dtype}"
        return Path(self.task) / f"{self.targets}-r{self.rank}-{self.steps}steps{precision}" / name


class Results:
    """A folder of results, in which missing results are made on demand.

    Attributes:
        folder: The folder.
        make: Makes the result of a run. Its second argument says whether the run only selects a learning rate.
    """

    def __init__(self, folder: Path, make: Callable[[Run, bool], dict[str, Any]]) -> None:
        self.folder, self.make = folder, make

    def get(self, run: Run, *, tuning: bool) -> dict[str, Any]:
        """Read the result of a run. If there is none, make and write it first.

        Args:
            run: The run.
            tuning: Whether the run only serves to select a learning rate.

        Returns:
            The content of the result file.
        """
        path = self.folder / run.file
        if not path.exists():
            content = self.make(run, tuning)
            with suppress(FileExistsError):  # another process was faster
                write(path, content)
        written: dict[str, Any] = json.loads(path.read_text())
        return written

    def known_losses(self, run: Run) -> dict[float, float]:
        """Development loss of each learning rate that has a result; the learning rate of `run` is ignored."""
        file = self.folder / run.file
        pattern = file.name.replace(f"-lr{run.learning_rate:g}-", "-lr*-")
        found = [json.loads(path.read_text()) for path in file.parent.glob(pattern)]
        return {content["run"]["learning_rate"]: content["development"][TUNED_BY] for content in found}

    def tuned(self, run: Run, grid: Sequence[float], extra_rates: int, *, tuning: bool) -> Run:
        """Tune the learning rate of a run, whose own learning rate is ignored.

        Args:
            run: The run.
            grid: The learning rates to start with.
            extra_rates: The largest number of learning rates outside the grid.
            tuning: Whether the runs only serve to select a learning rate.

        Returns:
            The run with its best learning rate.
        """

        def loss_of(rate: float) -> float:
            content = self.get(replace(run, learning_rate=rate), tuning=tuning)
            loss: float = content["development"][TUNED_BY]
            return loss

        return replace(run, learning_rate=tuned_rate(self.known_losses(run), grid, extra_rates, loss_of))


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result atomically. An existing file raises `FileExistsError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content) + "\n")
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink()

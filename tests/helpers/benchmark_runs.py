"""Small settings, invented results, and a maker of results for the tests of the benchmarks."""

import math
from dataclasses import asdict

import torch

import quality_methods
import quality_tasks
from helpers import tiny_models

CALIBRATION_BATCHES = [
    {
        "input_ids": torch.randint(1, tiny_models.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(seed)),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "labels": torch.arange(4) % 3,
    }
    for seed in range(3)
]
TARGET_MODULES = quality_tasks.TASKS["banking77"].targets["all-linear"]
STEPS = 20


def tiny_setting(seed=0):
    return quality_methods.Setting(tiny_models.bert(), TARGET_MODULES, 2, "SEQ_CLS", CALIBRATION_BATCHES, STEPS, seed)


def make_result(method="uniform", rate=1e-3, seed=0, loss=1.0, test_loss=None, task="gsm8k", rank=2, **more):
    split = {"loss": loss, "accuracy": 0.5}
    return {
        "run": {
            "task": task, "targets": "all-linear", "rank": rank, "steps": 40,
            "method": method, "learning_rate": rate, "seed": seed,
        },
        "development": split,
        "test": split | {"loss": loss if test_loss is None else test_loss},
        "curve": [[20, 2.0], [40, 1.0]],
        "adapter_parameters": 100,
        "calibration_seconds": 2.0,
        "training_seconds": 40.0,
        **more,
    }  # fmt: skip


class ResultMaker:
    """Makes results whose loss is the lowest at a given learning rate of each method, and records the runs."""

    best = {"uniform": 2e-3, "fim-rank": 16e-3}  # noqa: RUF012

    def __init__(self):
        self.made = []

    def __call__(self, run, tuning):
        self.made.append((run.method, run.learning_rate, run.seed, tuning))
        loss = abs(math.log(run.learning_rate / self.best[run.method]))
        return make_result(run.method, run.learning_rate, run.seed, loss) | {"run": asdict(run)}

"""How many calibration batches ranks need, and how much a new classifier decides: no training, only scores.

    python benchmarks/convergence.py --data FOLDER --encoder FOLDER --decoder FILE.gguf
    python benchmarks/convergence.py --data FOLDER --tasks gsm8k --repeats 1 --decoder FILE.gguf
    python benchmarks/convergence.py --print    # the table alone

A task that has its file in `results/convergence` is not measured again.

Batches. The exact eFIM of each of 128 batches is measured on its own. Ranks from the first n of 64 are compared with
ranks from the other 64, which they share no example with. So even 64 batches do not agree fully, and the line of 64
says how much of the difference is that of two samples of that size.

Projection. Where examples are longer than 128 tokens, scores are read through a random projection by default; ranks
from 8 batches are compared with those of exact scores from the same batches.

Classifiers. The same 8 batches with new classifiers of several seeds, and with each after a short training of the
classifier alone; ranks of any two are compared.

Two numbers: Spearman's correlation of the scores, and the share of layers whose rank differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from fim_lora import FimConfig, FimScores, RankAllocation
from fim_lora.sketch import MOST_EXACT_POSITIONS
from quality_methods import Setting, fim_scores, with_means
from quality_tasks import (
    DEFAULT_TASKS,
    TASKS,
    Batch,
    Task,
    batches,
    load_model,
    load_splits,
    load_tokenizer,
    training_order,
)
from quality_variants import warm_head

NUMBERS = (1, 2, 4, 8, 16, 32, 64)
DEFAULT_NUMBER = 8
"""Batches of a calibration if nothing else is said."""


def agreement(one: FimScores, other: FimScores, rank: int) -> dict[str, float]:
    """How far two measurements of the same layers agree.

    Args:
        one: Scores.
        other: Scores of the same layers.
        rank: Rank of uniform LoRA.

    Returns:
        `correlation`, Spearman's of the scores; `layers_changed`, the share of layers whose rank differs under a
        parameter budget.
    """
    ranks = [_ranks(scores, rank) for scores in (one, other)]
    changed = [ranks[0][name] != ranks[1][name] for name in one]
    positions = [np.argsort(np.argsort([scores.means[name] for name in one])) for scores in (one, other)]
    return {"correlation": float(np.asarray(np.corrcoef(positions))[0, 1]), "layers_changed": mean(changed)}


def _ranks(scores: FimScores, rank: int) -> dict[str, int]:
    config = LoraConfig(r=rank, init_lora_weights="fim", fim_config=FimConfig(budget="parameters"))
    return RankAllocation.from_scores(scores, config).ranks


def mean_scores(measured: Sequence[FimScores]) -> FimScores:
    """The scores of several batches of equal size together, which are the mean of theirs."""
    means = {name: mean(scores[name].mean for scores in measured) for name in measured[0]}
    return with_means(measured[0], means)


def means_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every column."""
    listed = list(rows)
    return {key: mean(row[key] for row in listed) for key in listed[0]}


class Measurement:
    """A task, its model and its calibration batches."""

    def __init__(self, task: Task, source: str, model: str, rank: int) -> None:
        self.task, self.source_of_model, self.rank = task, model, rank
        self.tokenizer = load_tokenizer(model)
        self.splits = load_splits(task, source, self.tokenizer)

    def batches(self, number: int, seed: int) -> list[Batch]:
        """Calibration batches, which share no example."""
        train = self.splits.train
        order = training_order([len(e.input_ids) for e in train], self.task.batch_size, number, seed)
        chosen = [train[index] for index in order]
        return list(batches(chosen, self.task.batch_size, self.tokenizer.pad_token_id, torch.device("cpu")))

    def setting(self, calibration: list[Batch], head_seed: int) -> Setting:
        """A model with a new classifier."""
        model = load_model(
            self.task, self.source_of_model, self.splits.num_labels, head_seed, torch.device("cpu"), torch.float32
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        targets = self.task.targets["all-linear"]
        task_type = "CAUSAL_LM" if self.task.causal else "SEQ_CLS"
        return Setting(model, targets, self.rank, task_type, calibration, 1, head_seed)

    def by_number(self, repeats: int) -> dict[int, dict[str, float]]:
        """Agreement of n batches with 64 others, averaged over repeats of other batches and classifiers."""
        rows: dict[int, list[dict[str, float]]] = {number: [] for number in NUMBERS}
        most = NUMBERS[-1]
        for seed in range(repeats):
            calibration = self.batches(2 * most, seed)
            setting = self.setting(calibration, seed)
            # Exact, because a projection of its own for every batch belongs to a calibration over all of them.
            each = [fim_scores(replace(setting, calibration=[batch]), exact=True) for batch in calibration]
            others = mean_scores(each[most:])
            for number in NUMBERS:
                rows[number].append(agreement(mean_scores(each[:number]), others, self.rank))
        return {number: means_of(of_number) for number, of_number in rows.items()}

    def by_projection(self, repeats: int) -> dict[str, float]:
        """Agreement of scores as they are read by default with exact ones, of the same batches."""
        rows = []
        for seed in range(repeats):
            setting = self.setting(self.batches(DEFAULT_NUMBER, seed), seed)
            rows.append(agreement(fim_scores(setting), fim_scores(setting, exact=True), self.rank))
        return means_of(rows)

    def by_head(self, heads: int) -> dict[str, dict[str, float]]:
        """Agreement between classifiers, before and after their warm-up."""
        calibration = self.batches(DEFAULT_NUMBER, 0)
        cold, warm = [], []
        for seed in range(heads):
            setting = self.setting(calibration, seed)
            cold.append(fim_scores(setting))
            with warm_head(setting):
                warm.append(fim_scores(setting))
        pairs = {
            "two new classifiers": itertools.combinations(cold, 2),
            "two warm classifiers": itertools.combinations(warm, 2),
            "a classifier before and after its warm-up": zip(cold, warm, strict=True),
        }
        return {name: means_of(agreement(*pair, self.rank) for pair in of_name) for name, of_name in pairs.items()}


def measured(measurement: Measurement, repeats: int, heads: int) -> dict[str, Any]:
    """The content of a task's file.

    Args:
        measurement: The task.
        repeats: Samples of batches.
        heads: Classifiers, where the task has one.

    Returns:
        JSON types.
    """
    task = measurement.task
    return {
        "task": task.name,
        "rank": measurement.rank,
        "batch_size": task.batch_size,
        "repeats": repeats,
        "batches": measurement.by_number(repeats),
        "projection": measurement.by_projection(repeats) if task.max_length > MOST_EXACT_POSITIONS else None,
        "heads": {} if task.causal else measurement.by_head(heads),
    }


def as_markdown(reports: Iterable[Mapping[str, Any]]) -> str:
    """The table."""
    lines = ["| task | compared | Spearman's correlation | layers whose rank differs |", "| --- | --- | ---: | ---: |"]
    for report in reports:
        rows = {f"{number} batches with 64 others": row for number, row in report["batches"].items()}
        if report["projection"] is not None:
            rows[f"{DEFAULT_NUMBER} batches through the projection with the same exactly"] = report["projection"]
        rows |= report["heads"]
        for name, row in rows.items():
            lines.append(f"| {report['task']} | {name} | {row['correlation']:.3f} | {row['layers_changed']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as for quality.py")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
    parser.add_argument("--decoder", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id, folder or GGUF file")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=DEFAULT_TASKS)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="samples of batches (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="classifiers (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "convergence")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.print and options.data is None:
        parser.error("give --data, or --print for the table of what there is")
    files = {name: options.results / f"{name}.json" for name in options.tasks}
    for name, file in files.items():
        if options.print or file.exists():
            continue
        model = options.decoder if TASKS[name].causal else options.encoder
        report = measured(Measurement(TASKS[name], options.data, model, options.rank), options.repeats, options.heads)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(as_markdown(json.loads(file.read_text()) for file in files.values() if file.exists()))


if __name__ == "__main__":
    main()

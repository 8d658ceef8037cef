"""Measure how many calibration batches the ranks need, and how much they depend on a new classifier, without training.

    python benchmarks/convergence.py --data FOLDER --encoder FOLDER --decoder FILE.gguf
    python benchmarks/convergence.py --data FOLDER --tasks gsm8k --repeats 1 --decoder FILE.gguf
    python benchmarks/convergence.py --print    # print the table only

A task that has a file in `results/convergence` is not measured again.

Batches. The exact eFIM of each of 128 batches is measured separately. Ranks from the first n of 64 batches are
compared with ranks from the other 64, which share no example with them. Even 64 batches therefore do not agree fully:
the row of 64 batches shows the difference between two samples of that size.

Projection. By default, examples longer than 128 tokens are scored through a random projection. Ranks from 8 batches
are compared with ranks from exact scores of the same batches.

Classifiers. The same 8 batches are scored with new classifiers of several seeds, before and after a short training of
the classifier alone. The ranks of each pair are compared.

Every comparison gives two numbers: Spearman's correlation of the scores, and the share of layers whose rank differs.
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
from fim_lora.fisher.gradients.sketch import MAX_EXACT_POSITIONS
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
"""Default number of batches of a calibration."""


def agreement(one: FimScores, other: FimScores, rank: int) -> dict[str, float]:
    """Agreement of two measurements of the same layers.

    Args:
        one: Scores.
        other: Scores of the same layers.
        rank: Rank of uniform LoRA.

    Returns:
        `correlation`: Spearman's correlation of the scores. `layers_changed`: share of layers whose rank differs under
        a parameter budget.
    """
    lora_ranks = [_ranks(scores, rank) for scores in (one, other)]
    changed = [lora_ranks[0][name] != lora_ranks[1][name] for name in one]
    order_ranks = [np.argsort(np.argsort([scores.means[name] for name in one])) for scores in (one, other)]
    return {"correlation": float(np.asarray(np.corrcoef(order_ranks))[0, 1]), "layers_changed": mean(changed)}


def _ranks(scores: FimScores, rank: int) -> dict[str, int]:
    config = LoraConfig(r=rank, init_lora_weights="fim", fim_config=FimConfig(score="mean", budget="parameters"))
    return RankAllocation.from_scores(scores, config).ranks


def mean_scores(measured: Sequence[FimScores]) -> FimScores:
    """The scores of several batches of equal size: the mean over the batches."""
    means = {name: mean(scores[name].mean for scores in measured) for name in measured[0]}
    return with_means(measured[0], means)


def column_means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each key over rows with the same keys."""
    listed = list(rows)
    return {key: mean(row[key] for row in listed) for key in listed[0]}


class Measurement:
    """A task, its model and its calibration batches."""

    def __init__(self, task: Task, source: str, model: str, rank: int) -> None:
        self.task, self.source_of_model, self.rank = task, model, rank
        self.tokenizer = load_tokenizer(model)
        self.splits = load_splits(task, source, self.tokenizer)

    def batches(self, number: int, seed: int) -> list[Batch]:
        """Calibration batches that share no example."""
        train = self.splits.train
        order = training_order([len(example.input_ids) for example in train], self.task.batch_size, number, seed)
        chosen = [train[index] for index in order]
        return list(batches(chosen, self.task.batch_size, self.tokenizer.pad_token_id, torch.device("cpu")))

    def setting(self, calibration: list[Batch], head_seed: int) -> Setting:
        """A model whose new classifier depends on `head_seed`, with its calibration batches."""
        model = load_model(
            self.task, self.source_of_model, self.splits.num_labels, head_seed, torch.device("cpu"), torch.float32
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        targets = self.task.targets["all-linear"]
        task_type = "CAUSAL_LM" if self.task.causal else "SEQ_CLS"
        return Setting(model, targets, self.rank, task_type, calibration, 1, head_seed)

    def by_number(self, repeats: int) -> dict[int, dict[str, float]]:
        """Agreement of n batches with 64 other batches, averaged over repeats with new batches and classifiers."""
        rows: dict[int, list[dict[str, float]]] = {number: [] for number in NUMBERS}
        most = NUMBERS[-1]
        for seed in range(repeats):
            calibration = self.batches(2 * most, seed)
            setting = self.setting(calibration, seed)
            # The scores are exact, because a calibration over several batches uses a different projection for each of
            # them, and calibrations of single batches do not.
            each = [fim_scores(replace(setting, calibration=[batch]), exact=True) for batch in calibration]
            others = mean_scores(each[most:])
            for number in NUMBERS:
                rows[number].append(agreement(mean_scores(each[:number]), others, self.rank))
        return {number: column_means(agreements) for number, agreements in rows.items()}

    def by_projection(self, repeats: int) -> dict[str, float]:
        """Agreement of scores by default with exact scores of the same batches."""
        rows = []
        for seed in range(repeats):
            setting = self.setting(self.batches(DEFAULT_NUMBER, seed), seed)
            rows.append(agreement(fim_scores(setting), fim_scores(setting, exact=True), self.rank))
        return column_means(rows)

    def by_head(self, heads: int) -> dict[str, dict[str, float]]:
        """Agreement between classifiers, before and after the warm-up."""
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
        return {
            name: column_means(agreement(*pair, self.rank) for pair in named_pairs)
            for name, named_pairs in pairs.items()
        }


def measured(measurement: Measurement, repeats: int, heads: int) -> dict[str, Any]:
    """Measure everything for one task, as JSON types.

    Args:
        measurement: The task, its model and its batches.
        repeats: Number of samples of batches.
        heads: Number of classifiers, if the task has a classifier.

    Returns:
        The content of the result file.
    """
    task = measurement.task
    return {
        "task": task.name,
        "rank": measurement.rank,
        "batch_size": task.batch_size,
        "repeats": repeats,
        "batches": measurement.by_number(repeats),
        "projection": measurement.by_projection(repeats) if task.max_length > MAX_EXACT_POSITIONS else None,
        "heads": {} if task.causal else measurement.by_head(heads),
    }


def as_markdown(reports: Iterable[Mapping[str, Any]]) -> str:
    """Format the reports as a Markdown table."""
    lines = ["| task | compared | Spearman's correlation | layers whose rank differs |", "| --- | --- | ---: | ---: |"]
    for report in reports:
        rows = {
            f"{number} {'batch' if int(number) == 1 else 'batches'} vs. 64 other batches": row
            for number, row in report["batches"].items()
        }
        if report["projection"] is not None:
            rows[f"{DEFAULT_NUMBER} batches: projection vs. exact scores"] = report["projection"]
        rows |= report["heads"]
        for name, row in rows.items():
            lines.append(f"| {report['task']} | {name} | {row['correlation']:.3f} | {row['layers_changed']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the tasks that have no result and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the files of the tasks, or 'hub', as for quality.py")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id or folder")
    parser.add_argument("--decoder", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id, folder or GGUF file")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=DEFAULT_TASKS)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="number of samples of batches (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="number of classifiers (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "convergence")
    parser.add_argument("--print", action="store_true", help="print the table only")
    options = parser.parse_args()
    if not options.print and options.data is None:
        parser.error("pass --data to measure, or --print to print the table of the existing results")
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

"""Methods that ask how many ranks a layer needs, and not only how much it matters, before the training.

All have a parameter budget and at most as many parameters as uniform LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fim_lora import FimScores, compress_lora, get_lora_spectrum
from quality_methods import Method, Setting, by_scores, fim_scores, with_means, with_ranks
from quality_tasks import Batch
from quality_variants import batch_gradients, proposed_allocation

SKETCH_SIZE = 16
"""Rows and columns of a sketched gradient."""

PROBE_ROUNDS = 4
"""Passes of the probe's training over the calibration batches."""

_WIDE = 4
_PROBE_LEARNING_RATE, _PROBE_HEAD_LEARNING_RATE = 1e-3, 1e-2


# --- Value per parameter ------------------------------------------------------------------------------------------


def _per_parameter(score_exponent: float) -> Method:
    """Score by the sum of the eFIM per parameter of a rank: the optimum if the value of a layer grows as log r."""

    def adapter(setting: Setting) -> Any:
        scores = fim_scores(setting)
        values = {name: score.norm**2 / scores.parameters_per_rank[name] for name, score in scores.items()}
        return by_scores(setting, with_means(scores, values), budget="parameters", score_exponent=score_exponent)

    return adapter


# --- Size times spread --------------------------------------------------------------------------------------------


def spread(second_moment: Tensor) -> float:
    """Effective number of directions of a second moment (k × k): `(tr M)² / tr(M²)`, between 1 and k; 0 if M = 0."""
    total = second_moment.square().sum()
    return float(second_moment.trace().square() / total) if total > 0 else 0.0


def sketched_moments(setting: Setting, names: list[str]) -> dict[str, Tensor]:
    """For each layer `Σ_t S_t S_tᵀ` (k × k) of the sketched gradients `S_t = P G_t Q` of single examples.

    P (k × d_out) and Q (d_in × k) have normal random entries, which depend on the seed of the setting.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    sides: dict[str, tuple[Tensor, Tensor]] = {}
    moments = dict.fromkeys(names, torch.zeros(SKETCH_SIZE, SKETCH_SIZE))
    for gradients in batch_gradients(replace(setting, calibration=list(_examples(setting.calibration))), names):
        for name, gradient in gradients.items():
            rows, columns = gradient.shape
            if name not in sides:
                sides[name] = (
                    torch.randn(SKETCH_SIZE, rows, generator=generator),
                    torch.randn(columns, SKETCH_SIZE, generator=generator),
                )
            left, right = sides[name]
            sketch = left @ gradient.cpu() @ right
            moments[name] = moments[name] + sketch @ sketch.T
    return moments


def _examples(batches: list[Batch]) -> Iterator[Batch]:
    """The batches as batches of one example."""
    for batch in batches:
        for index in range(len(batch["input_ids"])):
            yield {name: tensor[index : index + 1] for name, tensor in batch.items()}


def _size_times_spread(setting: Setting) -> Any:
    """Score by the norm of the gradient times the effective number of its directions."""
    scores = fim_scores(setting)
    moments = sketched_moments(setting, list(scores))
    values = {name: scores.norms[name] * spread(moments[name]) for name in scores}
    return by_scores(setting, with_means(scores, values), budget="parameters")


# --- A probe ------------------------------------------------------------------------------------------------------


def probed_ranks(setting: Setting) -> dict[str, int]:
    """Ranks that a short training of a wide adapter on the calibration batches would keep. The model is not changed.

    A copy of the model gets an adapter with four times the rank. It is trained for a few rounds, and its Fisher
    spectrum on the same batches is cut to the parameters of uniform LoRA.

    Returns:
        Layer name to rank, which may be 0.
    """
    wide = replace(setting, model=copy.deepcopy(setting.model), rank=_WIDE * setting.rank)
    model = wide.adapted(wide.config())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = [parameter for name, parameter in trained.items() if "lora_" in name]
    head = [parameter for name, parameter in trained.items() if "lora_" not in name]
    groups = [{"params": adapter}] + ([{"params": head, "lr": _PROBE_HEAD_LEARNING_RATE}] if head else [])
    optimizer = torch.optim.AdamW(groups, lr=_PROBE_LEARNING_RATE, weight_decay=0.0)
    for batch in setting.calibration * PROBE_ROUNDS:
        setting.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    num_batches = len(setting.calibration)
    spectrum = get_lora_spectrum(model, setting.calibration, num_batches=num_batches, show_progress_bar=False)
    return dict(compress_lora(model, spectrum, r=setting.rank).ranks)


def _probe(setting: Setting) -> Any:
    """A fresh adapter with the ranks of the probe, at least 1, within uniform LoRA's parameters."""
    allocation, config = proposed_allocation(setting)
    ranks = within(probed_ranks(setting), allocation.scores, setting.rank)
    return setting.adapted(with_ranks(allocation, ranks).to_lora_config(config))


def within(ranks: dict[str, int], scores: FimScores, rank: int) -> dict[str, int]:
    """Give every layer a rank of at least 1, and take ranks from the largest until all fit a uniform `rank`."""
    costs = scores.parameters_per_rank
    fitted = {name: max(1, ranks[name]) for name in scores}
    while sum(fitted[name] * costs[name] for name in fitted) > rank * sum(costs.values()):
        fitted[max(fitted, key=lambda name: fitted[name])] -= 1
    return fitted


NEEDS: dict[str, Method] = {
    "fim-per-parameter": _per_parameter(1.0),
    "fim-per-parameter-1/2": _per_parameter(0.5),
    "fim-spread": _size_times_spread,
    "fim-probe": _probe,
}
"""The methods by name."""

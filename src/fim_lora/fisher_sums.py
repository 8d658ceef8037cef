"""`FisherSums`: what is known of the eFIM so far, of one process or of several together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .layer_types import TargetLayer
from .running_moments import RunningMoments
from .scores import FimScores, LayerScore

NO_BATCH_SEEN = (
    "No calibration batch was seen: call `model(**batch).loss.backward()` on some batches first, or pass `dataloader` "
    "or `fim_scores`."
)
CAUSES_OF_NO_GRADIENT = (
    "Usual causes: the batches have no labels; the loss is detached, or was computed without gradients "
    "(`torch.no_grad`); all labels are masked (-100); the target layers do not take part in the loss; or reentrant "
    "gradient checkpointing cuts the graph because no input requires a gradient (pass `use_reentrant=False`, or "
    "call `model.enable_input_require_grads()`)."
)


@dataclass
class FisherSums:
    """Running sums over calibration examples: three numbers a layer.

    Attributes:
        moments: Layer name to the moments of `‖G_t‖²_F`.
        num_batches: Batches seen.
        num_skipped_batches: Batches left out, because the loss or a gradient was not finite.
        reached: Layers that took part in a loss.
        unattributed: Layers whose rows belonged to no example in some batch.
        sketched: Layers that were read through a random projection in some batch.
    """

    moments: dict[str, RunningMoments]
    num_batches: int = 0
    num_skipped_batches: int = 0
    reached: set[str] = field(default_factory=set)
    unattributed: set[str] = field(default_factory=set)
    sketched: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, names: Sequence[str]) -> FisherSums:
        """Nothing seen yet.

        Args:
            names: Names of the layers.

        Returns:
            The sums.
        """
        return cls({name: RunningMoments() for name in names})

    @classmethod
    def merged(cls, several: Sequence[FisherSums]) -> FisherSums:
        """The sums over the examples of all of them, as if one had seen them all.

        Args:
            several: Sums over the same layers; they stay as they are.

        Returns:
            New sums.

        Raises:
            RuntimeError: If the layers differ.
        """
        first = several[0]
        for process, other in enumerate(several):
            different = sorted(set(first.moments) ^ set(other.moments))
            if different:
                raise RuntimeError(
                    f"Process {process} calibrates other layers than process 0, for example {different[0]!r}: every "
                    "process needs the same model and the same config. Pipeline parallelism is not supported."
                )
        return cls(
            {name: RunningMoments.merged(sums.moments[name] for sums in several) for name in first.moments},
            sum(sums.num_batches for sums in several),
            sum(sums.num_skipped_batches for sums in several),
            set().union(*(sums.reached for sums in several)),
            set().union(*(sums.unattributed for sums in several)),
            set().union(*(sums.sketched for sums in several)),
        )

    def add(self, norms: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]], batch_size: int) -> None:
        """Take in a batch.

        Args:
            norms: Layer name to `‖G_t‖²_F` (B), or to its mean over the examples (1) where rows belong to none; a
                layer that is not in it had a gradient of zero.
            batch_size: Examples, B.
        """
        self.reached.update(norms)
        zeros = np.zeros(batch_size)
        for name, moments in self.moments.items():
            values = norms.get(name, zeros)
            # Every batch weighs as much as its examples, also where it has one value for all of them.
            moments.add(values, batch_size / len(values))

    def scores(self, layers: Mapping[str, TargetLayer]) -> FimScores:
        """The scores, with warnings of what the user can act on.

        Args:
            layers: Layer name to target layer.

        Returns:
            Score of every layer.

        Raises:
            RuntimeError: If no batch was seen, none had finite gradients, or every score is zero.
        """
        if self.num_batches == 0:
            raise RuntimeError(NO_BATCH_SEEN)
        if self.num_batches == self.num_skipped_batches:
            raise RuntimeError(
                f"All {self.num_batches} calibration batches had a loss or gradients that are not finite: calibrate "
                "in bfloat16 or float32, scale the loss down, or look for NaN and for batches without labels in the "
                "data."
            )
        scores = {name: self._score(name, layer) for name, layer in layers.items()}
        if all(score.mean == 0 for score in scores.values()):
            raise RuntimeError(f"The eFIM of every layer is exactly zero. {CAUSES_OF_NO_GRADIENT}")
        self._warn(layers)
        return FimScores(scores, self.num_batches, self.num_skipped_batches)

    def _score(self, name: str, layer: TargetLayer) -> LayerScore:
        moments, weight = self.moments[name], layer.weight
        error = moments.standard_error
        return LayerScore(
            mean=moments.mean / weight.entries,
            standard_error=None if error is None else error / weight.entries,
            num_examples=moments.count,
            shape=(weight.d_out, weight.d_in),
            parameters_per_rank=weight.parameters_per_rank,
            rank_step=weight.rank_step,
            exact=name not in self.sketched,
        )

    def _warn(self, layers: Mapping[str, TargetLayer]) -> None:
        if self.num_skipped_batches:
            warnings.warn(
                f"{self.num_skipped_batches} of {self.num_batches} calibration batches had a loss or gradients that "
                "are not finite, and were left out: calibrate in bfloat16 or float32, and leave out batches without "
                "labels, to use them all.",
                stacklevel=5,
            )
        if self.unattributed:
            warnings.warn(
                f"The inputs of {len(self.unattributed)} layers could not be attributed to examples, so their "
                "batches count as one example each, and their scores are approximate: "
                f"{sorted(self.unattributed)}. Calibrate with batches of one example to have them exact.",
                stacklevel=5,
            )
        unreached = [name for name in layers if name not in self.reached]
        if unreached:
            warnings.warn(
                f"{len(unreached)} target layers took no part in the loss of any calibration batch and score "
                f"zero: {unreached}. If they stay out of it, leave them out of `target_modules`.",
                stacklevel=5,
            )

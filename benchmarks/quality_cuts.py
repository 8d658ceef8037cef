"""Methods that begin with a wide adapter and cut it once or several times during the training.

They cut by the code of `FimCompressionCallback`, from the passes of the training itself. The last cut leaves at most
the parameters of uniform LoRA.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from fim_lora import LoraSpectrum, compress_lora, get_lora_spectrum
from fim_lora.config import Score
from fim_lora.trainer.wide_phase import WidePhase, WideSettings, step_of_share
from quality_methods import Setting, by_scores, fim_scores
from quality_results import Run
from quality_tasks import Batch

NUM_BATCHES = 8
"""Batches before a cut that give the spectrum, as many as calibration batches of the other methods."""


@dataclass(frozen=True)
class Cut:
    """A method that begins with a wide adapter and cuts it during the training.

    Attributes:
        factor: The first rank is this many times the rank of uniform LoRA.
        shares: Shares of the steps after which the adapter is cut. The ranks before and between the cuts are in
            geometric progression.
        rate: Power of `r / R` by which the learning rate of an adapter of rank R is multiplied.
        fresh_optimizer: Whether the optimizer loses its state of the adapter at a cut.
        criterion: `"fim"`, `"fim-with-gains"` (by `get_lora_spectrum` on the last batches, which takes passes of its
            own), `"norm"` (squared singular values per parameter, without data) or `"random"`.
        ranks_by: The score by which the wide adapter has FIM ranks, with a parameter budget; `None` for uniform ranks.
        rows_of_a: Whether the rows of A keep their mean norm at the cut and B takes the rest, instead of both getting
            the same norm.
    """

    factor: int = 4
    shares: tuple[float, ...] = (0.2,)
    rate: float = 1.0
    fresh_optimizer: bool = False
    criterion: str = "fim"
    ranks_by: Score | None = None
    rows_of_a: bool = False

    def __call__(self, setting: Setting) -> Any:
        """The model with the wide adapter."""
        wide = replace(setting, rank=self.factor * setting.rank)
        if self.ranks_by is None:
            return wide.adapted(wide.config())
        return by_scores(wide, fim_scores(setting), score=self.ranks_by, budget="parameters")

    def phases(self, rank: int, steps: int) -> list[WideSettings]:
        """The phases before each cut, for uniform LoRA of this rank and this number of steps."""
        phases: list[WideSettings] = []
        for index, share in enumerate(self.shares):
            present, after = (rank * self.factor ** (1 - done / len(self.shares)) for done in (index, index + 1))
            start, cut_step = phases[-1].cut_step if phases else 1, step_of_share(share, steps)
            first = max(cut_step - NUM_BATCHES, start)
            scale = (rank / present) ** self.rate
            phases.append(WideSettings("default", round(after), scale, first, cut_step, NUM_BATCHES))
        return phases


class TrainingEvents:
    """What a method does during a training: by default nothing. It is called as a trainer calls its callbacks."""

    def begin_step(self, step: int, batch: Batch) -> None:
        """The passes of a step begin. Steps are counted from 0."""

    def before_optimizer(self) -> None:
        """The optimizer is about to step."""

    def end_step(self, step: int) -> None:
        """The optimizer has taken this step, and the schedule has not."""


class CutTraining(TrainingEvents):
    """The cuts of one training.

    Args:
        cut: What to do.
        model: The model with the wide adapter.
        optimizer: Its optimizer.
        rank: Rank of uniform LoRA.
        steps: Steps of the training.
        seed: Seed of random components.
    """

    def __init__(self, cut: Cut, model: Any, optimizer: Any, rank: int, steps: int, seed: int) -> None:
        self._cut, self._model, self._optimizer, self._seed = cut, model, optimizer, seed
        self._phases = cut.phases(rank, steps)
        self._batches: deque[Batch] = deque(maxlen=NUM_BATCHES)
        self._phase = self._next_phase()

    def _next_phase(self) -> WidePhase | None:
        return WidePhase(self._model, self._optimizer, self._phases.pop(0)) if self._phases else None

    def begin_step(self, step: int, batch: Batch) -> None:
        """Record the passes of the last steps before a cut."""
        if self._phase is not None:
            self._phase.begin_step(step)
            self._batches.append(batch)

    def before_optimizer(self) -> None:
        """Remember the weights that the optimizer is about to change."""
        if self._phase is not None:
            self._phase.before_update()

    def end_step(self, step: int) -> None:
        """Scale the update, and cut when it is time."""
        if self._phase is None:
            return
        self._phase.after_update()
        if step + 1 < self._phase.settings.cut_step:
            return
        norms = _mean_norms_of_a(self._model) if self._cut.rows_of_a else {}
        if self._cut.criterion == "fim":
            self._phase.cut()
        else:
            self._phase.stop()
            compress_lora(self._model, self._spectrum(), r=self._phase.settings.r, optimizer=self._optimizer)
        if self._cut.rows_of_a:
            _rescale(self._model, self._optimizer, norms)
        if self._cut.fresh_optimizer:
            self._forget()
        self._phase = self._next_phase()

    def _spectrum(self) -> LoraSpectrum:
        if self._cut.criterion == "fim-with-gains":
            return get_lora_spectrum(self._model, self._batches, num_batches=NUM_BATCHES, show_progress_bar=False)
        spectrum = get_lora_spectrum(self._model, None)
        return _shuffled(spectrum, self._seed) if self._cut.criterion == "random" else spectrum

    def _forget(self) -> None:
        """Drop the state of the adapter, which is in the first group."""
        for parameter in self._optimizer.param_groups[0]["params"]:
            self._optimizer.state.pop(parameter, None)


def _mean_norms_of_a(model: Any) -> dict[str, float]:
    """Module name to the mean norm of the rows of its A."""
    return {
        name: float(module.lora_A["default"].weight.detach().norm(dim=1).mean())
        for name, module in _lora_layers(model)
    }


def _lora_layers(model: Any) -> list[tuple[str, LoraLayer]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    ]


@torch.no_grad()
def _rescale(model: Any, optimizer: Any, norms: dict[str, float]) -> None:
    """Give the rows of A these norms and B the inverse factors; the moments of Adam follow."""
    for name, layer in _lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        factors = norms[name] / a.norm(dim=1)
        for weight, factor in ((a, factors[:, None]), (b, 1 / factors)):
            weight.mul_(factor)
            state = optimizer.state[weight]
            state["exp_avg"].div_(factor)
            state["exp_avg_sq"].div_(factor**2)


class SlowStart(TrainingEvents):
    """A control for `CutTraining`: uniform LoRA with the learning rate of a wide phase, and no cut at its end.

    Args:
        optimizer: The optimizer, whose first group is the adapter.
        end: The number of steps with the smaller rate.
        scale: Factor on the learning rate in these.
    """

    def __init__(self, optimizer: Any, end: int, scale: float) -> None:
        self._adapter, self._end, self._scale = optimizer.param_groups[0], end, scale
        self._step, self._rate = 0, 0.0

    def begin_step(self, step: int, batch: Batch) -> None:
        """Note the step."""
        self._step = step

    def before_optimizer(self) -> None:
        """Scale the learning rate."""
        self._rate = self._adapter["lr"]
        if self._step < self._end:
            self._adapter["lr"] = self._rate * self._scale

    def end_step(self, step: int) -> None:
        """Restore the learning rate."""
        self._adapter["lr"] = self._rate


def _shuffled(spectrum: LoraSpectrum, seed: int) -> LoraSpectrum:
    """The same components with random values per parameter, so that every layer keeps as many on average."""
    generator = np.random.default_rng(seed)
    layers = {}
    for name, layer in spectrum.items():
        values = layer.parameters_per_component * generator.random(layer.num_components)
        layers[name] = replace(layer, squared_norms=values.astype(np.float32))
    return LoraSpectrum(layers)


SLOW_START = "uniform-slow-start"

CUTS: dict[str, Cut] = {
    "cut": Cut(),
    "cut-2x": Cut(factor=2),
    "cut-8x": Cut(factor=8),
    "cut-10%": Cut(shares=(0.1,)),
    "cut-30%": Cut(shares=(0.3,)),
    "cut-50%": Cut(shares=(0.5,)),
    "cut-twice": Cut(shares=(0.1, 0.2)),
    "cut-full-rate": Cut(rate=0.0),
    "cut-root-rate": Cut(rate=0.5),
    "cut-fresh-optimizer": Cut(fresh_optimizer=True),
    "cut-by-norm": Cut(criterion="norm"),
    "cut-random": Cut(criterion="random"),
    "cut-with-gains": Cut(criterion="fim-with-gains"),
    "cut-from-fim-ranks": Cut(ranks_by="mean"),
    "cut-from-norm-ranks": Cut(ranks_by="norm"),
    "cut-rows-of-a": Cut(rows_of_a=True),
}
"""The methods that cut, by name: from four times the rank after 20 % of the steps, or with one change of that."""


def training_events(run: Run, model: Any, optimizer: Any) -> TrainingEvents:
    """What the method of a run does during the training."""
    if run.method == SLOW_START:
        cut = CUTS["cut"]
        return SlowStart(optimizer, cut.phases(run.rank, run.steps)[0].cut_step, 1 / cut.factor)
    if run.method in CUTS:
        return CutTraining(CUTS[run.method], model, optimizer, run.rank, run.steps, run.seed)
    return TrainingEvents()

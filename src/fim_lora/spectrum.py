"""`get_lora_spectrum`: from a trained adapter and batches to what each of its components is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapter.adapted_part import adapted_part
from .adapter.checks import require_active, require_compressible
from .adapter.factors import outermost_wrappers
from .adapter.lora_layers import adapter_layers
from .adapter.pending_config import lora_config_of
from .adapter.plain_adapter import PlainAdapter, plain_adapters
from .adapter.scaled_adapter import scalable_adapter
from .fisher.basis import Basis, reordered, squared_norms
from .fisher.calibration import ForwardFn, calibrate
from .fisher.factors import PATH_SCALE, PathMoments
from .fisher.gates import gains_of, gates_of, measured_basis
from .fisher.layers.components import AdaptedLayer, adapted_layer
from .ranks.compressed import Compression
from .ranks.size_curve import SizeCurve
from .ranks.sizes import SHOWN_SHARES, size_rows
from .ranks.spectrum import LayerSpectrum, Spectrum
from .ranks.truncation import Component, agreement, keep_within, order_of_components, priorities
from .report.html import html_table
from .report.matplotlib_extra import needs_matplotlib
from .runtime.distributed import gather_from_all, run_on_all
from .runtime.wrappers import unwrap_engine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BATCHES = 64
"""Batches that `num_batches=None` reads at most, in each process."""

ENOUGH_AGREEMENT = 0.9
"""Share of the kept parameters in which the ranks by two halves of the data must agree."""

AGREEMENT_SHARES = (1 / 2, 1 / 4)
"""Sizes at which the halves are compared, as shares of the adapter's parameters."""

DAMPING = 1.0
"""Weight of the plain metric beside the measured one; see `damped`, and `benchmarks/compression.py` for the choice."""


class LoraSpectrum(Spectrum):
    """What every component of a trained adapter is worth, from `get_lora_spectrum`; a mapping of layer names.

    `print` shows sizes against the predicted loss, and `plot` draws them. It belongs to the weights that it was
    measured on, and `compress_lora` refuses it for others. `save` and `load` write and read it as JSON.
    """

    def plot(
        self,
        path: str | PathLike[str] | None = None,
        *,
        chosen: Compression | None = None,
        measured: Sequence[tuple[int, float]] = (),
    ) -> Figure:
        """Draw the size of the adapter against the predicted increase of the loss. Notebooks show the result.

        Args:
            path: Where to write the picture, too. Its suffix, such as `.png` or `.svg`, determines the format.
            chosen: The result of `compress_lora`: its size is marked.
            measured: Parameters of an adapter and the measured increase of the loss, for other sizes.

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is not installed.
            OSError: If the file cannot be written.
            ValueError: If `chosen` is of another adapter, or the suffix is not a known format.
        """
        with needs_matplotlib():
            from .report.size_curve import size_curve_figure
        picture = size_curve_figure(SizeCurve.of(self, chosen, measured), chosen)
        if path is not None:
            picture.write(path)
        return picture

    def _repr_html_(self) -> str:
        heading = f"{len(self)} layers, {self.num_parameters:,} parameters, {self.criterion}"
        return html_table(size_rows(self.size_curve((1.0, *SHOWN_SHARES))), heading)


def get_lora_spectrum(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    *,
    adapter_name: str = "default",
    num_batches: int | None = None,
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
) -> LoraSpectrum:
    """What every component of a trained LoRA adapter is worth to the loss, without changing anything.

    The adapter of each layer is divided into the components that are best in the Fisher metric (K-FAC, damped towards
    the plain one). The gradient of a gate on each component gives its saliency, the predicted increase of the loss
    when it is dropped (Optimal Brain Damage). Every second batch runs with a quarter of the adapter's scaling. There
    the mean gradient of the gate gives the component's gain, which deep cuts depend on. `compress_lora` keeps the
    components with the largest sum of gain and saliency for their parameters. The cost is one forward pass and one
    backward pass with respect to activations for each batch.

    Args:
        model: A model with a trained LoRA adapter, or a module that holds such a model as a part. The adapter has to
            be active.
        dataloader: Yields batches, see `initialize_lora_fim_ranks`; usually data like that of the training. `None`
            gives the components of the plain singular value decomposition of `ΔW`, ordered by their squared norm:
            without data, and blind to the loss.
        adapter_name: The adapter.
        num_batches: Batches to use in each process. `None` reads until the ranks by two halves of the batches agree in
            90 % of the kept parameters at half and at a quarter of the size, asked after 4, 8, 16, … batches, but at
            most 64 batches. Half of the batches give the components, saliencies and the prediction, the other half
            the gains. A single batch gives no gains, and the order is that of the geometric mean of saliency and
            squared norm.
        forward_fn: See `initialize_lora_fim_ranks`.
        show_progress_bar: Whether to show a progress bar.

    Returns:
        Layer name, as in the base model, to its components.

    Raises:
        ValueError: If the adapter does not exist, is in several parts of the model, is not an active LoRA adapter,
            still awaits its ranks, is merged, is a variant of LoRA such as DoRA, has scaling 0, or was initialized
            with a change of the base weights; if its weights are shared by two layers, offloaded, flattened by FSDP1,
            not finite, or those of a sharded embedding; if `num_batches` is below 1; if the dataloader is empty or its
            batches give no usable loss; if without data the adapter is untrained.
        RuntimeError: If no batch had finite gradients, every gradient is zero, as for an untrained adapter, or another
            process failed.
        TypeError: If a layer's class is not supported, or the forward pass returns no loss.
    """
    model = unwrap_engine(model)
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, or None, got {num_batches!r}.")
    part = run_on_all(lambda: adapted_part(model, adapter_name))
    layers = run_on_all(lambda: checked_layers(part, adapter_name))
    adapted = adapted_layers(part, layers, adapter_name)
    plain = plain_adapters(layers, adapter_name, with_roots=dataloader is None)
    if dataloader is None:
        spectrum = spectrum_of(adapted, plain, None, adapter_name)
        if not any(layer.squared_norms.any() for layer in spectrum.values()):
            raise ValueError(
                f"Adapter {adapter_name!r} adds zero to every weight, as before its training: train it first."
            )
        return spectrum
    require_active(layers, adapter_name)
    moments = path_moments(model, adapted, plain, dataloader, adapter_name, num_batches, forward_fn, show_progress_bar)
    return spectrum_of(adapted, plain, moments, adapter_name)


def path_moments(
    model: nn.Module,
    adapted: Mapping[str, AdaptedLayer],
    plain: Mapping[str, PlainAdapter],
    dataloader: Iterable[Any],
    adapter_name: str,
    num_batches: int | None = None,
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
) -> PathMoments:
    """The moments behind a spectrum. Every second batch of all processes runs with a part of the adapter's scaling."""
    statistic = PathMoments.for_layers({name: one.shape for name, one in plain.items()})
    with scalable_adapter({name: one.lora for name, one in adapted.items()}, adapter_name) as scale:

        def before_batch(number: int) -> None:
            statistic.is_scaled = number % 2 == 1
            scale(PATH_SCALE if statistic.is_scaled else 1.0)

        return calibrate(
            model,
            adapted,
            statistic,
            dataloader,
            MAX_BATCHES if num_batches is None else num_batches,
            forward_fn,
            show_progress_bar,
            enough=_HalvesAgree(plain, adapted) if num_batches is None else None,
            before_batch=before_batch,
        )


def checked_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The LoRA layers of a trained adapter that can be truncated; raises `ValueError` for others."""
    config = lora_config_of(model, adapter_name)
    layers = adapter_layers(model, adapter_name)
    require_compressible(model, layers, config, adapter_name)
    return layers


def adapted_layers(model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str) -> dict[str, AdaptedLayer]:
    """What to observe of each LoRA layer. Raises `TypeError` if a layer's class is not supported."""
    outermost = outermost_wrappers(model)
    return {name: adapted_layer(name, layer, adapter_name, outermost.get(layer)) for name, layer in layers.items()}


def spectrum_of(
    adapted: Mapping[str, AdaptedLayer],
    plain: Mapping[str, PlainAdapter],
    moments: PathMoments | None,
    adapter_name: str,
) -> LoraSpectrum:
    """The spectrum from moments of all processes, or without data. All processes get that of process 0."""

    def compute() -> LoraSpectrum:
        layers = {name: _layer_spectrum(adapted[name], one, moments) for name, one in plain.items()}
        if moments is None:
            return LoraSpectrum(layers, adapter_name)
        counts = (moments.num_batches, moments.num_skipped_batches, moments.num_examples)
        return LoraSpectrum(layers, adapter_name, *counts, moments.terms_per_example, moments.scaled.num_examples)

    return gather_from_all(compute)[0]


def _layer_spectrum(layer: AdaptedLayer, plain: PlainAdapter, moments: PathMoments | None) -> LayerSpectrum:
    basis, gates, gains = (plain.basis, None, None) if moments is None else _measured(plain, moments, layer.name)
    weight = layer.weight_shape
    return LayerSpectrum(
        shape=(weight.d_out, weight.d_in),
        parameters_per_rank=weight.rank_parameters,
        rank_step=weight.rank_step,
        scaling=plain.scaling,
        fingerprint=plain.fingerprint,
        left=basis.left.astype(np.float32),
        right=basis.right.astype(np.float32),
        gates=None if gates is None else gates.astype(np.float32),
        squared_norms=squared_norms(basis, *plain.metrics).sum(0).astype(np.float32),
        gains=None if gains is None else gains.astype(np.float32),
    )


def _measured(
    plain: PlainAdapter, moments: PathMoments, name: str
) -> tuple[Basis, np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """The basis of a layer with each part's components in order, their gates (N × k) and gains (k)."""
    basis = measured_basis(plain.metrics, moments, name, DAMPING)
    gates, gains = gates_of(basis, moments, name), gains_of(basis, moments, name)
    value = priorities(np.square(gates).mean(0) / 2, squared_norms(basis, *plain.metrics), gains)
    order = np.argsort(-value, axis=1, kind="stable")
    gates = np.take_along_axis(gates, order[None], axis=2).sum(1)
    return reordered(basis, order), gates, None if gains is None else np.take_along_axis(gains, order, axis=1).sum(0)


class _HalvesAgree:
    """Whether the ranks by two halves of the calibration batches agree.

    Both halves order the components of the plain singular value decomposition, which needs no data.
    """

    def __init__(self, plain: Mapping[str, PlainAdapter], layers: Mapping[str, AdaptedLayer]) -> None:
        self._bases = {name: one.basis for name, one in plain.items()}
        weights = {name: layer.weight_shape for name, layer in layers.items()}
        self._costs = {name: weight.rank_parameters * weight.rank_step for name, weight in weights.items()}

    def __call__(self, moments: PathMoments) -> bool:
        if not all((*moments.whole.batch_sizes, *moments.scaled.batch_sizes)):
            return False
        orders = [self._order(moments, half) for half in (0, 1)]
        total = sum(self._costs[component.layer] for component in orders[0])
        for share in AGREEMENT_SHARES:
            kept = [keep_within(order, self._costs, int(share * total)) for order in orders]
            first, second = (Counter(component.layer for component in chosen) for chosen in kept)
            if agreement(first, second, self._costs) < ENOUGH_AGREEMENT:
                return False
        return True

    def _order(self, moments: PathMoments, half: int) -> list[Component]:
        values = {}
        for name, basis in self._bases.items():
            saliencies = np.square(gates_of(basis, moments, name, half).sum(1)).mean(0) / 2
            gains = gains_of(basis, moments, name, half)
            assert gains is not None
            values[name] = priorities(saliencies, np.square(basis.singular_values).sum(0), gains.sum(0)).tolist()
        return order_of_components(values, self._costs)

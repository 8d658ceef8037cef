"""The size curve, a picture: the size of an adapter against the loss that it costs, predicted and measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from ..ranks.compressed import Compression
from ..ranks.sizes import Prediction, format_prediction
from ..ranks.spectrum import Spectrum
from ..ranks.truncation import by_layer, keep_within
from .picture import Picture, literal

# A measured loss: the parameters of the adapter, and the increase of the loss in units of the loss.
Measured = tuple[int, float]

# Lengths in inches.
_WIDTH, _HEIGHT = 6.0, 3.2
_LEFT, _RIGHT, _BOTTOM = 0.8, 0.15, 0.65
_LEGEND_HEIGHT, _PANEL_GAP = 0.3, 0.15
_LINE_HEIGHT, _TITLE_GAP = 0.17, 0.15
_FONT_SIZE, _TITLE_SIZE = 8.0, 11.0

_PREDICTED, _MEASURED, _CHOSEN = "#31688e", "#d95f02", "0.35"

# The curve goes down to this share of the adapter, or further if a measured or chosen size is smaller.
_SMALLEST_SHARE = 1 / 32
_NUM_SIZES = 48


@dataclass(frozen=True)
class _Point:
    """One size: its parameters, the predicted increase of the loss, and the share of the squared norm without it."""

    parameters: int
    prediction: Prediction | None
    dropped_norm: float


def draw_size_curve(
    spectrum: Spectrum,
    path: str | PathLike[str],
    *,
    chosen: Compression | None = None,
    measured: Sequence[Measured] = (),
) -> None:
    """Draw the size of the adapter against the predicted increase of the loss, with a band of its standard error.

    A spectrum without data predicts no loss. Its curve is the share of the squared norm of `ΔW` that is dropped, and
    measured losses have a panel of their own.

    Args:
        spectrum: The spectrum.
        path: The picture. Its suffix, such as `.png`, `.pdf` or `.svg`, determines the format.
        chosen: A compression by this spectrum: its size is marked, and the curve has no rank above its `r_max`.
        measured: Parameters of an adapter and the measured increase of the loss, for other sizes.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If `chosen` has other layers than the spectrum, or if the suffix is not a known format.
    """
    size_curve_figure(spectrum, chosen=chosen, measured=measured).write(path)


def size_curve_figure(
    spectrum: Spectrum, *, chosen: Compression | None = None, measured: Sequence[Measured] = ()
) -> Picture:
    """The figure that `draw_size_curve` writes. Raises `ValueError` if `chosen` has other layers."""
    if chosen is not None and chosen.ranks_before != spectrum.ranks:
        raise ValueError("The compression has other layers or ranks than the spectrum: pass the spectrum of it.")
    if chosen is not None and chosen.loss_increase is not None:
        measured = [*measured, (chosen.num_parameters, chosen.loss_increase)]
    points = _points(spectrum, chosen, measured)
    panels = _panels(spectrum, points, chosen, sorted(measured))
    title = _title(spectrum, chosen)
    top = _LINE_HEIGHT * len(title) + _TITLE_GAP
    panel_height = _LEGEND_HEIGHT + _HEIGHT + _PANEL_GAP
    height = top + len(panels) * panel_height - _PANEL_GAP + _BOTTOM

    picture = Picture(_WIDTH, height)
    for number, draw in enumerate(panels):
        y = top + number * panel_height + _LEGEND_HEIGHT
        axes = picture.axes_at(_LEFT, y, _WIDTH - _LEFT - _RIGHT, _HEIGHT)
        draw(axes)
        _label_sizes(axes, spectrum, points, is_last=number == len(panels) - 1)
    picture.text(_LEFT / _WIDTH, 1, title[0], fontsize=_TITLE_SIZE, va="top")
    for number, line in enumerate(title[1:], start=1):
        y = 1 - (_LINE_HEIGHT * number + 0.06) / height
        picture.text(_LEFT / _WIDTH, y, literal(line), fontsize=_FONT_SIZE, color="0.3", va="top")
    return picture


def _points(spectrum: Spectrum, chosen: Compression | None, measured: Sequence[Measured]) -> list[_Point]:
    """Sizes with equal ratios between them, as far as the numbers of components allow."""
    # `Spectrum.keep` would sort all components again for every size.
    order, costs, names = spectrum.order(), spectrum.costs, list(spectrum)
    maximum = spectrum.max_components(None if chosen is None else chosen.r_max)
    sizes = [parameters for parameters, _ in measured] + ([] if chosen is None else [chosen.num_parameters])
    total = spectrum.num_parameters
    smallest = min([total * _SMALLEST_SHARE, *(size * 0.8 for size in sizes if size > 0)])
    budgets = {int(budget) for budget in np.geomspace(max(smallest, 1), total, _NUM_SIZES)} | {total, *sizes}
    norm = sum(float(layer.squared_norms.sum(dtype=np.float64)) for layer in spectrum.values())
    points: dict[int, _Point] = {}
    for budget in sorted(budgets):
        kept = by_layer(keep_within(order, costs, budget, maximum), names)
        used = spectrum.parameters_of(kept)
        if used > 0:
            kept_norm = sum(
                float(layer.squared_norms[kept[name]].sum(dtype=np.float64)) for name, layer in spectrum.items()
            )
            points[used] = _Point(used, spectrum.predict(kept), 1 - kept_norm / norm if norm > 0 else 0.0)
    return list(points.values())


def _panels(
    spectrum: Spectrum, points: Sequence[_Point], chosen: Compression | None, measured: Sequence[Measured]
) -> list[Callable[[Axes], None]]:
    """One function for each panel, which draws into its axes."""

    def loss(axes: Axes) -> None:
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        if spectrum.with_data:
            _draw_prediction(axes, points)
        if measured:
            parameters, increases = zip(*measured, strict=True)
            axes.plot(parameters, increases, "o", color=_MEASURED, markersize=5, label="measured", zorder=4)
        _finish(axes, "increase of the loss", chosen)

    def norm(axes: Axes) -> None:
        parameters = [point.parameters for point in points]
        axes.plot(parameters, [point.dropped_norm for point in points], color=_PREDICTED, label="without data")
        axes.yaxis.set_major_formatter("{x:.0%}")
        _finish(axes, "dropped share of the squared norm of ΔW", chosen)

    if spectrum.with_data:
        return [loss]
    return [norm, loss] if measured else [norm]


def _draw_prediction(axes: Axes, points: Sequence[_Point]) -> None:
    parameters = np.array([point.parameters for point in points])
    predictions = [point.prediction for point in points if point.prediction is not None]
    increases = np.array([prediction.increase for prediction in predictions])
    errors = np.array([prediction.standard_error or 0.0 for prediction in predictions])
    label = "predicted"
    if errors.any():
        label += ", ± standard error"
        axes.fill_between(parameters, increases - errors, increases + errors, color=_PREDICTED, alpha=0.2, linewidth=0)
    axes.plot(parameters, increases, color=_PREDICTED, label=label)


def _finish(axes: Axes, label: str, chosen: Compression | None) -> None:
    if chosen is not None:
        axes.axvline(chosen.num_parameters, color=_CHOSEN, linewidth=1, linestyle=(0, (4, 3)), label="chosen size")
    axes.set_ylabel(label, fontsize=_FONT_SIZE + 1)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_FONT_SIZE, color="0.6")
    # Above the axes, where nothing is drawn.
    options = {"fontsize": _FONT_SIZE, "frameon": False, "borderpad": 0.0, "borderaxespad": 0.3}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, **options)


def _label_sizes(axes: Axes, spectrum: Spectrum, points: Sequence[_Point], is_last: bool) -> None:
    """Equal steps are equal ratios; each tick has the share of the adapter and the parameters."""
    total = spectrum.num_parameters
    smallest = min(point.parameters for point in points)
    axes.set_xscale("log", base=2)
    axes.set_xlim(smallest / 1.08, total * 1.08)
    powers = [power for power in range(64) if total / 2**power >= smallest / 1.05]
    powers = powers[:: -(-len(powers) // 8)]
    labels = ["1" if power == 0 else f"1/{2**power}" for power in powers]
    labels = [f"{share}\n{_short(total / 2**power)}" for share, power in zip(labels, powers, strict=True)]
    axes.set_xticks([total / 2**power for power in powers], labels if is_last else [""] * len(powers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if is_last:
        axes.set_xlabel("size of the adapter: share and parameters", fontsize=_FONT_SIZE + 1)


def _short(parameters: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= factor:
            return f"{parameters / factor:.3g} {unit}"
    return f"{parameters:.3g}"


def _title(spectrum: Spectrum, chosen: Compression | None) -> list[str]:
    title = [
        "Size of the adapter and increase of the loss" if spectrum.with_data else "Size of the adapter, without data",
        f"{len(spectrum):,} layers, {spectrum.num_parameters:,} parameters, {spectrum.criterion}",
    ]
    if chosen is not None:
        title.append(f"chosen: {chosen.num_parameters:,} parameters ({chosen.share:.1%}), {_losses(chosen)}")
    return title


def _losses(chosen: Compression) -> str:
    increase = chosen.loss_increase
    losses = [] if chosen.predicted is None else [f"predicted {format_prediction(chosen.predicted)}"]
    losses += [] if increase is None else [f"measured {increase:+.2g}"]
    return ", ".join(losses) or "loss unknown"

"""The size curve, a picture: the size of an adapter against the loss that it costs, predicted and measured."""

from collections.abc import Callable, Sequence
from os import PathLike

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from ..ranks.compressed import Compression
from ..ranks.size_curve import SizeCurve
from ..ranks.sizes import SizePoint, format_prediction
from .picture import Picture, literal

# Lengths in inches.
_WIDTH, _HEIGHT = 6.0, 3.2
_LEFT, _RIGHT, _BOTTOM = 0.8, 0.15, 0.65
_LEGEND_HEIGHT, _PANEL_GAP = 0.3, 0.15
_LINE_HEIGHT, _TITLE_GAP = 0.17, 0.15
_FONT_SIZE, _TITLE_SIZE = 8.0, 11.0

_PREDICTED, _MEASURED, _CHOSEN = "#31688e", "#d95f02", "0.35"


def draw_size_curve(curve: SizeCurve, path: str | PathLike[str], chosen: Compression | None = None) -> None:
    """Draw the size of the adapter against the predicted increase of the loss, with a band of its standard error.

    A spectrum without data predicts no loss. Its curve is the share of the squared norm of `ΔW` that is dropped, and
    measured losses have a panel of their own.

    Args:
        curve: The sizes.
        path: The picture. Its suffix, such as `.png`, `.pdf` or `.svg`, determines the format.
        chosen: The compression that the curve was made for: its size is marked.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the suffix is not a known format.
    """
    size_curve_figure(curve, chosen).write(path)


def size_curve_figure(curve: SizeCurve, chosen: Compression | None = None, *, with_title: bool = True) -> Picture:
    """The figure that `draw_size_curve` writes."""
    panels = _panels(curve, chosen)
    title = _title(curve, chosen) if with_title else []
    top = _LINE_HEIGHT * len(title) + _TITLE_GAP
    panel_height = _LEGEND_HEIGHT + _HEIGHT + _PANEL_GAP
    height = top + len(panels) * panel_height - _PANEL_GAP + _BOTTOM

    picture = Picture(_WIDTH, height)
    for number, draw in enumerate(panels):
        y = top + number * panel_height + _LEGEND_HEIGHT
        axes = picture.axes_at(_LEFT, y, _WIDTH - _LEFT - _RIGHT, _HEIGHT)
        draw(axes)
        _label_sizes(axes, curve, is_last=number == len(panels) - 1)
    for number, line in enumerate(title):
        y = 1 - (_LINE_HEIGHT * number + (0.06 if number else 0)) / height
        size, color = (_FONT_SIZE, "0.3") if number else (_TITLE_SIZE, "black")
        picture.text(_LEFT / _WIDTH, y, literal(line), fontsize=size, color=color, va="top")
    return picture


def _panels(curve: SizeCurve, chosen: Compression | None) -> list[Callable[[Axes], None]]:
    """One function for each panel, which draws into its axes."""

    def loss(axes: Axes) -> None:
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        if curve.with_data:
            _draw_prediction(axes, curve.points)
        if curve.measured:
            parameters, increases = zip(*curve.measured, strict=True)
            axes.plot(parameters, increases, "o", color=_MEASURED, markersize=5, label="measured", zorder=4)
        _finish(axes, "increase of the loss", chosen)

    def norm(axes: Axes) -> None:
        parameters = [point.parameters for point in curve.points]
        axes.plot(parameters, [point.dropped_norm for point in curve.points], color=_PREDICTED, label="without data")
        axes.yaxis.set_major_formatter("{x:.0%}")
        _finish(axes, "dropped share of the squared norm of ΔW", chosen)

    if curve.with_data:
        return [loss]
    return [norm, loss] if curve.measured else [norm]


def _draw_prediction(axes: Axes, points: Sequence[SizePoint]) -> None:
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


def _label_sizes(axes: Axes, curve: SizeCurve, is_last: bool) -> None:
    """Equal steps are equal ratios; each tick has the share of the adapter and the parameters."""
    total, smallest = curve.num_parameters, curve.points[0].parameters
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


def _title(curve: SizeCurve, chosen: Compression | None) -> list[str]:
    title = [
        "Size of the adapter and increase of the loss" if curve.with_data else "Size of the adapter, without data",
        f"{len(curve.layers):,} layers, {curve.num_parameters:,} parameters, {curve.criterion}",
    ]
    if chosen is not None:
        title.append(f"chosen: {chosen.num_parameters:,} parameters ({chosen.share:.1%}), {_losses(chosen)}")
    return title


def _losses(chosen: Compression) -> str:
    increase = chosen.loss_increase
    losses = [] if chosen.predicted is None else [f"predicted {format_prediction(chosen.predicted)}"]
    losses += [] if increase is None else [f"measured {increase:+.2g}"]
    return ", ".join(losses) or "loss unknown"

"""`compress_lora`: the story after training, from a trained adapter and its spectrum to a smaller adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapter.adapted_part import adapted_part
from .adapter.checks import require_active, require_unsharded
from .adapter.patterns import write_pattern
from .adapter.pending_config import lora_config_of
from .adapter.plain_adapter import fingerprints
from .adapter.removal import layers_to_keep
from .adapter.resize import require_same_ranks
from .adapter.truncate import CoreMap, config_after_truncation, core_map, truncate_adapter, truncated_weights
from .fisher.calibration import ForwardFn
from .fisher.evaluation import mean_loss
from .ranks.compressed import Compression
from .ranks.truncation import Kept, by_layer, keep_within
from .report.html import html_ranks, html_table
from .report.matplotlib_extra import plot_ranks
from .runtime.distributed import run_on_all
from .runtime.optimizer_state import require_optimizer
from .spectrum import LoraSpectrum, checked_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class LoraCompression(Compression):
    """A `Compression` with PEFT's patterns. Attributes and files are those of `Compression`."""

    @property
    def rank_pattern(self) -> dict[str, int]:
        """`rank_pattern` for PEFT: an entry for each adapted layer whose rank is not the global `r`."""
        return write_pattern({name: rank for name, rank in self.ranks.items() if rank > 0}, self.r)

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """`alpha_pattern` for PEFT: an entry for each adapted layer whose `lora_alpha` is not the global one."""
        alphas = {name: self.alphas[name] for name, rank in self.ranks.items() if rank > 0}
        return write_pattern(alphas, self.lora_alpha)

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw the rank of every layer as a map. Notebooks show the result.

        Args:
            path: Where to write the picture, too. Its suffix, such as `.png` or `.svg`, determines the format.

        Returns:
            The figure. `LoraSpectrum.plot(chosen=...)` draws the size against the loss.

        Raises:
            ImportError: If matplotlib is not installed.
            OSError: If the file cannot be written.
            ValueError: If the table of layers is too large, or the suffix is not a known format.
        """
        return plot_ranks(self, path)

    def _repr_html_(self) -> str:
        return f"{html_table(self.rows(), self.criterion)}\n{html_ranks(self.ranks)}"


def compress_lora(
    model: nn.Module,
    spectrum: LoraSpectrum,
    *,
    keep: float | None = None,
    r: int | None = None,
    max_loss_increase: float | None = None,
    eval_dataloader: Iterable[Any] | None = None,
    r_max: int | None = None,
    optimizer: Any = None,
    serving: bool = False,
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
) -> LoraCompression:
    """Shrink a trained LoRA adapter in place, with a small increase of the loss.

    The components of all layers are kept in the order of their worth per parameter (see `get_lora_spectrum`), as many
    as the size allows. A layer may lose its adapter. What is left is an ordinary LoRA adapter: `save_pretrained`
    writes it, and stock PEFT loads it. Each layer keeps its scaling, and the rows of A and columns of B are balanced,
    so training can go on. Dtypes, devices, `requires_grad`, dropout, biases, `modules_to_save` and other adapters do
    not change, and the same `nn.Parameter` objects carry the new weights.

    A call that raises leaves model, config and optimizer as they were.

    Args:
        model: The model that the spectrum was measured on, or one with the same adapter.
        spectrum: From `get_lora_spectrum`.
        keep: Size as a share of the adapter's parameters, above 0 and at most 1.
        r: Size as the parameters that the adapter would have if every layer had this rank.
        max_loss_increase: Size as an increase of the loss, in its units: the smallest adapter whose measured loss on
            `eval_dataloader` is at most this much higher than before. The criterion orders the components, and a
            bisection with real forward passes decides how many are kept.
        eval_dataloader: Batches on which the loss is measured before and after. They should not be those of the
            training. It is read several times with `max_loss_increase`.
        r_max: Largest rank of a layer, such as `max_lora_rank` of a server.
        optimizer: An optimizer that has taken steps with the adapter. The state of Adam and AdamW is carried to the
            new shapes: the first moment by the linear map that the gradient takes, the second by its square. Other
            optimizers lose the state of resized parameters, with a warning. A wrapper such as
            `DistributedDataParallel` has to be made anew, because it keeps the old shapes.
        serving: Whether all layers get one scaling, `lora_alpha / r` of the present config, for servers that read no
            patterns. The weights take up the difference.
        forward_fn: See `initialize_lora_fim_ranks`; used with `eval_dataloader`.
        show_progress_bar: Whether to show the progress over `eval_dataloader`.

    Returns:
        Ranks, sizes and losses before and after.

    Raises:
        ValueError: If not exactly one of `keep`, `r` and `max_loss_increase` is given, or one is out of range; if
            `max_loss_increase` is given without `eval_dataloader`, or cannot be reached under `r_max`; if the size is
            too small for any component, or for the layers that cannot lose their adapter; if the spectrum was measured
            on other weights; if the adapter is sharded or has a form that cannot be truncated; if PEFT could not load
            the adapter without the layers of rank 0; if processes would keep other ranks; or with `eval_dataloader`,
            if it is empty, the adapter is not active, or a loss is not finite.
        TypeError: If `optimizer` is no optimizer of PyTorch, or the forward pass returns no loss.
        RuntimeError: If another process failed.
    """
    inner = None if optimizer is None else require_optimizer(optimizer)
    size = _checked_size(keep, r, max_loss_increase, eval_dataloader, r_max)
    name = spectrum.adapter_name
    part, config, layers = run_on_all(lambda: _checked_for_truncation(model, spectrum))
    at_least = dict.fromkeys(layers_to_keep(layers, name, config), 1)
    loss = None
    if eval_dataloader is not None:
        require_active(layers, name)
        batches = _readable_again(eval_dataloader)
        loss = _MeasuredLoss(model, layers, spectrum, batches, forward_fn, show_progress_bar)
    before = None if loss is None else loss.of(None)
    kept, after = _choose(spectrum, size, r_max, at_least, loss, before)
    _require_kept(spectrum, kept, at_least, size)

    ranks = spectrum.ranks_of(kept)
    require_same_ranks(ranks, "the same spectrum and size")
    scalings = {layer: one.scaling for layer, one in spectrum.items()}
    if serving:
        shared = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        scalings |= {layer: shared for layer, rank in ranks.items() if rank}
    new_config, alphas = config_after_truncation(config, ranks, spectrum.ranks, scalings, serving)
    maps = _maps(spectrum, kept, scalings)
    truncate_adapter(part, layers, name, maps, alphas, new_config, inner)
    return LoraCompression(
        ranks=ranks,
        ranks_before=spectrum.ranks,
        alphas=alphas,
        parameters_per_rank={layer: one.parameters_per_rank for layer, one in spectrum.items()},
        r=new_config.r,
        lora_alpha=new_config.lora_alpha,
        use_rslora=new_config.use_rslora,
        size=size,
        r_max=r_max,
        criterion=spectrum.criterion,
        predicted=spectrum.predict(kept),
        loss_before=before,
        loss_after=after,
    )


def measure_sizes(
    model: nn.Module,
    spectrum: LoraSpectrum,
    sizes: Iterable[int],
    eval_dataloader: Iterable[Any],
    *,
    r_max: int | None = None,
    forward_fn: ForwardFn | None = None,
    show_progress_bar: bool = True,
) -> list[tuple[int, float]]:
    """Measure the loss at some sizes of the adapter by forward passes, without changing anything.

    Args:
        model: The model that the spectrum was measured on.
        spectrum: From `get_lora_spectrum`.
        sizes: Parameters that the adapter may have. A size without room for a single component is left out.
        eval_dataloader: Batches, which are read once for each size.
        r_max: Largest rank of a layer.
        forward_fn: See `initialize_lora_fim_ranks`.
        show_progress_bar: Whether to show the progress over `eval_dataloader`.

    Returns:
        For each size the parameters that were kept, and the loss.

    Raises:
        ValueError: If the spectrum was measured on other weights, the adapter is not active, or a loss is not finite.
        RuntimeError: If another process failed.
    """
    _, config, layers = run_on_all(lambda: _checked_for_truncation(model, spectrum))
    require_active(layers, spectrum.adapter_name)
    at_least = dict.fromkeys(layers_to_keep(layers, spectrum.adapter_name, config), 1)
    batches = _readable_again(eval_dataloader)
    loss = _MeasuredLoss(model, layers, spectrum, batches, forward_fn, show_progress_bar)
    selections = [spectrum.keep(size, r_max=r_max, at_least=at_least) for size in sizes]
    return [(spectrum.parameters_of(kept), loss.of(kept)) for kept in selections if any(kept.values())]


def _readable_again(dataloader: Iterable[Any]) -> Iterable[Any]:
    """The batches of an iterator as a list; in every process, because one may fail."""
    return run_on_all(lambda: list(dataloader) if isinstance(dataloader, Iterator) else dataloader)


class _MeasuredLoss:
    """The loss of the model with some components of the adapter, by forward passes."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LoraLayer],
        spectrum: LoraSpectrum,
        dataloader: Iterable[Any],
        forward_fn: ForwardFn | None,
        show_progress_bar: bool,
    ) -> None:
        self._model, self._layers, self._spectrum = model, layers, spectrum
        self._arguments = (dataloader, forward_fn, show_progress_bar)

    def of(self, kept: Kept | None) -> float:
        """The loss with these components, or with the whole adapter."""
        maps = {} if kept is None else _maps(self._spectrum, kept)
        with truncated_weights(self._layers, self._spectrum.adapter_name, maps):
            return mean_loss(self._model, *self._arguments)


def _checked_size(
    keep: float | None,
    r: int | None,
    max_loss_increase: float | None,
    eval_dataloader: Iterable[Any] | None,
    r_max: int | None,
) -> tuple[str, float]:
    """The name and value of the one size that is given."""
    given = {"keep": keep, "r": r, "max_loss_increase": max_loss_increase}
    sizes = {name: value for name, value in given.items() if value is not None}
    if len(sizes) != 1:
        raise ValueError(f"Exactly one of keep, r and max_loss_increase says the size; got {sizes or 'none'}.")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, a share of the adapter's parameters; got {keep!r}.")
    for name, value in (("r", r), ("r_max", r_max)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    if max_loss_increase is not None:
        if not (math.isfinite(max_loss_increase) and max_loss_increase >= 0):
            raise ValueError(f"max_loss_increase must be finite and not negative, got {max_loss_increase!r}.")
        if eval_dataloader is None:
            raise ValueError("max_loss_increase is measured: pass `eval_dataloader`, batches to measure the loss on.")
    return next(iter(sizes.items()))


def _checked_for_truncation(
    model: nn.Module, spectrum: LoraSpectrum
) -> tuple[nn.Module, LoraConfig, Mapping[str, LoraLayer]]:
    """The part of the model with the spectrum's adapter, its config and its layers, if the spectrum is of them."""
    name = spectrum.adapter_name
    part = adapted_part(model, name)
    config = lora_config_of(part, name)
    layers = checked_layers(part, name)
    require_unsharded(
        part, layers, "Load it into a model that is not sharded: the spectrum is right for that one, too"
    )
    different = sorted(set(layers) ^ set(spectrum))
    if different:
        raise ValueError(
            f"The spectrum and adapter {name!r} have different layers, such as {different[0]!r}: the spectrum is of "
            "another adapter. Measure it again with `get_lora_spectrum`."
        )
    for layer, fingerprint in fingerprints(layers, name).items():
        if fingerprint != spectrum[layer].fingerprint:
            raise ValueError(
                f"The adapter of layer {layer!r} has other weights than those that the spectrum was measured on. "
                "Measure it again with `get_lora_spectrum`."
            )
    return part, config, layers


def _choose(
    spectrum: LoraSpectrum,
    size: tuple[str, float],
    r_max: int | None,
    at_least: Mapping[str, int],
    loss: _MeasuredLoss | None,
    loss_before: float | None,
) -> tuple[Kept, float | None]:
    """The components to keep, and the measured loss with them."""
    kind, value = size
    if kind != "max_loss_increase":
        uniform = sum(layer.parameters_per_rank for layer in spectrum.values())
        budget = spectrum.parameters_of_share(value) if kind == "keep" else int(value) * uniform
        kept = spectrum.keep(budget, r_max=r_max, at_least=at_least)
        return kept, None if loss is None else loss.of(kept)
    assert loss is not None
    assert loss_before is not None
    limit, maximum = loss_before + value, spectrum.max_components(r_max)
    order = keep_within(spectrum.order(at_least), spectrum.costs, spectrum.num_parameters, maximum)
    names = list(spectrum)
    too_few, enough = max(len(at_least), 1) - 1, len(order)
    after = loss.of(by_layer(order, names))
    if after > limit:
        raise ValueError(
            f"The loss rises by {after - loss_before:.3g} with the largest adapter that r_max={r_max} allows, more "
            f"than max_loss_increase={value:g}: raise one of them."
        )
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        measured = loss.of(by_layer(order[:middle], names))
        if measured <= limit:
            enough, after = middle, measured
        else:
            too_few = middle
    return by_layer(order[:enough], names), after


def _require_kept(spectrum: LoraSpectrum, kept: Kept, at_least: Mapping[str, int], size: tuple[str, float]) -> None:
    if not any(kept.values()):
        smallest = min(spectrum.costs.values()) / spectrum.num_parameters
        raise ValueError(
            f"{size[0]}={size[1]:g} leaves no room for a single component: the smallest is {smallest:.2g} of the "
            "adapter's parameters. Keep more, or raise r_max."
        )
    missing = [name for name, number in at_least.items() if len(kept[name]) < number]
    if missing:
        raise ValueError(
            f"Layer {missing[0]!r} would lose its adapter, and with it a trained bias (bias='lora_only' or lora_bias) "
            f"or the place of another adapter: {size[0]}={size[1]:g} is too small for one rank in each such layer. "
            "Keep more."
        )


def _maps(spectrum: LoraSpectrum, kept: Kept, scalings: Mapping[str, float] | None = None) -> dict[str, CoreMap]:
    """Layer name to the map to its kept components; layers in which nothing changes have no entry."""
    maps = {}
    for name, layer in spectrum.items():
        ratio = 1.0 if scalings is None else scalings[name] / layer.scaling
        is_whole = len(kept[name]) == layer.num_components
        if is_whole and math.isclose(ratio, 1.0, rel_tol=1e-9):
            continue
        left, right = layer.left, layer.right
        if is_whole:
            left = right = np.broadcast_to(np.eye(layer.num_components), left.shape)
        maps[name] = core_map(left, right, kept[name], ratio)
    return maps

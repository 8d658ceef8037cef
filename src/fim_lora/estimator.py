"""`FisherEstimator`: hooks that turn forward and backward passes into running sums of the eFIM.

A forward hook on each base layer notes its input, a hook on its output receives the gradient, and the two give the
squared gradient norm of every example at once. The weight takes no part. What outlives a batch is three numbers per
layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .examples import batch_size_of, by_example
from .gradient_norms import layer_type, squared_norms
from .running_moments import RunningMoments
from .scores import FimScores, LayerScore

CAUSES_OF_NO_GRADIENT = (
    "Usual causes: the batches have no labels; the loss is detached, or was computed without gradients "
    "(`torch.no_grad`); all labels are masked (-100); the target layers do not take part in the loss; or reentrant "
    "gradient checkpointing cuts the graph because no input requires a gradient (pass `use_reentrant=False`, or "
    "call `model.enable_input_require_grads()`)."
)


class FisherEstimator:
    """Running eFIM of a set of layers, fed by hooks.

    One backward pass is one calibration batch. A layer that is called several times before it (shared weights,
    two forward passes into one loss) counts with the gradient of all its uses together. Calls under
    `torch.no_grad` are taken for the first pass of reentrant gradient checkpointing, except in a pass of the whole
    model without gradients, which is an evaluation and leaves no trace.

    Args:
        layers: Name, as in the base model, to base layer.
        max_batches: After so many backward passes the hooks remove themselves; `None` for no limit.

    Raises:
        TypeError: If a layer's class is not registered in `gradient_norms`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], max_batches: int | None = None) -> None:
        self.layers = dict(layers)
        self.max_batches = max_batches
        self.shapes = {name: layer_type(name, layer).shape(layer) for name, layer in self.layers.items()}
        self.num_batches = 0
        self.num_skipped_batches = 0
        self.paused = False
        self._moments = {name: RunningMoments() for name in self.layers}
        self._unattributed: set[str] = set()
        self._reached: set[str] = set()
        self._pass = _Pass()
        self._evaluating = False
        self._handles: list[RemovableHandle] = []

    def attach(self, *roots: nn.Module) -> None:
        """Register the hooks.

        Args:
            roots: Modules whose call is a pass of the whole model. They tell the batch size; without them it is
                the leading dimension of each layer's input, or what `batch` was told.
        """
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(_LayerHook(self, name), with_kwargs=True))
        for root in roots:
            self._handles.append(root.register_forward_pre_hook(_RootHook(self), with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks; what was accumulated stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def batch(self, batch_size: int | None) -> Iterator[None]:
        """One forward and backward pass, which counts even if no layer received a gradient (it was zero then).

        Args:
            batch_size: Examples in the batch; `None` for the leading dimension of each layer's input.

        Yields:
            Nothing.
        """
        self._pass = _Pass(batch_size)
        seen = self.num_batches
        yield
        if self.num_batches == seen:
            self._finish_batch()

    def _start_forward(self, batch_size: int | None) -> None:
        """A forward pass of the whole model begins. Several before one backward pass make one batch."""
        if self._pass.has_gradients:
            self._finish_batch()
        self._evaluating = not torch.is_grad_enabled()
        if not self._evaluating:
            self._pass.batch_size = batch_size

    def _finish_batch(self) -> None:
        """Take the gradients of this pass into the running sums.

        A batch in which a gradient is not finite (overflow in float16) is counted and left out, for all layers.
        """
        finished, self._pass = self._pass, _Pass()
        self.num_batches += 1
        if self.num_batches == self.max_batches:
            self.detach()
        for name, uses in finished.uses.items():
            finished.norms[name] = self._norms(name, uses, finished.batch_size)
        self._accumulate(finished)

    @property
    def has_seen_gradients(self) -> bool:
        """Whether a backward pass has reached a layer."""
        return self.num_batches > 0 or self._pass.has_gradients

    def scores(self) -> FimScores:
        """The scores so far.

        Returns:
            Score of every layer.

        Raises:
            RuntimeError: If no batch was seen, none had finite gradients, or every score is zero.
        """
        if self._pass.has_gradients:
            self._finish_batch()
        if self.num_batches == 0:
            raise RuntimeError("No calibration batch was seen: call `loss.backward()` at least once.")
        if self.num_batches == self.num_skipped_batches:
            raise RuntimeError(
                f"All {self.num_batches} calibration batches had gradients that are not finite: calibrate in "
                "bfloat16 or float32, scale the loss down, or look for NaN in the data."
            )
        scores = {name: self._score(name) for name in self.layers}
        if all(score.mean == 0 for score in scores.values()):
            raise RuntimeError(f"The eFIM of every layer is exactly zero. {CAUSES_OF_NO_GRADIENT}")
        self._warn()
        return FimScores(scores, self.num_batches, self.num_skipped_batches)

    def __getstate__(self) -> dict[str, Any]:
        # What is in flight belongs to a graph, which can neither be copied nor pickled.
        return self.__dict__ | {"_pass": _Pass()}

    def _observe(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        """The forward hook: keep `x`, and ask for the gradient of `output`."""
        if self.paused:
            return None
        with_gradients = torch.is_grad_enabled()
        if not _inside_backward():
            if self._evaluating and not with_gradients:
                return None
            if self._pass.has_gradients:
                self._finish_batch()
            if self.num_batches == self.max_batches:
                return None
            self._pass.calls[name] = self._pass.calls.get(name, 0) + 1
            self._pass.outstanding += 1
        if not with_gradients:
            return None
        replacement = None
        if not output.requires_grad:
            # Nothing upstream is trained, so the graph starts here. The clone is no leaf: what follows may change
            # it in place.
            output = replacement = output.detach().requires_grad_().clone()
        output.register_hook(partial(self._receive, name, _SavedInput(x)))
        return replacement

    def _receive(self, name: str, saved: _SavedInput, gradient: Tensor) -> None:
        """The hook on the output: pair its gradient with the input, and finish the layer after its last use."""
        if self.paused or self.num_batches == self.max_batches:
            return
        current = self._pass
        uses = current.uses.setdefault(name, [])
        uses.append((saved.take(name), gradient.detach()))
        current.has_gradients = True
        current.outstanding -= 1
        if len(uses) == current.calls.get(name):
            current.norms[name] = self._norms(name, current.uses.pop(name), current.batch_size)
        if current.outstanding == 0:
            self._finish_batch()

    def _norms(self, name: str, uses: list[tuple[Tensor, Tensor]], batch_size: int | None) -> Tensor:
        """`‖G_t‖²_F` of every example (B), or of the batch as one example (1) if rows cannot be attributed."""
        layer = self.layers[name]
        matrices = layer_type(name, layer).matrices
        size = batch_size or (uses[0][0].shape[0] if uses[0][0].ndim > 1 else 1)
        grouped = [by_example(x, g, size) for x, g in uses]
        examples = [matrices(layer, *pair) for pair in grouped if pair is not None]
        if len(examples) == len(uses):
            # G_t = B · g_tᵀ x_t, because the loss is the mean over examples of ℓ_t.
            return squared_norms(*_concatenated(examples)) * size**2
        # ‖Σ_t G_t‖² / B is Σ_t ‖G_t‖² / B in expectation if the G_t are independent with mean zero.
        self._unattributed.add(name)
        whole = [matrices(layer, x.unsqueeze(0), g.unsqueeze(0)) for x, g in uses]
        return squared_norms(*_concatenated(whole)) * size

    def _accumulate(self, finished: _Pass) -> None:
        names = list(finished.norms)
        lengths = [len(finished.norms[name]) for name in names]
        values = _to_host([finished.norms[name] for name in names])
        if not np.isfinite(values).all():
            self.num_skipped_batches += 1
            return
        self._reached.update(names)
        by_name = dict(zip(names, np.split(values, np.cumsum(lengths)[:-1]), strict=True)) if names else {}
        zeros = np.zeros(finished.batch_size or max(lengths, default=1))
        for name, moments in self._moments.items():
            moments.add(by_name.get(name, zeros))

    def _score(self, name: str) -> LayerScore:
        moments, shape = self._moments[name], self.shapes[name]
        entries = shape[0] * shape[1]
        error = moments.standard_error
        return LayerScore(
            mean=moments.mean / entries,
            standard_error=None if error is None else error / entries,
            num_examples=moments.count,
            shape=shape,
        )

    def _warn(self) -> None:
        if self.num_skipped_batches:
            warnings.warn(
                f"{self.num_skipped_batches} of {self.num_batches} calibration batches had gradients that are not "
                "finite and were left out: calibrate in bfloat16 or float32 to use them all.",
                stacklevel=4,
            )
        if self._unattributed:
            warnings.warn(
                f"The inputs of {len(self._unattributed)} layers could not be attributed to examples, so their "
                "batches count as one example each, and their scores are approximate: "
                f"{sorted(self._unattributed)}. Calibrate with batches of one example to have them exact.",
                stacklevel=4,
            )
        unreached = [name for name in self.layers if name not in self._reached]
        if unreached:
            warnings.warn(
                f"{len(unreached)} target layers took no part in the loss of any calibration batch and score "
                f"zero: {unreached}. If they stay out of it, leave them out of `target_modules`.",
                stacklevel=4,
            )


@dataclass
class _Pass:
    """One forward and backward pass in flight.

    Attributes:
        batch_size: Examples, if known.
        calls: Layer name to its calls in the forward pass.
        uses: Layer name to the pairs of input and output gradient that wait for further uses of the layer.
        norms: Layer name to the finished squared norms.
        outstanding: Calls whose gradient has not come.
        has_gradients: Whether the backward pass has begun.
    """

    batch_size: int | None = None
    calls: dict[str, int] = field(default_factory=dict)
    uses: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    outstanding: int = 0
    has_gradients: bool = False


@dataclass
class _LayerHook:
    """Forward hook of a layer; an object, not a closure, so that the model can be copied and pickled."""

    estimator: FisherEstimator
    name: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        return self.estimator._observe(self.name, x, output)


@dataclass
class _RootHook:
    """Forward hook of a whole model, before its layers: tells the batch size."""

    estimator: FisherEstimator

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.estimator.paused or _inside_backward():
            return
        name = getattr(module, "main_input_name", None)
        self.estimator._start_forward(batch_size_of(args or kwargs, name))


class _SaveForBackward(torch.autograd.Function):
    """A node beside the graph whose only task is to hold a tensor the way autograd holds one."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SavedInput:
    """The input of a layer, saved by autograd.

    So checkpointing recomputes it instead of keeping it, offloading moves it, and changing it in place raises.
    """

    def __init__(self, x: Tensor) -> None:
        self._anchor: Tensor | None = _SaveForBackward.apply(torch.ones((), requires_grad=True), x.detach())

    def take(self, name: str) -> Tensor:
        """The input, once: it is let go with the call, as autograd does after a backward pass."""
        anchor, self._anchor = self._anchor, None
        if anchor is None:
            raise RuntimeError(
                f"Layer {name!r} received a second gradient from one forward pass while the eFIM is accumulated. "
                "Add the losses up and call `backward()` once."
            )
        node: Any = anchor.grad_fn
        return node.saved_tensors[0]


def _concatenated(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All uses of a layer as positions of one: the gradient of the weight is the sum over them."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([x for x, _ in pairs], dim=1), torch.cat([g for _, g in pairs], dim=1)


def _to_host(tensors: list[Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Concatenate 1-D tensors, with one transfer per device."""
    if len({tensor.device for tensor in tensors}) == 1:
        tensors = [torch.cat([tensor.float() if tensor.dtype != torch.float64 else tensor for tensor in tensors])]
    arrays = [tensor.cpu().double().numpy() for tensor in tensors]
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _inside_backward() -> bool:
    """Whether autograd is running, so that a forward call is a recomputation by gradient checkpointing.

    PyTorch's own checkpointing asks the same function; there is no public one.
    """
    return torch._C._current_graph_task_id() != -1

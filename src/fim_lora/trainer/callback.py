"""`FimCompressionCallback`: a training that begins with a wide adapter, and cuts it once."""

from __future__ import annotations

import math
from typing import Any
from weakref import ref

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..adapter.adapted_part import adapted_part
from ..adapter.fit_checkpoint import fit_to_checkpoints, stop_fitting
from ..compression import LoraCompression
from ..runtime.user_warnings import warn_user
from ..runtime.wrappers import unwrap
from .trainer_kinds import rows_per_example_in_passes
from .wide_phase import WidePhase, WideSettings, step_of_share

# Kinds of parallel training in which processes hold other tensors than the model's parameters.
_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class FimCompressionCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Callback for trainers of transformers and TRL: train a wide adapter, and cut it once to the size of rank `r`.

    The adapter starts at the rank of its config. After a share `at` of the steps it is cut to the parameters that it
    would have at the uniform rank `r`, as by `compress_lora(model, spectrum, r=r)`. The spectrum comes from the
    trainer's own passes in the last steps before the cut, with its loss, collator, precision and gradient
    accumulation, so the cut needs no further passes. All of them have the whole adapter, so components are ordered by
    saliency and norm, without gains. Dropout is active in them, and the weights move a little between them. Adam and
    AdamW go on with their state, and every checkpoint is plain LoRA.

    To resume, run the same script with `resume_from_checkpoint`. After the cut this works if the trainer was given the
    model and the callback when it was created, not `model_init` or `add_callback`. From a checkpoint between the first
    recorded step and the cut, the spectrum comes from fewer batches. With `load_best_model_at_end` only checkpoints
    after the cut count.

    Args:
        r: The size after the cut: the parameters of this uniform rank. It must be smaller than the adapter is.
        at: The share of the steps after which the adapter is cut, between 0 and 1; rounded up to a whole step.
        wide_scale: Factor on the learning rate of the adapter until the cut. `None` means the share of the parameters
            that the cut leaves, `r / R` for an adapter that begins at rank R: wide adapters need a smaller rate than
            narrow ones (`docs/evidence.md` compares). Other trained parameters, such as biases and a new classifier,
            keep their rate, and schedulers and logs do not see the factor. It is applied to each update of A and B
            after the optimizer's step, for which a copy of both is kept until the cut. This is a scaled learning rate
            with SGD, Adam and AdamW. With optimizers that keep weights of their own, such as schedule-free ones or
            those with master weights, pass 1.
        adapter_name: The adapter.
        num_batches: Micro-batches before the cut that give the spectrum, in each process.

    Attributes:
        compression: Ranks and sizes before and after the cut; `None` before it, and after resuming behind it. The
            predicted loss is not known, because trainers scale their loss.
        cut_at_step: The step of the cut; `None` before it.

    Raises:
        ValueError: If an argument is out of range. When the trainer is created: if several parts of the model have
            the adapter. When the training begins: if it does not exist, is not larger than `r`, or has a form that
            `compress_lora` refuses; if the cut would come before the second step; if the trainer shards the model
            (FSDP, DeepSpeed) or uses `nn.DataParallel`; if the optimizer does not hold the adapter; or if the
            checkpoint belongs to another run. When a checkpoint is loaded: if its adapter is larger than that of the
            model.
        TypeError: If the optimizer is not one of PyTorch, or a layer's class is not supported.
        RuntimeError: At the cut, if no batch had finite gradients, or every gradient is zero.
    """

    def __init__(
        self,
        r: int,
        at: float = 0.2,
        wide_scale: float | None = None,
        adapter_name: str = "default",
        num_batches: int = 8,
    ) -> None:
        for name, value in (("r", r), ("num_batches", num_batches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        if not 0 < at < 1:
            raise ValueError(f"at must be between 0 and 1, a share of the training steps, got {at!r}.")
        if wide_scale is not None and not (math.isfinite(wide_scale) and wide_scale > 0):
            raise ValueError(
                f"wide_scale must be positive and finite, a factor on learning rates, or None, got {wide_scale!r}."
            )
        self.r, self.at, self.wide_scale = r, at, wide_scale
        self.adapter_name, self.num_batches = adapter_name, num_batches
        self.compression: LoraCompression | None = None
        self.cut_at_step: int | None = None
        self._phase: WidePhase | None = None
        self._cut_model: ref[nn.Module] | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer stores in its checkpoints."""
        names = ("r", "at", "wide_scale", "adapter_name", "num_batches")
        arguments = {name: getattr(self, name) for name in names}
        return {"args": arguments, "attributes": {"cut_at_step": self.cut_at_step}}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Prepare the model for checkpoints that were saved after the cut."""
        if model is not None:
            fit_to_checkpoints(adapted_part(unwrap(model), self.adapter_name), self.adapter_name, optimizer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Check that the adapter can be cut, unless it has been."""
        self._stop()
        _require_unsharded(args)
        is_cut = self._cut_model is not None and self._cut_model() is model
        if not is_cut:
            self.compression, self.cut_at_step = None, self._cut_before(state)
        # The trainer expects an entry when it saves, but a checkpoint of a run without this callback has none.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if self.cut_at_step is None:
            self._phase = WidePhase(unwrap(model), optimizer, self._settings(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the passes of this step if it is one of the last before the cut."""
        if self._phase is not None:
            self._phase.begin_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the weights that the optimizer is about to change."""
        if self._phase is not None:
            self._phase.before_update()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply `wide_scale`."""
        if self._phase is not None:
            self._phase.after_update()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Cut the adapter when it is time."""
        if self._phase is None or state.global_step < self._phase.settings.cut_step:
            return
        phase, self._phase = self._phase, None
        self.compression = phase.cut()
        self.cut_at_step, self._cut_model = state.global_step, ref(model)
        # A checkpoint from before the cut holds an adapter of another size, so none of them is the best one.
        state.best_metric = state.best_model_checkpoint = None
        if hasattr(state, "best_global_step"):
            state.best_global_step = None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Remove all hooks; warn if the training ended before the cut."""
        stop_fitting(adapted_part(unwrap(model), self.adapter_name), self.adapter_name)
        if self._phase is not None:
            warn_user(
                f"The training stopped at step {state.global_step}, before the cut at step "
                f"{self._phase.settings.cut_step}: the adapter keeps its ranks. Cut it with `get_lora_spectrum` and "
                "`compress_lora`."
            )
        self._stop()

    def _stop(self) -> None:
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.stop()

    def _settings(self, args: TrainingArguments, state: TrainerState) -> WideSettings:
        cut_step = step_of_share(self.at, state.max_steps)
        if cut_step < 2:
            raise ValueError(
                f"at={self.at:g} of max_steps={state.max_steps} would cut the adapter after step {cut_step}, when it "
                "has not learned anything yet: train longer, or raise `at`."
            )
        if state.global_step >= cut_step:
            raise ValueError(
                f"The checkpoint is of step {state.global_step}, after the cut at step {cut_step} (at={self.at:g}), "
                "but its adapter has not been cut: resume from an earlier checkpoint, raise `at`, or leave out the "
                "callback and call `compress_lora` at the end."
            )
        accumulated = args.gradient_accumulation_steps
        # In the first step the B of a new adapter is zero, and its passes say nothing.
        first_step = max(cut_step - math.ceil(self.num_batches / accumulated), 1, state.global_step)
        available = (cut_step - first_step) * accumulated
        if available < self.num_batches:
            warn_user(
                f"Only {available} micro-batches run between step {first_step} and the cut at step {cut_step}, fewer "
                f"than num_batches={self.num_batches}: the spectrum comes from these. Raise `at`, or lower "
                "`num_batches`."
            )
        rows = rows_per_example_in_passes(args)
        return WideSettings(self.adapter_name, self.r, self.wide_scale, first_step, cut_step, self.num_batches, rows)

    def _cut_before(self, state: TrainerState) -> int | None:
        """The step at which the adapter of the checkpoint was cut; `None` if it was not, or there is none."""
        if state.global_step == 0:
            return None
        saved = state.stateful_callbacks.get(type(self).__name__, [])
        for entry in reversed(saved if isinstance(saved, list) else [saved]):
            arguments, step = entry["args"], entry["attributes"]["cut_at_step"]
            if arguments["adapter_name"] != self.adapter_name or step is None:
                continue
            if arguments["r"] != self.r:
                raise ValueError(
                    f"The adapter of the checkpoint was cut to r={arguments['r']}, and the callback has r={self.r}: "
                    "resume with the r of that run, or start a new one."
                )
            return int(step)
        return None


def _require_unsharded(args: TrainingArguments) -> None:
    kind = AcceleratorState().distributed_type.value
    if kind in _SHARDED:
        raise ValueError(
            f"The trainer uses {kind}, in which the shapes of an adapter cannot change: train with "
            "DistributedDataParallel (torchrun without FSDP and DeepSpeed), or without the callback, and call "
            "`compress_lora` after the training."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"The trainer runs {args.n_gpu} GPUs in one process, where the passes of nn.DataParallel cannot be "
            "recorded: start one process for each GPU, with torchrun, or make one GPU visible."
        )

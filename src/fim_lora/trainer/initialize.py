"""Ranks for the LoRA adapter of a trainer, from the trainer's own batches and loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import LoraConfig
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from ..adapter.adapted_part import adapted_part
from ..adapter.checks import require_unmerged, require_untrained
from ..adapter.lora_layers import adapter_layers
from ..adapter.pending_config import awaiting_config
from ..adapter.watching import lora_layers_disabled
from ..fisher.scores import FimScores
from ..initialization import initialize_lora_fim_ranks
from ..rank_allocation import RankAllocation
from ..ranks.allocation import ALLOCATION_FILE
from ..runtime.atomic import file_restorer
from ..runtime.distributed import gather_from_all, is_main_process, run_on_all
from ..runtime.flags import frozen_eval_mode
from ..scoring import calibrated_scores
from .trainer_kinds import require_complete_batches, rows_per_example_in_batches

if TYPE_CHECKING:
    from transformers import Trainer

# Attributes in which trainers of TRL and sentence-transformers collect what they log.
_METRICS = ("_metrics", "_stored_metrics", "accum_loss_components")


def initialize_lora_fim_ranks_for_trainer(
    trainer: Trainer,
    adapter_name: str = "default",
    resume_from_checkpoint: str | bool | None = None,
    show_progress_bar: bool = True,
) -> RankAllocation:
    """Decide the ranks of a trainer's LoRA adapter from the trainer's own batches and loss, before `train()`.

    The calibration uses the trainer's collator, sampler, sharding over processes, `compute_loss` and bfloat16
    autocast. The model is in eval mode, without its LoRA layers. Float16 autocast is left out, because gradients
    would vanish without a scaler. `train()` creates the optimizer after the allocation. In trainers of pairs (DPO,
    reward models) an example is a pair.

    The allocation is also written to `fim_allocation.json` in the trainer's `output_dir`. To resume, run the same
    script with `resume_from_checkpoint`: then the ranks come from that file, and no calibration runs. Only process 0
    writes and reads it.

    Args:
        trainer: A trainer that has not trained yet, whose model has an adapter that awaits allocation, or holds a
            model with one, as a `SentenceTransformer` does. TRL creates the adapter from its `peft_config`.
        adapter_name: The adapter.
        resume_from_checkpoint: As for `trainer.train`: a folder, or `True` for the last one in `output_dir`.
        show_progress_bar: Whether to show a progress bar.

    Returns:
        Ranks, patterns, scores and counts.

    Raises:
        ValueError: If the trainer is one of TRL that is not known, or generates its texts, as `GRPOTrainer`; if it
            or its adapter was trained before, or it shards its model (FSDP, ZeRO-3); if there is no checkpoint to
            resume from, or its ranks are not those of the adapter's config; see also `initialize_lora_fim_ranks`.
        InvalidFileError: If `fim_allocation.json` beside the checkpoint is damaged.
        OSError: If it cannot be read or written.
        TypeError: See `initialize_lora_fim_ranks`.
        RuntimeError: See `initialize_lora_fim_ranks`.
    """
    require_complete_batches(trainer)
    model, part = trainer.model, adapted_part(trainer.model, adapter_name)
    config = awaiting_config(part, adapter_name)
    _require_untrained(trainer)
    require_unmerged(part)
    run_on_all(lambda: require_untrained(adapter_layers(part, adapter_name), adapter_name))
    forward_fn = _forward_fn(trainer)
    with _training_batches(trainer) as batches, _without_other_processes(trainer):
        if resume_from_checkpoint:
            scores = _previous_scores(trainer, resume_from_checkpoint, config)
        else:
            with _frozen_companions(trainer), lora_layers_disabled(model, part):
                scores = calibrated_scores(
                    model,
                    adapter_layers(part, adapter_name),
                    batches,
                    config,
                    forward_fn,
                    show_progress_bar,
                    loss_communicates=True,
                    sequences_per_example=rows_per_example_in_batches(trainer),
                )
        # The checkpoint may be in another folder.
        with _saved(RankAllocation.from_scores(scores, config), Path(trainer.args.output_dir) / ALLOCATION_FILE):
            eva_batches = batches if config.fim_config.init_lora_weights == "eva" else None
            return initialize_lora_fim_ranks(model, eva_batches, scores, forward_fn, adapter_name, show_progress_bar)


def _require_untrained(trainer: Trainer) -> None:
    if trainer.model_wrapped is not trainer.model:
        raise ValueError("The trainer has prepared its model for training: allocate before `trainer.train()`.")
    if trainer.optimizer is not None and getattr(trainer.optimizer, "state", None):
        raise ValueError("The trainer's optimizer has taken steps: allocate before, or give the trainer a new one.")
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        raise ValueError(
            "The trainer shards its model, but only in `train()`: call `get_fim_scores` on the sharded model in a run "
            "of its own, and give the trainer the config of `RankAllocation.from_scores(scores, config)"
            ".to_lora_config(config)`. Nothing more is needed then."
        )


def _forward_fn(trainer: Trainer) -> Any:
    autocast = trainer.accelerator.autocast if trainer.accelerator.mixed_precision == "bf16" else nullcontext

    def loss(model: nn.Module, batch: Any) -> Any:
        # As for an optimizer step of one micro-batch: losses that divide by this number are then the mean over it.
        (batch,), num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        with autocast(), trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=num_items)

    return loss


@contextmanager
def _without_other_processes(trainer: Trainer) -> Iterator[None]:
    """Let the trainer compute the loss of a batch from this batch alone, and on one device, as the scores assume.

    In training it divides by the number of tokens of all processes, and multiplies by the number of processes.
    """
    arguments = trainer.args
    before = arguments.average_tokens_across_devices, arguments.n_gpu
    arguments.average_tokens_across_devices, arguments._n_gpu = False, min(arguments.n_gpu, 1)
    try:
        yield
    finally:
        arguments.average_tokens_across_devices, arguments._n_gpu = before


@contextmanager
def _frozen_companions(trainer: Trainer) -> Iterator[None]:
    """Freeze the modules that the trainer's loss may use besides the model, such as a loss with its own weights."""
    values = [item for one in vars(trainer).values() for item in (one.values() if isinstance(one, dict) else (one,))]
    companions = {id(value): value for value in values if isinstance(value, nn.Module)}
    with ExitStack() as stack:
        for module in companions.values():
            stack.enter_context(frozen_eval_mode(module))
        yield


@contextmanager
def _training_batches(trainer: Trainer) -> Iterator[Any]:
    """Yield the dataloader; then restore what its batches, and losses computed from them, changed in the trainer."""
    dataloader = trainer.get_train_dataloader()
    # Many trainers collect metrics whenever they compute a loss, and average them into the next log.
    metrics = {name: copy.deepcopy(getattr(trainer, name)) for name in _METRICS if hasattr(trainer, name)}
    try:
        yield dataloader
    finally:
        for name, value in metrics.items():
            setattr(trainer, name, value)


@contextmanager
def _saved(allocation: RankAllocation, path: Path) -> Iterator[None]:
    """Write the allocation in one process; restore the previous file if the block fails."""

    def write() -> Callable[[], None]:
        if not is_main_process():
            return lambda: None
        restore = file_restorer(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        allocation.save(path)
        return restore

    restore = run_on_all(write)
    try:
        yield
    except BaseException:
        restore()
        raise


def _previous_scores(trainer: Trainer, resume_from_checkpoint: str | bool, config: LoraConfig) -> FimScores:
    """The scores beside the checkpoint, if the config still gives the ranks with which it was trained."""
    # Only process 0 wrote the file, and another computer need not see it.
    found = gather_from_all(
        lambda: _previous_allocation(trainer, resume_from_checkpoint) if is_main_process() else None
    )[0]
    path, before = cast(tuple[Path, RankAllocation], found)
    run_on_all(lambda: _require_same_ranks(before, path, config))
    return before.scores


def _previous_allocation(trainer: Trainer, resume_from_checkpoint: str | bool) -> tuple[Path, RankAllocation]:
    """The file beside the checkpoint, and the allocation in it."""
    if isinstance(resume_from_checkpoint, bool):
        folder = Path(trainer.args.output_dir)
        if not folder.is_dir() or get_last_checkpoint(folder) is None:
            raise ValueError(
                f"There is no checkpoint in {folder} to resume from: pass its folder, or omit resume_from_checkpoint."
            )
    else:
        folder = Path(resume_from_checkpoint).parent
    path = folder / ALLOCATION_FILE
    return path, RankAllocation.load(path)


def _require_same_ranks(before: RankAllocation, path: Path, config: LoraConfig) -> None:
    now = RankAllocation.from_scores(before.scores, config)
    if (now.ranks, now.alphas) != (before.ranks, before.alphas):
        raise ValueError(
            f"The config gives other ranks than {path}, with which the checkpoint was trained: resume with the r, "
            "lora_alpha, patterns and FimConfig of that run, or start a new one."
        )

"""For `transformers.Trainer` and the trainers of TRL: ranks from the trainer's own batches and loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from .calibration import calibrate
from .distributed import gathered, is_main_process, together
from .initialization import awaiting_config, initialize_lora_fim_ranks
from .peft_integration import adapter_layers, lora_layers_disabled, require_unmerged
from .rank_allocation import RankAllocation
from .scores import FimScores

if TYPE_CHECKING:
    from transformers import Trainer

ALLOCATION = "fim_allocation.json"
"""Name of the file in the trainer's `output_dir`."""

# Their batches hold all chosen texts, then all rejected ones, and an example is a pair.
_TRAINERS_OF_PAIRS = {"DPOTrainer", "RewardTrainer"}


def initialize_lora_fim_ranks_for_trainer(
    trainer: Trainer,
    adapter_name: str = "default",
    resume_from_checkpoint: str | bool | None = None,
    show_progress_bar: bool = True,
) -> RankAllocation:
    """Decide the ranks of a trainer's LoRA adapter from the trainer's own batches and loss, before `train()`.

    Whatever the trainer does to make a loss of its data holds for the calibration, too: collator, sampler, sharding
    over processes, `compute_loss`, bfloat16 autocast. The model is in eval mode, without its LoRA layers; float16
    autocast is left out, because gradients would vanish without a scaler. The optimizer comes with `train()`, after
    the allocation. In trainers of pairs (DPO, reward models) an example is a pair.

    The allocation is also written to `fim_allocation.json` in the trainer's `output_dir`. To resume, run the same
    script with `resume_from_checkpoint`: the ranks come from that file then, and no calibration runs.

    Args:
        trainer: A trainer that has not trained yet, whose model has an adapter that awaits allocation. TRL creates it
            from its `peft_config`.
        adapter_name: The adapter.
        resume_from_checkpoint: As for `trainer.train`: a folder, or `True` for the last one in `output_dir`.
        show_progress_bar: Whether to show one.

    Returns:
        Ranks, patterns, scores and counts.

    Raises:
        ValueError: If the trainer has begun to train, or shards its model (FSDP, ZeRO-3); if there is no checkpoint
            to resume from, or its ranks are not those of the adapter's config; see also `initialize_lora_fim_ranks`.
        InvalidFileError: If `fim_allocation.json` beside the checkpoint is damaged.
        OSError: If it cannot be read or written.
        TypeError: See `initialize_lora_fim_ranks`.
        RuntimeError: See `initialize_lora_fim_ranks`.
    """
    model = trainer.model
    config = awaiting_config(model, adapter_name)
    _require_beginning(trainer)
    require_unmerged(model)
    with _batches(trainer) as batches, _metrics_kept(trainer):
        if resume_from_checkpoint:
            scores = together(lambda: _scores_before(_folder_of(trainer, resume_from_checkpoint), config))
        else:
            scores = _scores(trainer, batches, adapter_name, show_progress_bar)
        # The checkpoint may be one of another folder.
        with _saved(RankAllocation.from_scores(scores, config), Path(trainer.args.output_dir) / ALLOCATION):
            return initialize_lora_fim_ranks(
                model,
                batches if config.fim_config.init_lora_weights == "eva" else None,
                scores,
                _forward_fn(trainer),
                adapter_name,
                show_progress_bar,
            )


def _require_beginning(trainer: Trainer) -> None:
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


def _scores(trainer: Trainer, batches: Any, adapter_name: str, show_progress_bar: bool) -> FimScores:
    model = trainer.model
    pairs = any(parent.__name__ in _TRAINERS_OF_PAIRS for parent in type(trainer).__mro__)
    fim_config = model.peft_config[adapter_name].fim_config
    with lora_layers_disabled(model):
        return calibrate(
            model,
            adapter_layers(model, adapter_name),
            batches,
            fim_config.fim_calibration_batches,
            _forward_fn(trainer),
            show_progress_bar,
            loss_communicates=True,
            sequences_per_example=2 if pairs else 1,
            exact=fim_config.exact,
        )


def _forward_fn(trainer: Trainer) -> Any:
    autocast = trainer.accelerator.autocast if trainer.accelerator.mixed_precision == "bf16" else nullcontext

    def loss(model: nn.Module, batch: Any) -> Any:
        with autocast(), trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, trainer._prepare_inputs(batch))

    return loss


@contextmanager
def _batches(trainer: Trainer) -> Iterator[Any]:
    """The training batches; afterwards Accelerate does not take the trainer to be in the middle of them."""
    dataloader = trainer.get_train_dataloader()
    try:
        yield dataloader
    finally:
        state = trainer.accelerator.gradient_state
        if any(reference is dataloader for reference in state.dataloader_references):
            dataloader.end()


@contextmanager
def _metrics_kept(trainer: Trainer) -> Iterator[None]:
    """Trainers of TRL collect metrics whenever they compute a loss, and average them into the next log."""
    before = copy.deepcopy(getattr(trainer, "_metrics", None))
    try:
        yield
    finally:
        if before is not None:
            trainer._metrics = before


@contextmanager
def _saved(allocation: RankAllocation, path: Path) -> Iterator[None]:
    """Write the allocation by one process; if what follows fails, the file is again what it was."""
    before = path.read_bytes() if path.exists() else None

    def write() -> None:
        if is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            allocation.save(path)

    gathered(write)
    try:
        yield
    except BaseException:
        if is_main_process():
            path.unlink() if before is None else path.write_bytes(before)
        raise


def _folder_of(trainer: Trainer, resume_from_checkpoint: str | bool) -> Path:
    """The folder in which the checkpoint lies."""
    if not isinstance(resume_from_checkpoint, bool):
        return Path(resume_from_checkpoint).parent
    folder = Path(trainer.args.output_dir)
    if not folder.is_dir() or get_last_checkpoint(folder) is None:
        raise ValueError(f"There is no checkpoint in {folder} to resume from.")
    return folder


def _scores_before(folder: Path, config: Any) -> FimScores:
    path = folder / ALLOCATION
    before = RankAllocation.load(path)
    now = RankAllocation.from_scores(before.scores, config)
    if (now.ranks, now.alphas) != (before.ranks, before.alphas):
        raise ValueError(
            f"The config gives other ranks than those in {path}, with which the checkpoint was trained: resume with "
            "the r, lora_alpha, patterns and FimConfig of that run, or start anew."
        )
    return before.scores

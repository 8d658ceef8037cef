"""Checkpoints of a training that cuts its adapter: what is saved, and resuming before and after the cut."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from fim_lora import FimCompressionCallback, FimConfig, initialize_lora_fim_ranks_for_trainer
from helpers.adapters import hooks_of, logits, ranks_in
from helpers.stock_peft import stock
from helpers.tiny_models import llama
from helpers.wide_trainers import (
    CUT,
    CUT_STEP,
    NARROW,
    STEPS,
    WIDE,
    adapter_weights,
    same_weights,
    sft_trainer_of,
    trainer_of,
    wide_model,
)

AFTER = CUT_STEP + 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A training with checkpoints before, at and after the cut. Some layers lose their adapter."""
    folder = tmp_path_factory.mktemp("finished")
    callback = FimCompressionCallback(**(CUT | {"r": 1}), wide_scale=0.5)
    trainer = trainer_of(folder, [callback])
    trainer.train()
    assert callback.compression.dropped_layers
    return trainer, callback.compression


def resumed(folder, checkpoint, callback=None, make=trainer_of, **options):
    callback = callback or FimCompressionCallback(**(CUT | {"r": 1}), wide_scale=0.5)
    trainer = make(folder, [callback], **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer, callback


def checkpoint_of(finished, step):
    return f"{finished[0].args.output_dir}/checkpoint-{step}"


# --- What is saved ---


def test_a_checkpoint_before_the_cut_is_wide(finished):
    weights = load_file(f"{checkpoint_of(finished, CUT_STEP - 3)}/adapter_model.safetensors")
    assert {len(weight) for name, weight in weights.items() if "lora_A" in name} == {WIDE}
    assert ranks_in(PeftModel.from_pretrained(llama(), checkpoint_of(finished, CUT_STEP - 3))) == dict.fromkeys(
        finished[1].ranks, WIDE
    )


@pytest.mark.parametrize("step", [CUT_STEP, AFTER, STEPS])
def test_a_checkpoint_after_the_cut_is_plain_lora(finished, step):
    folder = checkpoint_of(finished, step)
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    assert "fim_config" not in config
    assert config["init_lora_weights"] is True
    ranks = ranks_in(PeftModel.from_pretrained(llama(), folder))
    assert ranks == {name: rank for name, rank in finished[1].ranks.items() if rank}


def test_stock_peft_loads_the_last_checkpoint(finished, tmp_path):
    trainer, _ = finished
    stock(f"""
        model = PeftModel.from_pretrained(llama(), {checkpoint_of(finished, STEPS)!r}).eval()
        with torch.no_grad():
            torch.save(model(**token_batch()).logits, {str(tmp_path / "logits.pt")!r})
    """)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(trainer.model), rtol=1e-5, atol=1e-5)


# --- Resuming ---


@pytest.mark.parametrize("step", [CUT_STEP - 3, CUT_STEP, AFTER])
def test_resuming_ends_where_an_uninterrupted_training_ends(finished, tmp_path, step):
    trainer, callback = resumed(tmp_path, checkpoint_of(finished, step))
    assert trainer.state.global_step == STEPS
    assert callback.cut_at_step == CUT_STEP
    assert (callback.compression is None) == (step >= CUT_STEP)
    same_weights(trainer.model, finished[0].model, rtol=1e-6, atol=1e-7)
    assert trainer.model.peft_config["default"].to_dict() == finished[0].model.peft_config["default"].to_dict()
    logs = [[log["loss"] for log in one.state.log_history if "loss" in log] for one in (trainer, finished[0])]
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    assert hooks_of(trainer.model) == []


@pytest.mark.parametrize("step", [CUT_STEP - 3, AFTER])
def test_resuming_with_fim_ranks_for_the_wide_adapter(tmp_path, step):
    def trained(folder, checkpoint=None):
        fim_ranks = {"init_lora_weights": "fim", "fim_config": FimConfig(score="mean", fim_calibration_batches=2)}
        trainer = trainer_of(folder, [FimCompressionCallback(**CUT)], wide_model(**fim_ranks))
        allocation = initialize_lora_fim_ranks_for_trainer(trainer, resume_from_checkpoint=checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.model, allocation

    model, allocation = trained(tmp_path / "whole")
    assert len(set(allocation.ranks.values())) > 1
    resumed_model, again = trained(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert again.ranks == allocation.ranks
    same_weights(resumed_model, model, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", [CUT_STEP - 3, AFTER])
def test_resuming_sft(tmp_path, step):
    whole = sft_trainer_of(tmp_path / "whole", [FimCompressionCallback(**CUT)])
    whole.train()
    trainer, _ = resumed(
        tmp_path / "resumed",
        tmp_path / "whole" / f"checkpoint-{step}",
        FimCompressionCallback(**CUT),
        sft_trainer_of,
    )
    same_weights(trainer.model, whole.model, rtol=1e-6, atol=1e-7)


def own_optimizer(model):
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def test_resuming_with_an_optimizer_of_ones_own(tmp_path):
    """It holds the parameters of all layers, before the trainer loads the checkpoint."""
    models = []
    for checkpoint in (None, tmp_path / "whole" / f"checkpoint-{AFTER}"):
        model = wide_model()
        trainer = trainer_of(
            tmp_path / ("whole" if checkpoint is None else "resumed"),
            [FimCompressionCallback(**(CUT | {"r": 1}))],
            model,
            optimizers=own_optimizer(model),
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        models.append(model)
    assert len(adapter_weights(models[0])) < len(adapter_weights(wide_model()))
    same_weights(*models, rtol=1e-6, atol=1e-7)


def test_resuming_between_the_first_recorded_step_and_the_cut(tmp_path):
    whole = trainer_of(tmp_path / "whole", [FimCompressionCallback(**(CUT | {"num_batches": 4}))], save_steps=5)
    whole.train()
    callback = FimCompressionCallback(**(CUT | {"num_batches": 4}))
    with pytest.warns(UserWarning, match="Only 1 micro-batches run between step 5 and the cut at step 6"):
        resumed(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-5", callback)
    assert callback.compression.criterion == "Fisher information of 2 examples in 1 batches"


def test_resuming_with_restored_callbacks(finished, tmp_path):
    trainer, _ = resumed(tmp_path, checkpoint_of(finished, AFTER), restore_callback_states_from_checkpoint=True)
    same_weights(trainer.model, finished[0].model, rtol=1e-6, atol=1e-7)
    assert not trainer.model._load_state_dict_pre_hooks


def test_the_resumed_training_can_be_resumed(finished, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == AFTER

    first = trainer_of(tmp_path, [FimCompressionCallback(**(CUT | {"r": 1}), wide_scale=0.5), Stop()], save_steps=1)
    first.train(resume_from_checkpoint=checkpoint_of(finished, CUT_STEP))
    assert first.state.global_step == AFTER
    trainer, _ = resumed(tmp_path, tmp_path / f"checkpoint-{AFTER}")
    same_weights(trainer.model, finished[0].model, rtol=1e-6, atol=1e-7)


def test_a_longer_training_does_not_cut_again(finished, tmp_path):
    """With twice the steps the cut would come after step 12, but the checkpoint of step 9 was cut already."""
    trainer, callback = resumed(tmp_path, checkpoint_of(finished, AFTER), max_steps=2 * STEPS)
    assert trainer.state.global_step == 2 * STEPS
    assert callback.cut_at_step == CUT_STEP
    assert ranks_in(trainer.model) == {name: rank for name, rank in finished[1].ranks.items() if rank}


# --- Checkpoints of another run ---


def test_resuming_with_another_size_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="was cut to r=1, and the callback has r=2"):
        resumed(tmp_path, checkpoint_of(finished, AFTER), FimCompressionCallback(**CUT))


def test_a_wide_checkpoint_of_a_training_without_the_callback(tmp_path):
    trainer_of(tmp_path / "without", []).train()
    with pytest.raises(ValueError, match=r"of step 9, after the cut at step 6 .* has not been cut"):
        resumed(tmp_path / "late", tmp_path / "without" / f"checkpoint-{AFTER}", FimCompressionCallback(**CUT))
    trainer, callback = resumed(
        tmp_path / "early", tmp_path / "without" / "checkpoint-3", FimCompressionCallback(**CUT)
    )
    assert callback.cut_at_step == CUT_STEP
    assert max(ranks_in(trainer.model).values()) <= WIDE
    assert sum(ranks_in(trainer.model).values()) < NARROW * 2 * 6


def test_a_wide_checkpoint_does_not_fit_into_a_model_that_was_cut(finished, tmp_path):
    callback = FimCompressionCallback(**CUT)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == AFTER:
                raise KeyboardInterrupt

    trainer = trainer_of(tmp_path, [callback, Break()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = adapter_weights(trainer.model)
    with pytest.raises(ValueError, match=r"saved before the adapter was cut, .* Create model and trainer again"):
        trainer.train(resume_from_checkpoint=checkpoint_of(finished, 3))
    torch.testing.assert_close(adapter_weights(trainer.model), before, rtol=0, atol=0)

"""What `FimCompressionCallback` refuses before the training, and what it warns of."""

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from fim_lora import FimCompressionCallback, FimConfig
from helpers.adapters import hooks_of
from helpers.wide_trainers import CUT, NARROW, WIDE, Probe, adapter_weights, trainer_of, wide_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": 2.0}, "r must be an integer"),
        ({"num_batches": 0}, "num_batches must be an integer of at least 1, got 0"),
        ({"at": 0}, "at must be between 0 and 1"),
        ({"at": 1.0}, "at must be between 0 and 1"),
        ({"at": float("nan")}, "at must be between 0 and 1"),
        ({"wide_scale": 0}, "wide_scale must be positive and finite"),
        ({"wide_scale": float("inf")}, "wide_scale must be positive and finite"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FimCompressionCallback(**({"r": 2} | options))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ({"r": WIDE}, "The adapter has r=8 .* and r=8 of the callback .* nothing to cut"),
        ({"r": 16}, "The adapter has r=8 .* and r=16 of the callback"),
        ({"at": 0.01}, "at=0.01 of max_steps=12 would cut the adapter after step 1"),
        ({"adapter_name": "other"}, "no adapter 'other'"),
    ],
)
def test_a_training_that_cannot_be_cut_does_not_begin(tmp_path, callback, message):
    trainer = trainer_of(tmp_path, [FimCompressionCallback(**(CUT | callback))])
    before = adapter_weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    torch.testing.assert_close(adapter_weights(trainer.model), before, rtol=0, atol=0)
    assert hooks_of(trainer.model) == []


def test_an_adapter_that_awaits_its_ranks(tmp_path):
    model = wide_model(init_lora_weights="fim", fim_config=FimConfig())
    trainer = trainer_of(tmp_path, [FimCompressionCallback(**CUT)], model)
    with pytest.raises(ValueError, match="still awaits its ranks"):
        trainer.train()


def test_an_optimizer_without_the_adapter(tmp_path):
    model = wide_model(modules_to_save=["lm_head"])
    head = [weight for name, weight in model.named_parameters() if "lm_head" in name and weight.requires_grad]
    optimizer = torch.optim.SGD(head, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)
    trainer = trainer_of(tmp_path, [FimCompressionCallback(**CUT)], model, optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="The optimizer holds no parameter of adapter 'default'"):
        trainer.train()


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_trainer_that_shards(tmp_path, monkeypatch, kind):
    """Accelerate does not shard on a CPU, so the kind is set at the last moment."""
    shard = Probe(on_train_begin=lambda *_: monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind))
    trainer = trainer_of(tmp_path, [shard, FimCompressionCallback(**CUT)])
    with pytest.raises(ValueError, match=f"uses {kind.value}, in which the shapes of an adapter cannot change"):
        trainer.train()


def test_several_gpus_in_one_process(tmp_path):
    class TwoGpus(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            args._n_gpu = 2

    trainer = trainer_of(tmp_path, [TwoGpus(), FimCompressionCallback(**CUT)])
    with pytest.raises(ValueError, match="runs 2 GPUs in one process"):
        trainer.train()


def test_too_few_batches_before_the_cut(tmp_path):
    trainer = trainer_of(tmp_path, [callback := FimCompressionCallback(r=NARROW, at=0.2)])
    with pytest.warns(UserWarning, match="Only 2 micro-batches run between step 1 and the cut at step 3"):
        trainer.train()
    assert callback.compression.criterion == "Fisher information of 4 examples in 2 batches"


def test_a_share_that_is_a_whole_number_of_steps_is_not_rounded_up(tmp_path):
    assert 0.07 * 100 > 7  # in floating point
    callback = FimCompressionCallback(r=NARROW, at=0.07, num_batches=2)
    trainer_of(tmp_path, [callback], max_steps=100, save_strategy="no", logging_strategy="no").train()
    assert callback.cut_at_step == 7

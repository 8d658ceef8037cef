"""`FimCompressionCallback` in `Trainer` and in SFT and DPO of TRL: the cut, what is recorded, and what goes on."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from fim_lora import FimCompressionCallback, FimConfig, compress_lora, initialize_lora_fim_ranks_for_trainer
from fim_lora.trainer.trainer_kinds import rows_per_example_in_batches
from helpers.adapters import hooks_of, logits, lora_layers, ranks_in
from helpers.own_warnings import UNCERTAIN_ROWS
from helpers.tiny_models import llama
from helpers.trained_adapters import spectrum_by_gates
from helpers.trainers import NEWER_TRAINERS
from helpers.wide_trainers import (
    CUT,
    CUT_STEP,
    NARROW,
    STEPS,
    WIDE,
    Probe,
    WatchedTrainer,
    adapter_weights,
    compressed_on,
    dpo_trainer_of,
    same_weights,
    sft_trainer_of,
    trainer_of,
    wide_model,
)

# The weights stay, so that a calibration after the training sees what the recorder saw.
FROZEN = {"learning_rate": 0.0, "lr_scheduler_type": "constant"}


def parameters_of(model):
    return sum(weight.numel() for weight in adapter_weights(model).values())


def size_of_uniform(rank):
    return parameters_of(wide_model(r=rank))


# --- The cut is that of `compress_lora` on the trainer's own passes ---

WAYS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    "flattened": {},
}


class Flattened(nn.Module):
    """Gives a module the positions of all examples as rows, as models of experts do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).view_as(x)


def base_for(way):
    model = llama()
    if way == "flattened":
        for layer in model.model.layers:
            layer.mlp = Flattened(layer.mlp)
    return model


@NEWER_TRAINERS
@UNCERTAIN_ROWS
@pytest.mark.parametrize("way", WAYS)
def test_the_cut_is_that_of_a_calibration_on_the_last_batches(tmp_path, way):
    model = wide_model(base_for(way), filled=True)
    reference = copy.deepcopy(model)
    callback = FimCompressionCallback(**(CUT | {"num_batches": 4}))
    trainer = trainer_of(tmp_path, [callback], model, WatchedTrainer, **FROZEN, **WAYS[way])
    trainer.train()

    first = CUT_STEP - (2 if way == "accumulated" else 4)
    batches = [batch for step, batch in trainer.seen if first <= step < CUT_STEP]
    assert len(batches) == 4
    expected = compressed_on(reference, batches)
    assert callback.cut_at_step == CUT_STEP
    assert callback.compression.ranks == expected.ranks
    assert len(set(expected.ranks.values())) > 1
    assert callback.compression.criterion == expected.criterion
    same_weights(model, reference, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=1e-3)
    # Other batches lead to another adapter.
    other = wide_model(base_for(way), filled=True)
    compressed_on(other, [batch for step, batch in trainer.seen if step >= CUT_STEP][:4])
    assert (logits(other) - logits(reference)).abs().max() > 1e-2


def test_an_example_of_dpo_is_a_pair(tmp_path):
    callback = FimCompressionCallback(**CUT)
    trainer = dpo_trainer_of(tmp_path, [callback], **FROZEN)
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.3)
    reference = copy.deepcopy(trainer.model)
    batches = []
    compute_loss = trainer.compute_loss

    def watched(model, inputs, *args, **options):
        batches.append(inputs)
        return compute_loss(model, inputs, *args, **options)

    trainer.compute_loss = watched
    trainer.train()
    trainer.model = reference
    spectrum = spectrum_by_gates(
        reference,
        batches[CUT_STEP - 2 : CUT_STEP],
        forward_fn=compute_loss,
        sequences_per_example=rows_per_example_in_batches(trainer),
    )
    assert compress_lora(reference, spectrum, r=NARROW).ranks == callback.compression.ranks
    assert callback.compression.criterion == "Fisher information of 4 examples in 2 batches"


def test_dpo_of_an_adapter_whose_reference_has_the_same_config_object(tmp_path):
    callback = FimCompressionCallback(**CUT)
    trainer = dpo_trainer_of(tmp_path, [callback], wide_model())
    if "ref" not in trainer.model.peft_config:
        pytest.skip("this TRL has no adapter as reference")
    assert trainer.model.peft_config["ref"] is trainer.model.peft_config["default"]
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert trainer.model.peft_config["ref"].r == WIDE
    assert trainer.model.peft_config["default"].r == max(callback.compression.ranks.values())
    ranks = {name: layer.r["ref"] for name, layer in lora_layers(trainer.model).items()}
    assert ranks == dict.fromkeys(ranks, WIDE)


@pytest.mark.parametrize("make", [trainer_of, sft_trainer_of, dpo_trainer_of])
def test_a_training_ends_with_an_adapter_of_the_size(tmp_path, make):
    callback = FimCompressionCallback(**CUT)
    trainer = make(tmp_path, [callback])
    sizes = []
    trainer.add_callback(Probe(on_step_end=lambda state, kwargs: sizes.append(parameters_of(kwargs["model"]))))
    wide = parameters_of(trainer.model)
    trainer.train()
    assert wide == size_of_uniform(WIDE)
    assert sizes[: CUT_STEP - 1] == [wide] * (CUT_STEP - 1)
    assert sizes[CUT_STEP - 1 :] == [sizes[-1]] * (STEPS - CUT_STEP + 1)
    assert 0.8 * size_of_uniform(NARROW) < sizes[-1] <= size_of_uniform(NARROW)
    assert callback.compression.num_parameters == sizes[-1]
    assert callback.compression.predicted is None
    assert max(callback.compression.ranks.values()) > NARROW
    assert trainer.state.global_step == STEPS


def test_a_wide_adapter_with_fim_ranks_is_cut(tmp_path):
    """The size after the cut is that of a uniform rank, however the ranks of the wide adapter differ."""
    model = wide_model(init_lora_weights="fim", fim_config=FimConfig(fim_calibration_batches=2))
    trainer = trainer_of(tmp_path, [], model=model)
    wide = initialize_lora_fim_ranks_for_trainer(trainer, show_progress_bar=False)
    assert len(set(wide.ranks.values())) > 1
    sizes = []
    trainer.add_callback(FimCompressionCallback(**CUT))
    trainer.add_callback(Probe(on_step_end=lambda state, kwargs: sizes.append(parameters_of(kwargs["model"]))))
    trainer.train()
    assert sizes[: CUT_STEP - 1] == [wide.num_parameters] * (CUT_STEP - 1)
    assert 0.9 * size_of_uniform(NARROW) < sizes[-1] <= size_of_uniform(NARROW)


def test_in_bfloat16(tmp_path):
    callback = FimCompressionCallback(**CUT)
    trainer = trainer_of(tmp_path, [callback], bf16=True)
    trainer.train()
    assert parameters_of(trainer.model) <= size_of_uniform(NARROW)
    assert {weight.dtype for weight in adapter_weights(trainer.model).values()} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in adapter_weights(trainer.model).values())


def test_a_compiled_model_is_cut_in_the_same_way(tmp_path):
    ends = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_of(
            tmp_path / str(len(compiled)), [FimCompressionCallback(**CUT)], wide_model(llama(1)), **compiled
        )
        trainer.train()
        ends.append(adapter_weights(trainer.model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)
    torch.compiler.reset()


# --- The training goes on ---


def test_nothing_jumps_where_nothing_of_importance_is_dropped(tmp_path):
    """Six of the eight components are zero, so the losses are those of a training without the callback."""
    losses = []
    for callbacks in ([], [FimCompressionCallback(**CUT, wide_scale=1.0)]):
        model = wide_model(filled=True)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight[:, NARROW:] = 0
                elif "lora_A" in name:
                    weight[NARROW:] *= 1e-3  # B learns little there
        trainer = trainer_of(tmp_path / str(len(callbacks)), callbacks, model, learning_rate=1e-3)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    without, cut = losses
    assert cut[:CUT_STEP] == without[:CUT_STEP]
    assert cut[CUT_STEP:] != without[CUT_STEP:]
    assert cut[CUT_STEP:] == pytest.approx(without[CUT_STEP:], rel=5e-4)


def test_adam_goes_on_with_its_state(tmp_path):
    states = []

    def note(state, kwargs):
        inner = kwargs["optimizer"].optimizer
        weights = [weight for group in inner.param_groups for weight in group["params"]]
        states.append(
            [(inner.state[weight]["step"].item(), inner.state[weight]["exp_avg"].shape) for weight in weights]
        )
        assert [shape for _, shape in states[-1]] == [weight.shape for weight in weights]

    trainer = trainer_of(tmp_path, [FimCompressionCallback(**CUT), Probe(on_step_end=note)])
    trainer.train()
    assert [{step for step, _ in state} for state in states] == [{float(step)} for step in range(1, STEPS + 1)]
    trained = {id(weight) for weight in trainer.model.parameters() if weight.requires_grad}
    held = {id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]}
    assert held == trained


@pytest.mark.parametrize(
    ("options", "scale"), [({}, NARROW / WIDE), ({"wide_scale": 0.5}, 0.5)], ids=["default", "given"]
)
def test_the_adapter_alone_has_a_smaller_rate_until_the_cut(tmp_path, options, scale):
    """A head shares the group of the adapter. In the truth it has its own, and the adapter's rate is set by hand."""
    weights, rates = {}, []
    for name in ("truth", "callback"):
        model = wide_model(modules_to_save=["lm_head"])
        adapter = [weight for key, weight in model.named_parameters() if "lora_" in key]
        head = [weight for key, weight in model.named_parameters() if "lm_head" in key and weight.requires_grad]
        groups = [adapter + head] if name == "callback" else [adapter, head]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=0.01, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # it multiplies the rates that it finds
        note = Probe(on_step_end=lambda state, kwargs: weights.update({(name, state.global_step): copied(kwargs)}))  # noqa: B023
        if name == "truth":
            by_hand(optimizer, scale)
        else:
            optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
        callbacks = [FimCompressionCallback(**CUT, **options)] if name == "callback" else []
        trainer = trainer_of(tmp_path / name, [note, *callbacks], model, optimizers=(optimizer, scheduler))
        trainer.train()
    # `note` comes first, so it sees the wide adapter at the step of the cut.
    torch.testing.assert_close(weights["callback", CUT_STEP], weights["truth", CUT_STEP], rtol=1e-4, atol=1e-6)
    assert rates == pytest.approx([0.01 * 0.5**step for step in range(STEPS)], rel=1e-12)
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert logged == pytest.approx([0.01 * 0.5**step for step in range(STEPS)], rel=1e-6)
    before, after = (weights["callback", step] for step in (CUT_STEP, CUT_STEP + 1))
    moved = {name: (after[name] - before[name]).abs().max() for name in after if "lm_head" in name}
    assert all(move == pytest.approx(0.01 * 0.5**CUT_STEP, rel=0.5) for move in moved.values())


def copied(kwargs):
    return {name: one.detach().clone() for name, one in kwargs["model"].named_parameters() if one.requires_grad}


def by_hand(optimizer, scale):
    """Scale the rate of the first group, around every step."""

    def scaled(own, *_):
        own.param_groups[0]["lr"] *= scale

    def restored(own, *_):
        own.param_groups[0]["lr"] /= scale

    optimizer.register_step_pre_hook(scaled)
    optimizer.register_step_post_hook(restored)


def test_the_adapter_has_the_whole_rate_after_the_cut(tmp_path):
    """By SGD a weight moves by the rate times its gradient, and before the cut by a quarter of that."""
    model = wide_model(filled=True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    before, gradients, ratios = [], [], []

    def note_before(*unused):
        before[:] = [weight.detach().clone() for weight in trained]
        gradients[:] = [None if weight.grad is None else weight.grad.clone() for weight in trained]

    def note(state, kwargs):
        found = zip(before, trained, gradients, strict=True)
        ratios.append([((old - new).norm() / grad.norm()).item() for old, new, grad in found if grad is not None])

    optimizer.register_step_pre_hook(note_before)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1)
    callbacks = [Probe(on_step_end=note), FimCompressionCallback(**CUT)]
    trainer_of(tmp_path, callbacks, model, optimizers=(optimizer, scheduler)).train()
    for step, of_step in enumerate(ratios):
        rate = 1e-3 * (NARROW / WIDE if step < CUT_STEP else 1)
        assert of_step == pytest.approx([rate] * len(of_step), rel=2e-3)


def test_hooks_are_removed(tmp_path):
    trainer = trainer_of(tmp_path, [FimCompressionCallback(**CUT)])
    hooks = []
    trainer.add_callback(Probe(on_step_end=lambda state, kwargs: hooks.append(len(hooks_of(kwargs["model"])))))
    trainer.train()
    assert [number > 0 for number in hooks] == [CUT_STEP - 2 < step < CUT_STEP for step in range(1, STEPS + 1)]
    assert not trainer.model._load_state_dict_pre_hooks


def test_the_best_checkpoint_is_one_after_the_cut(tmp_path):
    """The metric falls all the time, so the best evaluation of all is the first."""
    scores = iter(range(100, 0, -1))
    trainer = trainer_of(
        tmp_path,
        [FimCompressionCallback(**CUT)],
        compute_metrics=lambda _: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    at_cut = {}
    trainer.add_callback(
        Probe(on_save=lambda state, kwargs: at_cut.update({state.global_step: adapter_weights(kwargs["model"])}))
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{CUT_STEP}")
    torch.testing.assert_close(adapter_weights(trainer.model), at_cut[CUT_STEP])
    assert not torch.equal(*(next(iter(weights.values())) for weights in (at_cut[CUT_STEP], at_cut[STEPS])))


def test_training_again_does_not_cut_again(tmp_path):
    callback = FimCompressionCallback(**CUT)
    trainer = trainer_of(tmp_path, [callback])
    trainer.train()
    first, ranks = callback.compression, ranks_in(trainer.model)
    trainer.train()
    assert callback.compression is first
    assert ranks_in(trainer.model) == ranks


def test_a_training_that_stops_before_the_cut(tmp_path):
    trainer = trainer_of(tmp_path, [callback := FimCompressionCallback(**CUT)])

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == CUT_STEP - 1

    trainer.add_callback(Stop())
    with pytest.warns(UserWarning, match="stopped at step 5, before the cut at step 6"):
        trainer.train()
    assert callback.compression is None
    assert set(ranks_in(trainer.model).values()) == {WIDE}
    assert hooks_of(trainer.model) == []

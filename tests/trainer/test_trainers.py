"""transformers' `Trainer`, and SFT and DPO of TRL, on a tiny model: scores by autograd, checkpoints, resuming."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import Trainer

from fim_lora import InvalidFileError, RankAllocation
from helpers.cli_inputs import texts
from helpers.own_warnings import SAVED_WITHOUT_RANKS, WITHOUT_RANKS
from helpers.tiny_models import llama, names_of, per_example_scores
from helpers.trainers import (
    NEWER_TRAINERS,
    NUM_EXAMPLES,
    TARGETS,
    allocate,
    arguments,
    assert_scores_are,
    config,
    dpo_trainer,
    examples,
    plain_trainer,
    reward_trainer,
    sft_trainer,
)


def adapter_weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


# --- Scores ---


@NEWER_TRAINERS
def test_scores_of_a_trainer_are_those_of_its_data(tmp_path):
    batches = [{key: value[None] for key, value in one.items()} for one in examples()]
    truth = per_example_scores(llama(), batches, names_of(llama(), *TARGETS))
    assert_scores_are(allocate(plain_trainer(tmp_path)), truth)


def test_scores_with_the_collator_and_loss_of_the_trainer(tmp_path):
    class Halved(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs) / 2

    def reversed_ids(rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        return {key: value.flip(1) for key, value in batch.items()}

    model = get_peft_model(llama(), config())
    trainer = Halved(model=model, args=arguments(tmp_path), train_dataset=examples(), data_collator=reversed_ids)
    batches = [{key: value[None].flip(1) for key, value in one.items()} for one in examples()]
    truth = per_example_scores(llama(), batches, names_of(llama(), *TARGETS))
    assert_scores_are(allocate(trainer), {name: values / 4 for name, values in truth.items()})


@NEWER_TRAINERS
def test_scores_of_sft(tmp_path):
    trainer = sft_trainer(tmp_path)
    batches = [{"input_ids": torch.tensor([row["input_ids"]])} for row in trainer.train_dataset]
    batches = [batch | {"labels": batch["input_ids"]} for batch in batches]
    truth = per_example_scores(llama(), batches, names_of(llama(), *TARGETS))
    assert_scores_are(allocate(trainer), truth)


def ids_of(row, kind):
    """The token ids of a text, whose column had a longer name before TRL 1.0."""
    return row[f"{kind}_ids"] if f"{kind}_ids" in row else row[f"{kind}_input_ids"]


def test_an_example_of_dpo_is_a_pair(tmp_path):
    trainer = dpo_trainer(tmp_path)
    rows = list(trainer.train_dataset)
    model = llama().double().eval()
    weights = {name: model.get_submodule(name).weight for name in names_of(model, *TARGETS)}
    truth = {name: [] for name in weights}
    for row in rows:
        # The adapter starts at the reference, where the loss is -log sigmoid(beta * difference) at a difference of 0.
        difference = log_probability(model, row, "chosen") - log_probability(model, row, "rejected")
        gradients = torch.autograd.grad(-0.5 * trainer.args.beta * difference, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            truth[name].append(gradient.square().mean().item())
    truth = {name: torch.tensor(values, dtype=torch.float64) for name, values in truth.items()}
    assert_scores_are(allocate(trainer), truth)


def log_probability(model, row, completion):
    prompt, rest = ids_of(row, "prompt"), ids_of(row, completion)
    ids = torch.tensor([prompt + rest])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(rest), reduction="sum")


def test_an_example_of_a_reward_model_is_a_pair(tmp_path):
    words = texts(2 * NUM_EXAMPLES, 6)
    rejected = [text[: 4 + 3 * (i % 3)].rstrip() for i, text in enumerate(words[NUM_EXAMPLES:])]
    trainer = reward_trainer(tmp_path, {"chosen": words[:NUM_EXAMPLES], "rejected": rejected})
    rows = list(trainer.train_dataset)
    allocation = allocate(trainer)

    # B is zero, so the adapted model is the base model with the head that is trained.
    model = trainer.model.double().eval()
    weights = {name: model.base_model.model.get_submodule(name).base_layer.weight for name in allocation.scores}
    truth = {name: [] for name in weights}
    for weight in weights.values():
        weight.requires_grad_(True)
    for row in rows:
        rewards = [model(input_ids=torch.tensor([ids_of(row, kind)])).logits.sum() for kind in ("chosen", "rejected")]
        gradients = torch.autograd.grad(-F.logsigmoid(rewards[0] - rewards[1]), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            truth[name].append(gradient.square().mean().item())
    assert_scores_are(allocation, {name: torch.tensor(values) for name, values in truth.items()})


def test_bfloat16_of_the_trainer_is_that_of_the_calibration(tmp_path):
    exact = allocate(plain_trainer(tmp_path / "float32")).scores
    coarse = allocate(plain_trainer(tmp_path / "bfloat16", bf16=True)).scores
    for name, score in exact.items():
        assert coarse[name].mean != score.mean
        assert coarse[name].mean == pytest.approx(score.mean, rel=0.1)


# --- Training, checkpoints, resuming ---


@pytest.mark.parametrize("make", [plain_trainer, sft_trainer, dpo_trainer])
def test_training_after_the_allocation(tmp_path, make):
    trainer = make(tmp_path)
    allocation = allocate(trainer)
    assert len(set(allocation.ranks.values())) > 1
    start = adapter_weights(trainer.model)
    trainer.train()
    end = adapter_weights(trainer.model)
    assert not any(torch.equal(start[name], end[name]) for name in start)
    trainer.save_model(tmp_path / "final")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "final")
    assert loaded.peft_config["default"].rank_pattern == allocation.rank_pattern
    torch.testing.assert_close(adapter_weights(loaded), end)
    assert RankAllocation.load(tmp_path / "fim_allocation.json").ranks == allocation.ranks


@pytest.mark.parametrize("make", [plain_trainer, sft_trainer, dpo_trainer])
@pytest.mark.parametrize("last", [False, True])
def test_resuming_ends_where_an_uninterrupted_run_ends(tmp_path, make, last):
    # The first run stops after two of four steps.
    whole = make(tmp_path / "whole", lr_scheduler_type="constant")
    interrupted = make(tmp_path / "resumed", lr_scheduler_type="constant", max_steps=2)
    for trainer in (whole, interrupted):
        allocate(trainer)
        trainer.train()

    checkpoint = True if last else str(tmp_path / "resumed" / "checkpoint-2")
    resumed = make(tmp_path / "resumed", lr_scheduler_type="constant")
    allocate(resumed, resume_from_checkpoint=checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 4
    torch.testing.assert_close(adapter_weights(resumed.model), adapter_weights(whole.model))


def test_resuming_from_the_checkpoint_of_another_folder(tmp_path):
    first = plain_trainer(tmp_path / "first")
    allocation = allocate(first)
    first.train()
    written = (tmp_path / "first" / "fim_allocation.json").read_bytes()
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    second = plain_trainer(tmp_path / "second", max_steps=6)
    allocate(second, resume_from_checkpoint=checkpoint)
    second.train(resume_from_checkpoint=checkpoint)
    assert (tmp_path / "first" / "fim_allocation.json").read_bytes() == written
    # The second folder can be resumed from by itself.
    third = plain_trainer(tmp_path / "second", max_steps=8)
    assert allocate(third, resume_from_checkpoint=True).ranks == allocation.ranks


def test_resuming_with_another_config_is_refused(tmp_path):
    trainer = plain_trainer(tmp_path)
    allocate(trainer)
    trainer.train()
    written = (tmp_path / "fim_allocation.json").read_bytes()
    other = plain_trainer(tmp_path, config(r_max=5))
    with pytest.raises(ValueError, match=r"other ranks than .*fim_allocation.json"):
        allocate(other, resume_from_checkpoint=True)
    assert other.model.peft_config["default"].init_lora_weights == "fim"
    assert (tmp_path / "fim_allocation.json").read_bytes() == written


def test_resuming_without_anything_to_resume(tmp_path):
    trainer = plain_trainer(tmp_path / "new")
    with pytest.raises(ValueError, match="no checkpoint in"):
        allocate(trainer, resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="fim_allocation"):
        allocate(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    (tmp_path / "fim_allocation.json").write_text("{}")
    with pytest.raises(InvalidFileError):
        allocate(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert trainer.model.peft_config["default"].init_lora_weights == "fim"


# --- What stays, and what is refused ---


@pytest.mark.parametrize("make", [sft_trainer, dpo_trainer])
def test_metrics_of_the_calibration_reach_no_log(tmp_path, make):
    logs = []
    for allocated in (True, False):
        trainer = make(tmp_path / str(allocated))
        if allocated:
            allocate(trainer)
        assert not trainer.accelerator.gradient_state.in_dataloader
        # The output is that of the base model in both cases, so the evaluation is the same.
        trainer.evaluate(trainer.train_dataset.select(range(2)))
        log = trainer.state.log_history[-1]
        logs.append({key: value for key, value in log.items() if "time" not in key and "per_second" not in key})
    assert len(logs[0]) > 3
    assert logs[0] == pytest.approx(logs[1], rel=1e-5, abs=1e-6)


@WITHOUT_RANKS
@SAVED_WITHOUT_RANKS
def test_a_trainer_that_has_trained_is_refused(tmp_path):
    trainer = plain_trainer(tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match=r"has taken steps|has prepared its model"):
        allocate(trainer)
    assert not (tmp_path / "fim_allocation.json").exists()


def test_merged_adapters_are_refused(tmp_path):
    trainer = plain_trainer(tmp_path)
    trainer.model.merge_adapter()
    with pytest.raises(ValueError, match=r"are merged .*unmerge_adapter\(\)"):
        allocate(trainer)
    assert not (tmp_path / "fim_allocation.json").exists()
    trainer.model.unmerge_adapter()
    allocate(trainer)


def test_an_optimizer_of_the_user_stays_valid(tmp_path):
    torch.manual_seed(3)
    model = get_peft_model(llama(), config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=examples(), optimizers=(optimizer, None))
    allocate(trainer)
    start = adapter_weights(model)
    trainer.train()
    assert not any(torch.equal(start[name], value) for name, value in adapter_weights(model).items())
    with pytest.raises(ValueError, match="does not await"):
        allocate(trainer)


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_model_and_file_as_they_were(tmp_path, monkeypatch, existing):
    file = tmp_path / "fim_allocation.json"
    if existing:
        file.write_text("of an earlier run")
    trainer = plain_trainer(tmp_path)
    weights = adapter_weights(trainer.model)
    layer = trainer.model.base_model.model.model.layers[1].self_attn.v_proj

    def fail(*args, **kwargs):
        raise MemoryError("no memory for the new weights")

    monkeypatch.setattr(layer, "update_layer", fail)
    with pytest.raises(MemoryError):
        allocate(trainer)
    assert (file.read_text() if file.exists() else None) == ("of an earlier run" if existing else None)
    torch.testing.assert_close(adapter_weights(trainer.model), weights, rtol=0, atol=0)

    monkeypatch.undo()
    monkeypatch.setattr(RankAllocation, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        allocate(trainer)
    assert (file.read_text() if file.exists() else None) == ("of an earlier run" if existing else None)
    torch.testing.assert_close(adapter_weights(trainer.model), weights, rtol=0, atol=0)
    assert trainer.model.peft_config["default"].init_lora_weights == "fim"


def test_the_checkpoint_is_a_stock_adapter(tmp_path):
    trainer = plain_trainer(tmp_path)
    allocation = allocate(trainer)
    trainer.train()
    written = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == allocation.rank_pattern
    assert "fim_config" not in written
    assert written["init_lora_weights"] is True

"""Losses that are divided by the number of items, and the other trainers of TRL: right, or refused by name."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from fim_lora import FimCompressionCallback, initialize_lora_fim_ranks
from helpers.cli_inputs import CHAT_TEMPLATE, texts, word_tokenizer
from helpers.tiny_models import llama, lm_batches, names_of, per_example_scores, token_batch
from helpers.trainers import NUM_EXAMPLES, TARGETS, allocate, arguments, assert_scores_are, config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


def padded_examples():
    """Examples of unequal lengths, so that each batch has its own number of tokens."""
    batch = token_batch(NUM_EXAMPLES, 10)
    return [{key: value[row] for key, value in batch.items()} for row in range(NUM_EXAMPLES)]


def sum_over_items(outputs, labels, num_items_in_batch):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class DividingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return sum_over_items(model(**inputs), labels, num_items_in_batch)


LOSSES = {
    "the model's": (Trainer, {}),
    "compute_loss": (DividingTrainer, {}),
    "compute_loss_func": (Trainer, {"compute_loss_func": sum_over_items}),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_gpus", [0, 2])
def test_a_loss_over_the_number_of_items_is_the_mean_of_its_batch(tmp_path, loss, num_gpus):
    seen = []

    def collate(rows):
        seen.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        return dict(seen[-1])

    kind, options = LOSSES[loss]
    # A training step divides by the number of items of both micro-batches.
    own = arguments(tmp_path, gradient_accumulation_steps=2)
    model = get_peft_model(llama(), config())
    trainer = kind(model=model, args=own, train_dataset=padded_examples(), data_collator=collate, **options)
    own._n_gpu = num_gpus
    allocation = allocate(trainer)
    assert_scores_are(allocation, per_example_scores(llama(), seen, names_of(llama(), *TARGETS)))
    assert (own.average_tokens_across_devices, own.n_gpu) == (True, num_gpus)


# --- Trainers of pairs and of single texts with a label ---


def preferences():
    words = texts(3 * NUM_EXAMPLES, 4)
    return {
        "prompt": words[:NUM_EXAMPLES],
        "chosen": [f" {text}" for text in words[NUM_EXAMPLES : 2 * NUM_EXAMPLES]],
        # Of different lengths, and padded.
        "rejected": [f" {text[: 3 + 3 * (i % 3)].rstrip()}" for i, text in enumerate(words[2 * NUM_EXAMPLES :])],
    }


def made(kind, own_config, folder, rows, **options):
    torch.manual_seed(3)
    extra = options.pop("extra", {})
    return kind(
        model=llama(),
        args=arguments(folder, own_config, bf16=False, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=word_tokenizer(CHAT_TEMPLATE),
        **({"peft_config": config()} | extra),
    )


def truth_of(trainer, loss_of):
    """`mean(G_t ∘ G_t)` of every row of the trainer's data, by autograd in float64."""
    model = llama().double().eval()
    weights = {name: model.get_submodule(name).weight for name in names_of(model, *TARGETS)}
    values = {name: [] for name in weights}
    for row in trainer.train_dataset:
        gradients = torch.autograd.grad(loss_of(model, row), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            values[name].append(gradient.square().mean().item())
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def log_probabilities(model, ids, first):
    """Of the tokens from the position `first` on."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(ids[first:]), reduction="none")


def test_scores_of_kto(tmp_path):
    rows = preferences()
    rows = {"prompt": rows["prompt"], "completion": rows["rejected"], "label": [True, False] * (NUM_EXAMPLES // 2)}
    trainer = made(KTOTrainer, KTOConfig, tmp_path, rows)

    def loss_of(model, row):
        # The adapter starts at the reference, where the loss is 1 - sigmoid(±beta * difference) at a difference of 0.
        log_probability = log_probabilities(model, row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"]))
        sign = 1 if row["label"] else -1
        return -0.25 * sign * trainer.args.beta * log_probability.sum()

    assert_scores_are(allocate(trainer), truth_of(trainer, loss_of))


def sequence_log_probabilities(model, row, kind):
    labels = row[f"{kind}_labels"]
    return log_probabilities(model, row[f"{kind}_input_ids"], labels.count(-100))


def loss_of_cpo(trainer, model, row):
    chosen, rejected = (sequence_log_probabilities(model, row, kind) for kind in ("chosen", "rejected"))
    difference = trainer.args.beta * (chosen.sum() - rejected.sum())
    return -F.logsigmoid(difference) - trainer.args.cpo_alpha * chosen.mean()


def loss_of_orpo(trainer, model, row):
    means = [sequence_log_probabilities(model, row, kind).mean() for kind in ("chosen", "rejected")]
    log_odds = [mean - torch.log(-torch.expm1(mean)) for mean in means]
    likelihood = log_probabilities(model, row["chosen_input_ids"], 1).mean()
    return -likelihood - trainer.args.beta * F.logsigmoid(log_odds[0] - log_odds[1])


STACKED = {"CPO": (CPOTrainer, CPOConfig, loss_of_cpo), "ORPO": (ORPOTrainer, ORPOConfig, loss_of_orpo)}


@pytest.mark.parametrize("method", STACKED)
def test_an_example_is_a_pair_where_the_trainer_stacks_them_inside_of_its_loss(tmp_path, method):
    kind, own_config, loss_of = STACKED[method]
    trainer = made(kind, own_config, tmp_path, preferences(), max_length=32)
    truth = truth_of(trainer, lambda model, row: loss_of(trainer, model, row))
    assert_scores_are(allocate(trainer), truth)


@pytest.mark.parametrize("method", STACKED)
def test_metrics_of_the_calibration_reach_no_log(tmp_path, method):
    kind, own_config, _ = STACKED[method]
    trainer = made(kind, own_config, tmp_path, preferences(), max_length=32)
    allocate(trainer)
    assert not trainer._stored_metrics["train"]


# --- Trainers that generate their texts ---


def rewards(completions, **columns):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(("kind", "own_config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
@pytest.mark.parametrize("derived", [False, True])
def test_trainers_that_generate_are_refused_by_name(tmp_path, kind, own_config, derived):
    if derived:
        kind = type("Derived", (kind,), {})
    rows = {"prompt": texts(NUM_EXAMPLES, 4)}
    extra = {"reward_funcs": rewards}
    trainer = made(kind, own_config, tmp_path, rows, extra=extra, num_generations=2, max_completion_length=4)
    with pytest.raises(ValueError, match=rf"^{own_config.__name__[:4]}Trainer cannot be calibrated .*`train\(\)`"):
        allocate(trainer)
    assert list(trainer._logs["prompt"]) == []
    assert trainer.model.peft_config["default"].init_lora_weights == "fim"
    assert list(tmp_path.iterdir()) == []
    # The way out that the message names.
    assert initialize_lora_fim_ranks(trainer.model, lm_batches(4), show_progress_bar=False).num_batches == 4


# --- A wide adapter that is cut in the middle ---


@pytest.mark.parametrize("method", STACKED)
def test_an_example_of_a_training_that_is_cut_is_a_pair(tmp_path, method):
    kind, own_config, _ = STACKED[method]
    callback = FimCompressionCallback(r=2, at=0.5, num_batches=2)
    extra = {"callbacks": [callback], "peft_config": LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM")}
    trainer = made(kind, own_config, tmp_path, preferences(), max_length=32, max_steps=6, extra=extra)
    trainer.train()
    assert callback.compression.criterion == "Fisher information of 4 examples in 2 batches"

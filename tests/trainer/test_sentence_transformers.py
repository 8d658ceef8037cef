"""Trainers of sentence-transformers, whose models hold the adapted model as a part."""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import BertModel

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.losses import CosineSimilarityLoss, SoftmaxLoss
    from sentence_transformers.models import Pooling, Transformer

from fim_lora import FimCompressionCallback, RankAllocation, get_fim_scores
from helpers.adapters import hooks_of, ranks_in
from helpers.cli_inputs import save_bert, texts
from helpers.own_warnings import SEVERAL_FORWARD_PASSES
from helpers.proportional import proportional
from helpers.trainers import BATCHES, NUM_EXAMPLES, allocate, arguments

TARGETS = ["query", "value"]
SENTENCES = texts(2 * NUM_EXAMPLES, 5)
LABELS = [0.1 * number for number in range(NUM_EXAMPLES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def config(**options):
    fim_config = proportional(fim_calibration_batches=BATCHES)
    fim = {"init_lora_weights": "fim", "fim_config": fim_config, "r": 4}
    return LoraConfig(target_modules=TARGETS, **(fim | options))


def rows(labels):
    # Sentences of different lengths are padded.
    shorter = [" ".join(text.split()[: 2 + number % 3]) for number, text in enumerate(SENTENCES[:NUM_EXAMPLES])]
    return Dataset.from_dict({"first": shorter, "second": SENTENCES[NUM_EXAMPLES:], "label": labels})


def sentence_model(folder, lora_config=None):
    torch.manual_seed(0)
    transformer = Transformer(str(folder))
    model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    if lora_config is not None:
        model.add_adapter(lora_config)
    return model


def sentence_trainer(folder, out, loss=CosineSimilarityLoss, labels=LABELS, lora_config=None, **options):
    callbacks = options.pop("callbacks", None)
    model = sentence_model(folder, lora_config or config())
    own = arguments(out, Arguments, save_strategy="no", **options)
    return SentenceTransformerTrainer(
        model=model, args=own, train_dataset=rows(labels), loss=loss(model), callbacks=callbacks
    )


def squares_of(model, losses):
    """`mean(G_t ∘ G_t)` of the targets, for one loss after the other."""
    weights = {name: module.weight for name, module in model.named_modules() if name.endswith(tuple(TARGETS))}
    values = {name: [] for name in weights}
    for loss in losses:
        for name, gradient in zip(values, torch.autograd.grad(loss, list(weights.values())), strict=True):
            values[name].append(gradient.square().mean().item())
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def assert_scores(allocation, truth):
    assert set(allocation.scores) == set(truth)
    for name, values in truth.items():
        assert allocation.scores[name].mean == pytest.approx(values.mean().item(), rel=1e-3)
        assert allocation.scores[name].standard_error == pytest.approx(
            values.std().item() / NUM_EXAMPLES**0.5, rel=1e-3
        )


def embedding(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt")
    return model(input_ids=inputs["input_ids"]).last_hidden_state.mean(1)


def test_scores_of_a_sentence_transformer(folder, tmp_path):
    trainer = sentence_trainer(folder, tmp_path)
    plain, tokenizer = BertModel.from_pretrained(folder).double().eval(), trainer.model.tokenizer
    losses = (
        (F.cosine_similarity(*(embedding(plain, tokenizer, row[name]) for name in ("first", "second"))) - row["label"])
        .square()
        .sum()
        for row in trainer.train_dataset
    )
    truth = squares_of(plain, losses)
    allocation = allocate(trainer)
    assert_scores(allocation, truth)
    inside = trainer.model.transformers_model
    assert ranks_in(inside) == allocation.ranks
    trainer.train()
    trainer.model.save_pretrained(str(tmp_path / "final"))
    assert ranks_in(SentenceTransformer(str(tmp_path / "final"), device="cpu").transformers_model) == allocation.ranks


def test_scores_of_a_cross_encoder(folder, tmp_path):
    torch.manual_seed(0)
    model = CrossEncoder(str(folder), num_labels=1, device="cpu")
    plain = CrossEncoder(str(folder), num_labels=1, device="cpu").transformers_model.double().eval()
    plain.load_state_dict(model.transformers_model.state_dict())
    model.add_adapter(config())
    own = arguments(tmp_path, CrossEncoderTrainingArguments, save_strategy="no")
    trainer = CrossEncoderTrainer(model=model, args=own, train_dataset=rows(LABELS))

    def loss_of(row):
        inputs = model.tokenizer(row["first"], row["second"], return_tensors="pt")
        logit = plain(**inputs).logits[0, 0]
        return F.binary_cross_entropy_with_logits(logit, torch.tensor(row["label"], dtype=torch.float64))

    assert_scores(allocate(trainer), squares_of(plain, map(loss_of, trainer.train_dataset)))


class Components(nn.Module):
    """A loss in two components, which the trainer logs."""

    def __init__(self, model):
        super().__init__()
        self.inner = CosineSimilarityLoss(model)

    def forward(self, features, labels):
        loss = self.inner(features, labels)
        return {"large": 0.75 * loss, "small": 0.25 * loss}


def test_components_of_the_loss_reach_no_log(folder, tmp_path):
    logs = []
    for allocated in (True, False):
        trainer = sentence_trainer(folder, tmp_path / str(allocated), Components, learning_rate=0.0)
        if allocated:
            allocate(trainer)
        trainer.evaluate(trainer.train_dataset.select(range(2)))
        logs.append(trainer.state.log_history[-1])
    for name in ("eval_large", "eval_small"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-3)
        assert logs[0][name] > 0


def test_a_loss_with_its_own_weights_stays_as_it_was(folder, tmp_path):
    def make(model):
        return SoftmaxLoss(model, model.get_embedding_dimension(), num_labels=3)

    trainer = sentence_trainer(folder, tmp_path, make, labels=[number % 3 for number in range(NUM_EXAMPLES)])
    head, model = trainer.loss.classifier, trainer.model.train()
    head.weight.grad = torch.ones_like(head.weight)
    before = head.weight.clone(), [(name, one.training) for name, one in model.named_modules() if "lora" not in name]
    allocate(trainer)
    assert (head.weight.grad == 1).all()
    assert head.weight.requires_grad
    assert head.bias.grad is None
    assert head.training
    assert torch.equal(head.weight, before[0])
    assert [(name, one.training) for name, one in model.named_modules() if "lora" not in name] == before[1]
    assert hooks_of(model) == []


@SEVERAL_FORWARD_PASSES
def test_a_training_of_a_sentence_transformer_is_cut(folder, tmp_path):
    callback = FimCompressionCallback(r=2, at=0.5, num_batches=1)
    trainer = sentence_trainer(
        folder, tmp_path, lora_config=config(r=8, init_lora_weights=True, fim_config=None), callbacks=[callback]
    )
    trainer.train()
    assert callback.cut_at_step == 2
    ranks = {name: rank for name, rank in callback.compression.ranks.items() if rank}
    assert ranks == ranks_in(trainer.model.transformers_model)
    assert hooks_of(trainer.model) == []


def test_scores_of_a_sentence_transformer_without_a_trainer(folder, tmp_path):
    trainer = sentence_trainer(folder, tmp_path)
    plain, batches = sentence_model(folder), list(trainer.get_train_dataloader())

    def forward(model, batch):
        return CosineSimilarityLoss(model)(*trainer.collect_features(batch))

    options = {"forward_fn": forward, "show_progress_bar": False}
    scores = [get_fim_scores(trainer.model, batches, **options), get_fim_scores(plain, batches, config(), **options)]
    allocation = allocate(trainer)
    for name, score in allocation.scores.items():
        assert [one[name].mean for one in scores] == pytest.approx([score.mean] * 2, rel=1e-4)
    plain.add_adapter(RankAllocation.from_scores(scores[1], config()).to_lora_config(config()))
    assert ranks_in(plain.transformers_model) == allocation.ranks

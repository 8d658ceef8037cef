"""Tiny randomly initialized models, batches, and the truth: per-example gradients by autograd in float64."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 60


def llama(layers=2, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.2,
        **options,
    )
    return LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4, n_positions=600, initializer_range=0.2)
    config.pad_token_id = 0
    return GPT2LMHeadModel(config)


def bert(num_labels=3):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        num_labels=num_labels,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def token_batch(batch_size=4, length=10, padding="right", seed=0, shortest=3):
    """Token ids with labels. Every example after the first is shorter, and padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch_size):
        empty = int(torch.randint(0, max(length - shortest, 0) + 1, (1,), generator=generator))
        side = slice(length - empty, length) if padding == "right" else slice(0, empty)
        mask[row, side] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def class_batch(batch_size=4, length=10, seed=0, num_labels=3):
    batch = token_batch(batch_size, length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return batch | {"labels": torch.randint(0, num_labels, (batch_size,), generator=generator)}


def lm_batches(count=3, batch_size=4, length=10, padding="right"):
    return [token_batch(batch_size, length, padding, seed) for seed in range(count)]


def eva_batches():
    """Batches with as many tokens as the largest rank, which PEFT's EVA needs in every batch."""
    return [token_batch(8, 24, seed=seed, shortest=20) for seed in range(3)]


def sum_of_losses(model, batch, rows):
    """Summed loss of some examples of a batch, each run by itself, and the number of its terms."""
    one = {key: value[rows] for key, value in batch.items()}
    labels = one.pop("labels")
    if labels.ndim == 1:
        return F.cross_entropy(model(**one).logits, labels, reduction="sum")
    if hasattr(model, "encoder"):
        logits = model(**one, decoder_input_ids=model._shift_right(labels)).logits
    else:
        logits, labels = model(**one).logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def number_of_terms(model, batch):
    labels = batch["labels"]
    if labels.ndim == 1:
        return len(labels)
    if not hasattr(model, "encoder"):
        labels = labels[:, 1:]
    return int((labels != -100).sum())


def per_example_scores(model, batches, names):
    """The truth: `mean(G_t ∘ G_t)` of every example for the weights of some layers, in float64."""
    model = model.double().eval()
    weights = {name: model.get_submodule(name).weight for name in names}
    values = per_example_values(model, batches, weights)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def per_example_values(model, batches, weights):
    """`mean(G_t ∘ G_t)` of every example for given weights, one example and one backward pass at a time.

    The model's loss is a mean over the terms of the batch, which is (1/B) Σ_t ℓ_t with ℓ_t = B / terms · (sum over
    the terms of example t).
    """
    values = {name: [] for name in weights}
    for batch in batches:
        size, terms = len(batch["input_ids"]), number_of_terms(model, batch)
        for row in range(size):
            share = sum_of_losses(model, batch, slice(row, row + 1)) * size / terms
            gradients = torch.autograd.grad(share, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                values[name].append(gradient.square().mean().item())
    return values


def names_of(model, *ends):
    return [name for name, _ in model.named_modules() if name.endswith(ends)]


@contextmanager
def running_out_of_memory(layer):
    """The allocation inside fails when it rebuilds this layer, and the layer can be rebuilt again afterwards."""

    def update_layer(*args, **kwargs):
        raise MemoryError("out of memory")

    with patch.object(layer, "update_layer", update_layer), pytest.raises(MemoryError, match="out of memory"):
        yield

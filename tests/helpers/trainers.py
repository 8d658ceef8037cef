"""Trainers of transformers and TRL on a tiny model."""

import os
import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from fim_lora import FimConfig, initialize_lora_fim_ranks_for_trainer
from helpers.cli_inputs import texts, word_tokenizer
from helpers.tiny_models import llama, token_batch

# Otherwise TRL searches the hub for updates and models.
os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

NEWER_TRAINERS = pytest.mark.skipif(
    Version(transformers.__version__).major < 5,
    reason="Trainer of transformers 4 divides the loss by one label more per example, and TRL names columns otherwise",
)
TARGETS = ["q_proj", "v_proj", "down_proj"]
NUM_EXAMPLES = 8
# All data in batches of two, so that the order does not matter.
BATCHES = NUM_EXAMPLES // 2


def config(**options):
    fim = FimConfig(fim_calibration_batches=BATCHES, **options)
    return LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="fim", fim_config=fim, task_type="CAUSAL_LM")


def examples(length=10):
    """Examples of one length, so that the mean over the tokens of a batch is the mean over its examples."""
    return [
        {key: value[0] for key, value in token_batch(1, length, seed=seed).items()} for seed in range(NUM_EXAMPLES)
    ]


def arguments(folder, kind=TrainingArguments, **options):
    fixed = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return kind(output_dir=str(folder), **(fixed | quiet | options))


def plain_trainer(folder, lora_config=None, **options):
    torch.manual_seed(3)
    model = get_peft_model(llama(), lora_config or config())
    return Trainer(model=model, args=arguments(folder, **options), train_dataset=examples())


def sft_trainer(folder, unequal=False, **options):
    """`unequal`: whether the texts have unequal lengths, so that each batch has its own number of tokens."""
    torch.manual_seed(3)
    words = [
        " ".join(text.split()[: 3 + row % 5]) if unequal else text for row, text in enumerate(texts(NUM_EXAMPLES, 8))
    ]
    return SFTTrainer(
        model=llama(),
        args=arguments(folder, SFTConfig, max_length=16, bf16=False, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_dict({"text": words}),
        processing_class=word_tokenizer(),
        peft_config=config(),
    )


def dpo_trainer(folder, **options):
    torch.manual_seed(3)
    words = texts(3 * NUM_EXAMPLES, 4)
    rows = {
        "prompt": words[:NUM_EXAMPLES],
        "chosen": [f" {text}" for text in words[NUM_EXAMPLES : 2 * NUM_EXAMPLES]],
        # Of different lengths, and padded.
        "rejected": [f" {text[: 3 + 3 * (i % 3)].rstrip()}" for i, text in enumerate(words[2 * NUM_EXAMPLES :])],
    }
    return DPOTrainer(
        model=llama(),
        args=arguments(folder, DPOConfig, bf16=False, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=word_tokenizer(),
        peft_config=config(),
    )


def reward_trainer(folder, rows):
    torch.manual_seed(3)
    model_config = llama().config
    model_config.num_labels = 1
    lora_config = config()
    lora_config.task_type = "SEQ_CLS"
    return RewardTrainer(
        model=LlamaForSequenceClassification(model_config),
        args=arguments(folder, RewardConfig, bf16=False, gradient_checkpointing=False),
        train_dataset=Dataset.from_dict(rows),
        processing_class=word_tokenizer(),
        peft_config=lora_config,
    )


def allocate(trainer, **options):
    torch.manual_seed(5)
    return initialize_lora_fim_ranks_for_trainer(trainer, show_progress_bar=False, **options)


def assert_scores_are(allocation, truth, relative=1e-4):
    assert set(allocation.scores) == set(truth)
    assert allocation.num_examples == NUM_EXAMPLES
    for name, values in truth.items():
        assert allocation.scores[name].mean == pytest.approx(values.mean().item(), rel=relative)
        assert allocation.scores[name].standard_error == pytest.approx(
            values.std().item() / NUM_EXAMPLES**0.5, rel=relative
        )

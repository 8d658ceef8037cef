"""Trainers of a wide adapter, for `FimCompressionCallback`."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from fim_lora import compress_lora
from helpers.cli_inputs import texts, word_tokenizer
from helpers.tiny_models import llama
from helpers.trained_adapters import fill, spectrum_by_gates
from helpers.trainers import NUM_EXAMPLES, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, arguments, examples

WIDE, NARROW, STEPS = 8, 2, 12
TARGETS = ["q_proj", "v_proj", "down_proj"]
# The cut comes after step 6 of 12, and the passes of steps 4 and 5 are recorded.
CUT = {"r": NARROW, "at": 0.5, "num_batches": 2}
CUT_STEP = 6


def wide_config(**options):
    return LoraConfig(**({"r": WIDE, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options))


def wide_model(base=None, filled=False, **options):
    """A model with a new adapter, or one whose weights are random, as after training."""
    torch.manual_seed(3)
    model = get_peft_model(llama() if base is None else base, wide_config(**options))
    if filled:
        fill(model)
    return model


class WatchedTrainer(Trainer):
    """Keeps the batches of the training, in the order of the passes, and the step of each."""

    def __init__(self, *args, **options):
        self.seen = []
        super().__init__(*args, **options)

    def compute_loss(self, model, inputs, *args, **options):
        if model.training:
            batch = {key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
            self.seen.append((self.state.global_step, batch))
        return super().compute_loss(model, inputs, *args, **options)


class Probe(TrainerCallback):
    """Calls a function at an event."""

    def __init__(self, **functions):
        for event, function in functions.items():
            setattr(self, event, lambda args, state, control, *, _f=function, **kwargs: _f(state, kwargs))


def trainer_of(folder, callbacks, model=None, kind=Trainer, rows=None, **options):
    own = {key: options.pop(key) for key in ("optimizers", "compute_metrics") if key in options}
    return kind(
        model=wide_model() if model is None else model,
        args=arguments(folder, **({"max_steps": STEPS, "save_steps": 3} | options)),
        train_dataset=examples() if rows is None else rows,
        eval_dataset=examples()[:2],
        callbacks=callbacks,
        **own,
    )


def sft_trainer_of(folder, callbacks, **options):
    torch.manual_seed(3)
    options = {"max_steps": STEPS, "save_steps": 3} | options
    return SFTTrainer(
        model=llama(),
        args=arguments(folder, SFTConfig, max_length=16, bf16=False, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_dict({"text": texts(NUM_EXAMPLES, 8)}),
        processing_class=word_tokenizer(),
        peft_config=wide_config(),
        callbacks=callbacks,
    )


def dpo_trainer_of(folder, callbacks, model=None, **options):
    torch.manual_seed(3)
    options = {"max_steps": STEPS, "save_steps": 3} | options
    words = texts(3 * NUM_EXAMPLES, 4)
    rows = {
        "prompt": words[:NUM_EXAMPLES],
        "chosen": [f" {text}" for text in words[NUM_EXAMPLES : 2 * NUM_EXAMPLES]],
        "rejected": [f" {text}" for text in words[2 * NUM_EXAMPLES :]],
    }
    return DPOTrainer(
        model=llama() if model is None else model,
        args=arguments(folder, DPOConfig, bf16=False, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_dict(rows),
        processing_class=word_tokenizer(),
        peft_config=wide_config() if model is None else None,
        callbacks=callbacks,
    )


def adapter_weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def same_weights(model, other, **tolerance):
    torch.testing.assert_close(adapter_weights(model), adapter_weights(other), **tolerance)


def compressed_on(model, batches, r=NARROW):
    """Cut by a calibration on these batches, in place."""
    return compress_lora(model, spectrum_by_gates(model, batches), r=r)

"""Modules that hold an adapted model as a part: the adapter is found, and the rest is restored."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from fim_lora import (
    FimCompressionCallback,
    compress_lora,
    get_fim_diagonals,
    get_fim_scores,
    get_lora_spectrum,
    initialize_lora_fim_ranks,
)
from fim_lora.compression import measure_sizes
from helpers.adapters import fim_lora_config, fim_model, hooks_of, ranks_in, run_own_loop
from helpers.diagonals import assert_diagonals, diagonals_of_batches
from helpers.tiny_models import eva_batches, llama, lm_batches, names_of, per_example_scores
from helpers.trained_adapters import fill, trained
from helpers.trainers import NEWER_TRAINERS, allocate, arguments, config, examples

TARGETS = ("q_proj", "v_proj", "down_proj")
FACTOR = 1.5


class Holder(nn.Module):
    """Multiplies the loss of a language model by the output of a trained head with dropout."""

    def __init__(self, encoder):
        super().__init__()
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(1, 1, bias=False)
        self.encoder = encoder
        nn.init.constant_(self.head.weight, FACTOR)

    def forward(self, input_ids, attention_mask=None, labels=None):
        factor = self.dropout(self.head(torch.ones(1, 1))).sum()
        return {"loss": self.encoder(input_ids, attention_mask=attention_mask, labels=labels).loss * factor}


class Pair(nn.Module):
    """Multiplies the losses of two models, of which the gradient reaches only the first."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, **batch):
        return {"loss": self.first(**batch).loss * self.second(**batch).loss.detach()}


def holder(**options):
    """A holder in training mode, with a gradient and a hook in its head."""
    module = Holder(fim_model(**options)).train()
    module.head.weight.grad = torch.full_like(module.head.weight, 7.0)
    module.head.register_forward_hook(unchanged)
    return module


def unchanged(module, args, output):
    return None


def rest_of(module):
    weight = module.head.weight
    modes = {name: one.training for name, one in module.named_modules() if "lora_" not in name}
    return modes, weight.requires_grad, weight.grad.item(), hooks_of(module.head), hooks_of(module.dropout)


def truth():
    values = per_example_scores(llama(), lm_batches(), names_of(llama(), *TARGETS))
    return {name: (value * FACTOR**2).mean().item() for name, value in values.items()}


def means(scores):
    return {name: score.mean for name, score in scores.items()}


def test_scores_and_ranks_by_a_dataloader():
    module = holder()
    before = rest_of(module)
    scores = get_fim_scores(module, lm_batches(), show_progress_bar=False)
    assert means(scores) == pytest.approx(truth(), rel=1e-4)
    allocation = initialize_lora_fim_ranks(module, lm_batches(), show_progress_bar=False)
    assert means(allocation.scores) == pytest.approx(truth(), rel=1e-4)
    assert rest_of(module) == before
    assert hooks_of(module.encoder) == []
    assert ranks_in(module.encoder) == allocation.ranks
    assert module.encoder.peft_config["default"].rank_pattern == allocation.rank_pattern


def test_ranks_by_an_own_loop():
    module = holder()
    module.dropout.eval()
    for batch in lm_batches():
        module(**batch)["loss"].backward()
    assert means(initialize_lora_fim_ranks(module).scores) == pytest.approx(truth(), rel=1e-4)


def test_ranks_and_directions_of_eva_by_a_dataloader():
    module, alone = (make(r=2, init_lora_weights="eva", target_modules=("q_proj",)) for make in (holder, fim_model))
    before = rest_of(module)
    for model in (module, alone):
        torch.manual_seed(0)
        initialize_lora_fim_ranks(model, eva_batches(), show_progress_bar=False)
    assert rest_of(module) == before
    torch.testing.assert_close(module.encoder.state_dict(), alone.state_dict())


def test_diagonals_are_those_of_the_part_and_serve_as_scores():
    module = holder()
    before = rest_of(module)
    diagonals = get_fim_diagonals(module, lm_batches(), list(truth()), num_batches=3, show_progress_bar=False)
    expected = diagonals_of_batches(llama(), lm_batches(), list(truth()))
    assert_diagonals(diagonals, {name: value * FACTOR**2 for name, value in expected.items()})
    assert rest_of(module) == before
    initialize_lora_fim_ranks(module, fim_scores=diagonals)


def test_a_spectrum_and_a_compression():
    module, alone = Holder(trained(llama())), trained(llama())
    options = {"num_batches": 3, "show_progress_bar": False}
    spectrum, expected = (get_lora_spectrum(model, lm_batches(), **options) for model in (module, alone))
    for name, layer in expected.items():
        # The factor of the loss weighs saliencies against gains, so components may change places.
        for field, factor in (("saliencies", FACTOR**2), ("gains", FACTOR)):
            found, alone_values = (sorted(getattr(one, field)) for one in (spectrum[name], layer))
            assert found == pytest.approx([factor * value for value in alone_values], rel=1e-3, abs=1e-6)
    sizes = [spectrum.num_parameters // 2]
    [(_, loss)] = measure_sizes(module, expected, sizes, lm_batches(), show_progress_bar=False)
    [(_, loss_alone)] = measure_sizes(alone, expected, sizes, lm_batches(), show_progress_bar=False)
    assert loss == pytest.approx(FACTOR * loss_alone, rel=1e-5)
    result = compress_lora(module, expected, keep=0.5, eval_dataloader=lm_batches(), show_progress_bar=False)
    assert result.loss_after == pytest.approx(loss, rel=1e-5)
    assert {name: rank for name, rank in result.ranks.items() if rank} == ranks_in(module.encoder)


@NEWER_TRAINERS
def test_a_trainer_over_a_module_that_holds_the_model(tmp_path):
    alone, module = (get_peft_model(llama(), config()) for _ in range(2))
    trainers = [
        Trainer(model=model, args=arguments(tmp_path / str(number)), train_dataset=examples())
        for number, model in enumerate((alone, Holder(module)))
    ]
    expected, allocation = (allocate(trainer) for trainer in trainers)
    assert means(allocation.scores) == pytest.approx(
        {name: mean * FACTOR**2 for name, mean in means(expected.scores).items()}, rel=1e-5
    )
    assert trainers[1].model.head.weight.grad is None
    assert all(one.training for one in trainers[1].model.modules())
    trainers[1].train()


def test_a_training_over_a_module_that_holds_the_model_is_cut(tmp_path):
    torch.manual_seed(3)
    module = Holder(get_peft_model(llama(), LoraConfig(r=8, target_modules=list(TARGETS))))
    callback = FimCompressionCallback(r=2, at=0.5, num_batches=2)
    own = arguments(tmp_path, max_steps=6, save_strategy="no")
    Trainer(model=module, args=own, train_dataset=examples(), callbacks=[callback]).train()
    assert callback.cut_at_step == 3
    assert {name: rank for name, rank in callback.compression.ranks.items() if rank} == ranks_in(module.encoder)
    assert hooks_of(module) == []


# --- Several adapted parts ---


def test_two_parts_with_an_adapter_of_one_name_are_an_error_that_names_them():
    pair = Pair(fim_model(), fim_model())
    calls = [
        lambda: initialize_lora_fim_ranks(pair, lm_batches()),
        lambda: get_fim_scores(pair, lm_batches()),
        lambda: get_lora_spectrum(pair, lm_batches()),
        lambda: get_fim_diagonals(pair, lm_batches()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"Pair has 2 parts with .*: 'first', 'second'"):
            call()
    # One part under two names is one part.
    twice = Pair(pair.first, pair.first)
    assert get_fim_scores(twice, lm_batches(), show_progress_bar=False).num_batches == 3


def test_the_name_of_the_adapter_selects_the_part_and_other_parts_keep_theirs():
    second = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), "trained")
    fill(second, "trained")
    pair = Pair(fim_model(), second)
    pair.first.requires_grad_(False)  # the truth needs no gradient of adapters
    batches = [{key: value[:1] for key, value in batch.items()} for batch in lm_batches()]
    with torch.no_grad():
        factors = [copy.deepcopy(second).eval()(**batch).loss.item() for batch in batches]
    values = per_example_scores(llama(), batches, names_of(llama(), *TARGETS))
    expected = {name: (value * torch.tensor(factors) ** 2).mean().item() for name, value in values.items()}
    assert means(get_fim_scores(pair, batches, show_progress_bar=False)) == pytest.approx(expected, rel=1e-4)
    allocation = initialize_lora_fim_ranks(pair, batches, show_progress_bar=False)
    assert means(allocation.scores) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"no adapter 'other'"):
        initialize_lora_fim_ranks(pair, batches, adapter_name="other")


def test_a_part_that_waits_does_not_record_the_calibration_of_another():
    pair = Pair(fim_model(), get_peft_model(llama(), fim_lora_config(), "other"))

    def sum_of_losses(model, batch):
        return model.first(**batch).loss + model.second(**batch).loss

    initialize_lora_fim_ranks(pair, lm_batches(), forward_fn=sum_of_losses, show_progress_bar=False)
    with pytest.raises(RuntimeError, match="No calibration batch was seen"):
        initialize_lora_fim_ranks(pair, adapter_name="other")
    run_own_loop(pair.second)
    initialize_lora_fim_ranks(pair, adapter_name="other")


def test_a_part_in_a_parallel_wrapper_is_refused():
    model = fim_model()
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*pass `model\.module`"):
        initialize_lora_fim_ranks(Pair(nn.DataParallel(model), llama()), lm_batches())
    with pytest.raises(ValueError, match="The model has no adapter"):
        initialize_lora_fim_ranks(Pair(llama(), llama()), lm_batches())

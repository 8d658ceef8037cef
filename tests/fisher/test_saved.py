"""What autograd keeps of a watched pass, and for how long."""

import copy
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from fim_lora.fisher.saved import SavedTensor
from helpers.llama_calibration import TARGETS, assert_trains_alike, fim_config, fim_model
from helpers.tiny_models import llama, lm_batches


def test_a_loss_that_is_still_in_scope_does_not_disturb_the_training():
    """Its graph remembers the shapes from before the allocation."""
    model = fim_model(llama(1))
    for batch in lm_batches(2):
        outputs = model(**batch)
        outputs.loss.backward()
    allocation = initialize_lora_fim_ranks(model)
    other = get_peft_model(llama(1), allocation.to_lora_config(fim_config()))
    assert_trains_alike(model, other, lm_batches(1)[0])
    assert outputs.loss.grad_fn is not None


class Kept:
    """A tensor that autograd keeps. It lives as long as autograd keeps it."""

    def __init__(self, tensor):
        self.tensor = tensor


def bytes_kept(model, batch):
    """Size of all tensors that autograd keeps at the end of a forward pass, each storage counted once."""
    kept = weakref.WeakSet()

    def keep(tensor):
        kept.add(holder := Kept(tensor))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        loss = model(**batch).loss
    storages = [holder.tensor.untyped_storage() for holder in kept]
    total = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    loss.backward()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_keep_hardly_more_than_plain_lora(dtype):
    """If the model is in bfloat16, PEFT's adapters and their copy of the input are in float32."""
    batch = lm_batches(1, length=40)[0]
    base = llama(4).to(dtype)
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=list(TARGETS)))
    model = fim_model(copy.deepcopy(base), batches=2)
    input_of_first_block = batch["input_ids"].numel() * base.config.hidden_size * dtype.itemsize
    more = bytes_kept(model, batch) - bytes_kept(plain, batch)
    assert more <= (0 if dtype == torch.float32 else input_of_first_block) + 2000  # some small numbers


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("adapters", [["default"], ["other", "default"]])
def test_scores_are_those_of_the_input_whatever_the_adapter_is_called_with(dropout, adapters):
    batches = lm_batches(2)
    base = llama().to(torch.bfloat16)
    truth = get_fim_scores(copy.deepcopy(base), batches, fim_config(), show_progress_bar=False)
    model = fim_model(base, lora_dropout=dropout)
    if len(adapters) > 1:
        model.add_adapter("other", LoraConfig(r=4, target_modules=list(TARGETS)))
        model.base_model.set_adapter(adapters)
    for batch in batches:
        model(**batch).loss.backward()
    scores = initialize_lora_fim_ranks(model).scores
    for name, score in scores.items():
        # B is zero, so the passes equal those of the plain model, except for the order of rounding.
        assert score.mean == pytest.approx(truth[name].mean, rel=2e-2)


def test_a_copy_of_another_tensor_or_to_a_coarser_dtype_is_not_taken_for_the_input():
    x = torch.randn(2, 3, dtype=torch.bfloat16).requires_grad_() * 1
    x, beside = torch.cat([x, 2 * x]).chunk(2)  # two outputs of one step
    for copied in (x.half(), beside.float(), (x * 2).float(), x.float() * 2, x.detach().float(), x.float()[:1]):
        saved = SavedTensor(x)
        saved.replace_by_copy(copied)
        assert torch.equal(saved.with_gradients("layer", x).input, x)
    saved = SavedTensor(x)
    saved.replace_by_copy(x.float())
    kept = saved._saved._anchor.grad_fn.saved_tensors[0]
    assert kept.dtype == torch.float32
    assert torch.equal(saved.with_gradients("layer", x).input, x)

"""Autocast with a gradient scaler, Accelerate's bfloat16, and gradient accumulation."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from helpers.llama_calibration import assert_scores, fim_config, fim_model, reference, truth_of
from helpers.own_warnings import WITHOUT_RANKS
from helpers.tiny_models import llama, lm_batches

# --- Mixed precision ---


def scaled_loop(model, batches, dtype, scale, overflow=()):
    """The calibration part of a loop with a gradient scaler, whose scale is constant without optimizer steps."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for index, batch in enumerate(batches):
        with torch.autocast("cpu", dtype):
            loss = model(**batch).loss
        if index in overflow:
            loss = loss * 1e30
        scaler.scale(loss).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    batches, truth, allocations = lm_batches(3), truth_of(lm_batches(3)), {}
    for scale in (1.0, 2.0**10):
        model = fim_model(llama(1), batches=3)
        scaled_loop(model, batches, dtype, scale)
        allocations[scale] = initialize_lora_fim_ranks(model)
        assert allocations[scale].scores.num_skipped_batches == 0
        # The forward pass rounds to 8 bits (bfloat16) or 11 bits (float16).
        assert_scores(allocations[scale].scores, truth, rel=0.1 if dtype == torch.bfloat16 else 0.01, factor=scale**2)
    plain, scaled = allocations[1.0], allocations[2.0**10]
    assert scaled.ranks == plain.ranks
    for name, score in plain.scores.items():
        # A power of two changes no digit, unless a value is so small that float16 rounds it more coarsely.
        rel = 1e-6 if dtype == torch.bfloat16 else 1e-3
        assert scaled.scores[name].mean == pytest.approx(2.0**20 * score.mean, rel=rel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_that_overflows_is_left_out(dtype):
    batches = lm_batches(3)
    model = fim_model(llama(1), batches=3)
    scaled_loop(model, batches, dtype, 2.0**10, overflow={1})
    with pytest.warns(UserWarning, match="1 of 3 calibration batches had a loss or gradients that are not finite"):
        allocation = initialize_lora_fim_ranks(model)
    assert (allocation.num_batches, allocation.scores.num_skipped_batches, allocation.num_examples) == (3, 1, 8)

    without = fim_model(llama(1), batches=2)
    scaled_loop(without, [batches[0], batches[2]], dtype, 2.0**10)
    assert dict(initialize_lora_fim_ranks(without).scores) == dict(allocation.scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_forward_function_under_autocast(dtype):
    batches = lm_batches(2)

    def forward_fn(model, batch):
        with torch.autocast("cpu", dtype):
            return model(**batch)

    scores = get_fim_scores(llama(1), batches, fim_config(), forward_fn=forward_fn, show_progress_bar=False)
    assert_scores(scores, truth_of(batches), rel=0.1 if dtype == torch.bfloat16 else 0.01)
    exact = get_fim_scores(llama(1), batches, fim_config(), show_progress_bar=False)
    assert all(scores[name].mean != exact[name].mean for name in scores)


@pytest.fixture
def new_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16_of_accelerate(new_accelerator):
    batches = lm_batches(2)
    accelerator = new_accelerator(mixed_precision="bf16")
    by_hand = fim_model(llama(1))
    scaled_loop(by_hand, batches, torch.bfloat16, 1.0)
    expected = initialize_lora_fim_ranks(by_hand)

    model = accelerator.prepare(fim_model(llama(1)))
    for batch in batches:
        accelerator.backward(model(**batch).loss)
    allocation = initialize_lora_fim_ranks(accelerator.unwrap_model(model))
    assert allocation.scores == expected.scores
    assert allocation.ranks == expected.ranks
    by_loader = initialize_lora_fim_ranks(accelerator.prepare(fim_model(llama(1))), batches, show_progress_bar=False)
    assert by_loader.ranks == expected.ranks
    assert_scores(by_loader.scores, truth_of(batches), rel=0.1)


# --- Gradient accumulation ---


@pytest.mark.parametrize("steps", [2, 4])
def test_every_micro_batch_is_a_calibration_batch(steps):
    batches = lm_batches(4)
    expected = reference(batches=batches[:3])
    model = fim_model(llama(1), batches=3)
    for batch in batches:  # one more than requested
        (model(**batch).loss / steps).backward()
    allocation = initialize_lora_fim_ranks(model)
    assert (allocation.num_batches, allocation.num_examples) == (3, 12)
    assert_scores(allocation.scores, truth_of(batches[:3]), factor=1 / steps**2)
    assert allocation.ranks == expected.ranks


@WITHOUT_RANKS
def test_accumulate_of_accelerate(new_accelerator):
    batches = lm_batches(4)
    accelerator = new_accelerator(gradient_accumulation_steps=2)
    model = fim_model(llama(1), batches=4)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(adapter, lr=0.0))
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    allocation = initialize_lora_fim_ranks(accelerator.unwrap_model(model))
    assert allocation.num_batches == 4
    assert_scores(allocation.scores, truth_of(batches), factor=1 / 4)
    undivided = initialize_lora_fim_ranks(fim_model(llama(1), batches=4), batches, show_progress_bar=False)
    assert allocation.ranks == undivided.ranks

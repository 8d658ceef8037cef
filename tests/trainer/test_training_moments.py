"""Moments from the passes of a training: scaled losses, and batches of pairs."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from fim_lora.adapter.plain_adapter import plain_adapters
from fim_lora.fisher.recorder import Recorder
from fim_lora.spectrum import adapted_layers, checked_layers
from fim_lora.trainer.moments import TrainingMoments
from fim_lora.trainer.wide_phase import WidePhase, WideSettings
from helpers.adapters import hooks_of
from helpers.every_layer_type import NAMES, batches, every_type
from helpers.trained_adapters import measured

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about the model
BATCHES = batches()


def recorded(model, scales, sequences_per_example=1):
    layers = checked_layers(model, "default")
    shapes = {name: one.shape for name, one in plain_adapters(layers, "default").items()}
    moments = TrainingMoments.for_training(shapes, sequences_per_example)
    recorder = Recorder(adapted_layers(model, layers, "default"), moments)
    recorder.start(model)
    for batch, scale in zip(BATCHES, scales, strict=True):
        moments.loss_scale = scale
        (model(**batch)["loss"] * scale).backward()
    recorder.stop()
    return recorder.result()


def assert_same_moments(found, expected):
    for name in NAMES:
        one, other = found.of(name), expected.of(name)
        for key in ("inputs", "gradients"):
            np.testing.assert_allclose(getattr(one, key), getattr(other, key), rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(
            np.concatenate(one.core_gradients), np.concatenate(other.core_gradients), rtol=1e-5, atol=1e-9
        )
    assert found.batch_sizes == expected.batch_sizes
    assert found.num_loss_terms == expected.num_loss_terms


def test_moments_are_those_of_the_loss_before_it_was_scaled():
    found = recorded(every_type(torch.float64), [1024.0, 1.0, 0.5])
    assert_same_moments(found, measured(every_type(torch.float64), BATCHES))


def test_rows_of_one_example_are_taken_together():
    """Rows t and t + 2 of four belong to one example, as chosen and rejected texts do."""
    found = recorded(every_type(torch.float64), [1.0, 1.0, 1.0], sequences_per_example=2)
    assert_same_moments(found, measured(every_type(torch.float64), BATCHES, sequences_per_example=2))
    assert found.num_examples == 6
    by_row = recorded(every_type(torch.float64), [1.0, 1.0, 1.0])
    assert by_row.num_examples == 12
    assert not np.allclose(
        *(np.square(np.concatenate(one.of("linear").core_gradients)).sum() for one in (found, by_row)), rtol=1e-2
    )


def test_a_gradient_scaler_that_changes_its_scale():
    """As with float16: the scale grows between two batches, and weighs none of them more."""
    Accelerator(cpu=True)
    settings = WideSettings("default", r=1, wide_scale=1.0, first_step=0, cut_step=3, num_batches=3)
    results = []
    for scales in ([1.0, 1.0, 1.0], [2.0**16, 2.0, 2.0**10]):
        model = every_type(torch.float64)
        scaler = torch.amp.GradScaler("cpu", init_scale=scales[0])
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
        phase = WidePhase(model, AcceleratedOptimizer(optimizer, scaler=scaler), settings)
        for step, (batch, scale) in enumerate(zip(BATCHES, scales, strict=True)):
            scaler.scale(torch.ones(()))  # PyTorch creates the scale at the first use
            scaler.update(scale)
            phase.begin_step(step)
            scaler.scale(model(**batch)["loss"]).backward()
        results.append((phase.cut(), [weight.detach().clone() for weight in model.parameters()]))
        assert hooks_of(model) == []
    assert results[0][0].ranks == results[1][0].ranks
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)

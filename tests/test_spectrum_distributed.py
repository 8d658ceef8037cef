"""Spectra and truncations in two processes against one process over all data."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fim_lora import LoraSpectrum, compress_lora, get_lora_spectrum
from fim_lora.fisher.evaluation import mean_loss
from helpers import spectra_in_processes
from helpers.every_layer_type import batches, every_type
from helpers.several_processes import ALL, EVEN, IN_TURNS
from helpers.spectra_in_processes import SHARDED_TYPES, adapter, spectrum, weights
from helpers.torchrun import outcome, results_of


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with the results of all cases and processes. The cases share one start, because it takes seconds."""
    return results_of("helpers.spectra_in_processes", tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone():
    """One process over all data."""
    return spectrum(adapter(), IN_TURNS)


def assert_same(found, expected, rtol=1e-6):
    """The same saliencies, predictions and components. Only the order of the examples differs."""
    assert list(found) == list(expected)
    assert (found.num_batches, found.num_examples) == (expected.num_batches, expected.num_examples)
    assert found.terms_per_example == expected.terms_per_example
    for name, layer in expected.items():
        assert found[name].fingerprint == layer.fingerprint
        np.testing.assert_allclose(
            found[name].saliencies, layer.saliencies, rtol=rtol, atol=rtol * max(layer.saliencies)
        )
        products = [one.left[:, :, :, None] * one.right.swapaxes(1, 2)[:, :, None] for one in (found[name], layer)]
        scale = abs(products[1]).max()
        np.testing.assert_allclose(*[product.sum(1) for product in products], atol=1e-4 * scale)
        np.testing.assert_allclose(found[name].squared_norms, layer.squared_norms, rtol=10 * rtol)
        np.testing.assert_allclose(found[name].gains, layer.gains, rtol=rtol, atol=rtol * max(map(abs, layer.gains)))
    for share in (0.5, 0.2):
        kept = expected.keep(int(share * expected.num_parameters))
        assert found.keep(int(share * expected.num_parameters)) == kept
        assert found.predict(kept) == pytest.approx(expected.predict(kept), rel=10 * rtol)


MEASURED = ["shares", "ddp", "one_has_none", "fsdp2", "fsdp2_one_has_none"]


@pytest.mark.parametrize("case", MEASURED)
def test_processes_agree_with_one_over_all_data(results, alone, case):
    first, second = outcome(results, case)
    assert first == second
    assert_same(LoraSpectrum.from_dict(first), spectrum(adapter(), ALL) if "has_none" in case else alone)


def test_layers_of_every_type_when_sharded(results):
    first, second = outcome(results, "fsdp2_of_every_layer_type")
    assert first == second
    whole = spectrum(every_type(torch.float64, SHARDED_TYPES), batches([0, 2, 1]), num_batches=3)
    assert set(whole) == set(SHARDED_TYPES)
    assert_same(LoraSpectrum.from_dict(first), whole)


def test_sharded_weights_without_data(results):
    first, second = outcome(results, "fsdp2_without_data")
    assert first == second
    assert first == get_lora_spectrum(adapter(), None).to_dict()


def test_all_processes_stop_reading_together(results, alone):
    first, second = outcome(results, "automatic_number_of_batches")
    assert first == second
    assert first["num_batches"] == 4  # after two turns, which give two halves of each kind


def test_all_processes_get_the_same_smaller_adapter(results, alone):
    first, second = outcome(results, "compressed")
    assert first["weights"] == second["weights"]
    assert first["result"] == second["result"]
    model = adapter()
    loss_before = mean_loss(model, ALL, show_progress_bar=False)
    result = compress_lora(model, alone, keep=0.4)
    assert first["result"]["ranks"] == result.ranks
    assert first["result"]["loss_before"] == pytest.approx(loss_before)
    assert first["result"]["loss_after"] == pytest.approx(mean_loss(model, ALL, show_progress_bar=False), rel=1e-5)
    assert first["loss"] == second["loss"] == pytest.approx(first["result"]["loss_after"], rel=1e-5)
    assert first["weights"].keys() == weights(model).keys()


def test_processes_that_would_keep_other_ranks_raise(results):
    for answer in outcome(results, "other_sizes"):
        assert "pass the same spectrum and size to every process" in answer["error"]
        assert answer["unchanged"]


def test_a_measured_loss_is_that_of_all_processes(results, alone):
    first, second = outcome(results, "compressed_to_a_measured_loss")
    assert first == second
    model = adapter()
    result = compress_lora(
        copy.deepcopy(model), alone, max_loss_increase=0.2, eval_dataloader=ALL, show_progress_bar=False
    )
    assert first["result"]["ranks"] == result.ranks
    assert first["result"]["loss_after"] == pytest.approx(result.loss_after, rel=1e-5)


def test_sharded_adapters_can_be_measured_but_not_truncated(results):
    model = adapter()
    for answer in outcome(results, "sharded_adapters"):
        fsdp2, fsdp1 = answer["errors"]
        assert "The adapter of layer 'model.layers.0.self_attn.q_proj' is sharded" in fsdp2
        assert "the spectrum is right for that one, too" in fsdp2
        assert "flattens the adapter's weights: use FSDP2" in fsdp1
        loss = mean_loss(model, [batch for share in EVEN for batch in share], show_progress_bar=False)
        assert answer["loss"] == pytest.approx(loss)


def test_no_process_waits_for_one_that_failed(results):
    first, second = outcome(results, "failures")
    disk, memory = "OSError: the disk of process 1 is gone", "OutOfMemoryError: out of memory in process 1"
    assert second["errors"] == [disk, memory, disk, memory, "MemoryError: process 1 is full"]
    for error, other in zip(first["errors"], second["errors"], strict=True):
        assert error == f"RuntimeError: Process 1 failed, so all stop. Its error: {other}"
    assert first["weights"] == second["weights"]


def test_every_case_is_looked_at():
    source = Path(__file__).read_text()
    assert not [name for name in spectra_in_processes.CASES if f'"{name}"' not in source]

"""Two processes with a model sharded by ZeRO-3 against one process with the whole model and all data."""

import json
import os
import shutil

import pytest

from fim_lora import LoraSpectrum, get_fim_scores, get_lora_spectrum
from helpers.several_processes import ALL, IN_TURNS, base, config
from helpers.spectra_in_processes import spectrum
from helpers.torchrun import NUM_PROCESSES, assert_same_scores, torchrun
from helpers.trained_adapters import trained

pytest.importorskip("deepspeed")


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its communication for the CPU")
def test_scores_and_spectrum_of_a_model_sharded_by_zero3(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    finished = torchrun("helpers.zero3", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    alone = get_fim_scores(base().float(), ALL, config(), show_progress_bar=False)
    for rank in range(NUM_PROCESSES):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_same_scores(found["module"], alone, relative=1e-5)
        assert_same_scores(found["engine"], alone, relative=1e-5)
        assert not found["without_gradient"]
        assert_spectrum(found["spectrum"])


def assert_spectrum(found):
    model = trained(base().float())
    assert LoraSpectrum.from_dict(found["without_data"]) == get_lora_spectrum(model, None)
    expected, measured = spectrum(model, IN_TURNS), LoraSpectrum.from_dict(found["measured"])
    for name, layer in expected.items():
        assert measured[name].fingerprint == layer.fingerprint
        for field in ("saliencies", "gains"):
            values = list(map(float, getattr(layer, field)))
            tolerance = 1e-5 * max(map(abs, values))
            assert list(getattr(measured[name], field)) == pytest.approx(values, rel=1e-4, abs=tolerance)
    assert "is sharded" in found["error"]
    assert "the spectrum is right for that one, too" in found["error"]

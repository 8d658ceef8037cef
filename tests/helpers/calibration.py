"""Calibrates some layers of a model, and compares their scores with per-example values."""

import pytest

from fim_lora.fisher.calibration import calibrate
from fim_lora.fisher.norm_sums import NormSums
from fim_lora.fisher.recorder import Recorder


def calibrate_norms(model, layers, dataloader, num_batches, *arguments, exact=False, **options):
    """`calibrate` for the statistic of the scores."""
    statistic = NormSums.for_layers(layers, exact)
    return calibrate(model, layers, statistic, dataloader, num_batches, *arguments, **options)


def norm_recorder(layers):
    """A recorder of the statistic of the scores."""
    return Recorder(layers, NormSums.for_layers(layers))


def scores_of(model, batches, names, **options):
    layers = {name: model.get_submodule(name) for name in names}
    return calibrate_norms(model, layers, batches, len(batches), show_progress_bar=False, **options)


def assert_scores(scores, truth, rtol=1e-5):
    assert set(scores) == set(truth)
    for name, values in truth.items():
        score = scores[name]
        assert score.num_examples == len(values)
        assert score.mean == pytest.approx(values.mean().item(), rel=rtol), name
        if len(values) > 1:
            error = (values.std() / len(values) ** 0.5).item()
            assert score.standard_error == pytest.approx(error, rel=100 * rtol), name

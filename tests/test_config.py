"""The options of `FimConfig`."""

import math

import pytest

from fim_lora import FimConfig


def test_defaults():
    """Those of the proposal, but for how ranks are divided."""
    config = FimConfig()
    assert (config.fim_calibration_batches, config.r_min, config.r_max) == (8, 1, None)
    assert (config.adjust_scaling_factors, config.score_exponent) == (True, 1.0)
    assert (config.score, config.budget) == ("norm", "parameters")
    assert not config.exact


def test_a_layer_may_lose_its_adapter():
    assert FimConfig(r_min=0, r_max=1).r_min == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fim_calibration_batches": 0}, ValueError, "fim_calibration_batches must be at least 1, got 0"),
        ({"fim_calibration_batches": 2.0}, TypeError, "fim_calibration_batches must be an integer, got 2.0"),
        ({"r_min": -1}, ValueError, "r_min must be at least 0, got -1"),
        ({"r_min": True}, TypeError, "r_min must be an integer, got True"),
        ({"r_min": 0, "r_max": 0}, ValueError, "r_max must be at least 1, got 0"),
        ({"r_max": -3}, ValueError, "r_max must be at least 1, got -3"),
        ({"r_min": 5, "r_max": 4}, ValueError, "r_max=4 is below r_min=5"),
        ({"adjust_scaling_factors": 1}, TypeError, "adjust_scaling_factors must be True or False, got 1"),
        ({"exact": "yes"}, TypeError, "exact must be True or False, got 'yes'"),
        ({"budget": "layers"}, ValueError, "budget must be one of .* got 'layers'"),
        ({"score_exponent": 0}, ValueError, "score_exponent must be positive and finite, got 0"),
        ({"score_exponent": math.inf}, ValueError, "got inf"),
        ({"score_exponent": "1"}, TypeError, "score_exponent must be a number, got '1'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        FimConfig(**options)

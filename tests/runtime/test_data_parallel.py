"""The gradients of `DistributedDataParallel` in two processes, after the parameters inside changed their shapes."""

import pytest
import torch

from helpers.cut_in_processes import (
    SHARES,
    WAYS,
    cut_model,
    gradients_after_the_cut,
    joined,
)
from helpers.torchrun import outcome, results_of
from helpers.wide_trainers import compressed_on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return results_of("helpers.cut_in_processes", tmp_path_factory.mktemp("processes"), "gradients", "wrapped_again")


@pytest.fixture(scope="module")
def expected():
    """One process, on the examples of both."""
    model = cut_model()
    compression = compressed_on(model, [joined(0)], r=1)
    assert compression.dropped_layers
    return gradients_after_the_cut(model, model, [joined(index) for index in range(len(SHARES[0]))])


def assert_same_gradients(found, expected, tolerance):
    for passed, truth in zip(found, expected, strict=True):
        assert set(passed) == set(truth)
        for name, gradient in truth.items():
            torch.testing.assert_close(torch.tensor(passed[name]), torch.tensor(gradient), **tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_a_rebuilt_reducer_gives_the_gradients_of_one_process(folder, expected, way):
    tolerance = {"rtol": 1e-2, "atol": 1e-4} if way == "communication hook" else {"rtol": 1e-4, "atol": 1e-6}
    for found in outcome(folder, "gradients"):
        assert_same_gradients(found[way], expected, tolerance)


def test_the_communication_hook_stays(folder):
    """It rounds gradients to float16."""
    found = outcome(folder, "gradients")[0]
    exact, rounded = (next(iter(found[way][0].values())) for way in ("default", "communication hook"))
    assert exact != rounded
    rounded = torch.tensor(rounded, dtype=torch.float64)
    torch.testing.assert_close(rounded.half().double(), rounded, rtol=0, atol=0)


def test_a_model_that_is_wrapped_again(folder, expected):
    for found in outcome(folder, "wrapped_again"):
        assert_same_gradients(found, expected, {"rtol": 1e-4, "atol": 1e-6})

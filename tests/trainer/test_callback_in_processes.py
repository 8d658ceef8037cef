"""`FimCompressionCallback` in two processes under `DistributedDataParallel`, against one process on all batches."""

import pytest
import torch

from helpers.cut_in_processes import TRAININGS, trained
from helpers.torchrun import NUM_PROCESSES, outcome, results_of


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = results_of("helpers.cut_in_processes", tmp_path_factory.mktemp("processes"), "trainings")
    return outcome(folder, "trainings")


@pytest.mark.parametrize("training", TRAININGS)
def test_two_processes_end_where_one_ends(results, tmp_path, training):
    """One process takes the batches of both in each pass: the same examples in the same steps."""
    ranks, weights = trained(tmp_path, 2 * NUM_PROCESSES, **TRAININGS[training])
    for found_ranks, found_weights in (result[training] for result in results):
        assert found_ranks == ranks
        assert set(found_weights) == set(weights)
        for name, weight in weights.items():
            found = torch.tensor(found_weights[name], dtype=torch.float64)
            torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
    assert results[0][training] == results[1][training]

"""`FimCompressionCallback` in two processes under `DistributedDataParallel`, against one process on all batches."""

import json

import pytest
import torch

from helpers.cut_in_processes import TRAININGS, trained
from helpers.torchrun import NUM_PROCESSES, torchrun

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    finished = torchrun("helpers.cut_in_processes", str(folder), "trainings")
    assert finished.returncode == 0, finished.stderr
    answers = [json.loads((folder / f"trainings-{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]
    for answer in answers:
        assert "error" not in answer, answer["error"]
    return [answer["result"] for answer in answers]


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

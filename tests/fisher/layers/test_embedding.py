"""The eFIM of embeddings against per-example gradients by autograd in float64."""

import pytest
import torch
from torch import nn

from fim_lora.fisher.layers.embedding import embedding_squared_norms
from helpers.calibration import scores_of as calibration_scores
from helpers.single_layers import (
    EMBEDDINGS,
    WIDTH,
    assert_score,
    batches_of,
    by_row,
    check_dimensions_of_the_adapter,
    check_scores_equal_autograd,
    floats,
    per_example_truth,
    scores_of,
)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("layer", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_scores_equal_autograd(layer, calls):
    check_scores_equal_autograd(layer, calls)


@pytest.mark.parametrize("layer", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_dimensions_are_those_of_the_adapter_that_peft_makes(layer):
    check_dimensions_of_the_adapter(layer)


@pytest.mark.parametrize("bound", [1, 400, 2**26])
def test_embeddings_in_blocks_of_features(bound):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (3, 8), generator=generator)
    g = torch.randn(3, 8, 7, generator=generator)
    truth = [
        sum(g[row, ids[row] == token].double().sum(0).square().sum() for token in (0, 1, 3, 4)) for row in range(3)
    ]
    norms = embedding_squared_norms(ids, g, padding_idx=2, max_temporary_bytes=bound)
    torch.testing.assert_close(norms.double(), torch.stack(truth), rtol=1e-5, atol=0)


def test_embeddings_of_no_positions():
    assert embedding_squared_norms(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 3)).tolist() == [0, 0]


def test_positions_that_all_examples_share_are_said_to_be_approximate():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Embedding(5, WIDTH)

        def forward(self, x, target):
            y = x + self.layer(torch.arange(5)[None])
            return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}

    batches = batches_of(floats(5, WIDTH))
    with pytest.warns(UserWarning, match="could not be attributed"):
        score = scores_of(Positions(), batches)["layer"]
    assert score.num_examples == len(batches)
    single = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in range(3)]
    score = scores_of(Positions(), single)["layer"]
    assert_score(score, per_example_truth(Positions(), single, ["layer.weight"], by_row))


class ShiftedPositions(nn.Embedding):
    """As in OPT and Whisper: the positions are made from a mask."""

    def forward(self, mask, past_length=0):
        return super().forward(mask.cumsum(1) - 1 + past_length)


def test_an_embedding_that_looks_up_other_ids_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.out = ShiftedPositions(8, 6), nn.Linear(6, 2)

        def forward(self, mask):
            return self.out(self.positions(mask)).square().mean()

    with pytest.raises(TypeError, match=r"Layer 'positions' is a ShiftedPositions, which looks up other ids"):
        calibration_scores(Net(), [torch.ones(3, 5, dtype=torch.long)], ["positions", "out"])

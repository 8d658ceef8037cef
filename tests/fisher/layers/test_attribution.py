"""Which rows of a layer's input belong to which example."""

import copy

import pytest
import torch
from torch import nn

from fim_lora.fisher.layers.attribution import UnattributableError, by_example
from fim_lora.fisher.layers.batch_size import batch_size_of
from helpers.calibration import assert_scores, calibrate_norms, scores_of


class Rearranging(nn.Module):
    """The same function with the layer's input arranged in another way."""

    def __init__(self, arrange, restore):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.arrange, self.restore = arrange, restore

    def forward(self, x):
        return self.restore(torch.tanh(self.layer(self.arrange(x))), x).square().sum((1, 2)).mean()


ARRANGEMENTS = {
    "batch first": (lambda x: x, lambda y, x: y),
    "sequence first": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)),
    "flattened": (lambda x: x.reshape(-1, 4), lambda y, x: y.view(len(x), -1, 3)),
    "heads as dimensions": (lambda x: x.unsqueeze(2), lambda y, x: y.squeeze(2)),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_arrangements_of_the_input_give_the_same_scores(arrangement):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 4)
    scores = scores_of(Rearranging(*ARRANGEMENTS[arrangement]), [x], ["layer"])
    double = Rearranging(*ARRANGEMENTS["batch first"]).double()
    truth = []
    for row in range(3):
        double.zero_grad()
        double(x[row : row + 1].double()).backward()
        truth.append(double.layer.weight.grad.square().mean())
    assert_scores(scores, {"layer": torch.stack(truth)})


def test_rows_that_belong_to_nobody_count_as_one_example():
    """Five routed rows for a batch of three: the batch gradient, with its expectation under independence."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    x = torch.randn(3, 5, 4)

    def forward_fn(model, batch):
        return model(batch.reshape(-1, 4)[:5]).square().sum() / 3

    with pytest.warns(UserWarning, match=r"1 layers could not be attributed.*\['layer'\]"):
        scores = calibrate_norms(model, {"layer": model}, [x], 1, forward_fn, show_progress_bar=False)
    double = copy.deepcopy(model).double()
    forward_fn(double, x.double()).backward()
    assert scores["layer"].mean == pytest.approx(3 * double.weight.grad.square().mean().item(), rel=1e-5)
    assert scores["layer"].num_examples == 1
    assert scores["layer"].standard_error is None


class Routed(nn.Module):
    """Some rows of some batches reach an expert, in an order that does not show their examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, rows):
        y = x.reshape(-1, 4)
        if rows:
            y = torch.cat([self.expert(y[:rows]), y[rows:]])
        return self.head(y.reshape(x.shape)).square().sum() / len(x)


@pytest.mark.parametrize("first", [0, 1])
def test_every_batch_weighs_as_much_as_its_examples_also_where_rows_belong_to_nobody(first):
    x = torch.randn(4, 5, 4)

    def expert_of(*rows):
        model = Routed()
        batches = [(x, number) for number in rows]
        with pytest.warns(UserWarning, match="could not be attributed"):
            return scores_of(model, batches, ["expert", "head"], forward_fn=lambda m, b: m(*b))["expert"].mean

    always = expert_of(7, 7)
    # Half of the examples have no gradient there.
    assert expert_of(*[(7, 0), (0, 7)][first]) == pytest.approx(always / 2, rel=1e-6)


def test_a_batch_whose_rows_all_belong_to_examples_weighs_as_much_as_one_without():
    x = torch.randn(4, 5, 4)
    exact = scores_of(Routed(), [(x, 20)], ["expert", "head"], forward_fn=lambda m, b: m(*b))["expert"].mean
    with pytest.warns(UserWarning, match="could not be attributed"):
        always, mixed = (
            scores_of(Routed(), [(x, number) for number in rows], ["expert", "head"], forward_fn=lambda m, b: m(*b))
            for rows in ((7, 7), (20, 7))
        )
    assert mixed["expert"].mean == pytest.approx((always["expert"].mean + exact) / 2, rel=1e-6)


def test_rule_of_rows():
    x, g = torch.randn(6, 2), torch.randn(6, 3)
    assert by_example(x, g, 6)[0] is x
    assert by_example(x, g, 3)[0].shape == (3, 2, 2)
    with pytest.raises(UnattributableError):
        by_example(x, g, 4)
    assert by_example(torch.randn(5, 3, 2), torch.randn(5, 3, 4), 3)[1].shape == (3, 5, 4)
    assert by_example(torch.randn(2), torch.randn(3), 1)[1].shape == (1, 3)


IDS = torch.zeros(3, 7)


@pytest.mark.parametrize(
    ("batch", "examples"),
    [
        (IDS, 3),
        ([("text", IDS), IDS[:, :2]], 3),
        ({"flag": True, "scale": torch.tensor(1.0), "x": IDS}, 3),
        ({"position_ids": torch.zeros(1, 7), "inputs_embeds": torch.zeros(3, 7, 2), "labels": IDS}, 3),
        ({"position_ids": torch.zeros(3, 2, 7), "inputs_embeds": torch.zeros(2, 7, 4), "input_ids": None}, 2),
        ({"edge_index": torch.zeros(2, 9), "x": torch.zeros(8, 4), "labels": torch.zeros(3)}, 3),
        ({"sigma": torch.zeros(3), "mask": torch.zeros(7, 3)}, 3),
        ((torch.zeros(7, 3, 4), torch.zeros(3)), 3),
        ([IDS, IDS, torch.zeros(3)], 3),
    ],
)
def test_a_batch_that_shows_its_number_of_examples(batch, examples):
    assert batch_size_of(batch) == (examples, True)


@pytest.mark.parametrize(
    ("batch", "examples"),
    [
        ({"text": "abc"}, None),
        ([IDS, IDS[:2]], 3),
        ({"edge_index": torch.zeros(2, 9), "x": torch.zeros(8, 4)}, 2),
        ((torch.zeros(7, 3, 4), torch.zeros(4)), 7),
    ],
)
def test_a_batch_that_does_not_show_its_number_of_examples(batch, examples):
    assert batch_size_of(batch) == (examples, False)


@pytest.mark.parametrize("name", ["waves", ["missing", "waves"], ("waves", 3)])
def test_the_main_input_of_the_model_shows_the_number_of_examples(name):
    batch = {"input_ids": torch.zeros(9, 7), "waves": IDS}
    assert batch_size_of(batch, name) == (3, True)


@pytest.mark.parametrize("name", [None, 5, {"waves": 1}, ["missing"], object()])
def test_main_input_names_of_other_libraries_are_ignored(name):
    assert batch_size_of({"waves": torch.zeros(9, 7), "input_ids": IDS}, name) == (3, True)

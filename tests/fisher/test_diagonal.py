"""The sums of squared gradients of every element, against autograd in float64, one example at a time."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fim_lora.fisher.calibration import calibrate
from fim_lora.fisher.diagonal import DiagonalCounts, DiagonalSums
from fim_lora.fisher.layers.registry import target_layer
from fim_lora.fisher.recorder import Recorder
from helpers.diagonals import assert_diagonals, diagonals_of_examples
from helpers.gradient_pairs import LiveBytes
from helpers.single_layers import LAYERS, WIDTH, Net, batches_for, batches_of, by_row, floats

NAMES = ("first", "second", "third")


class ThreeLayers(nn.Module):
    """Gradients turn into NaN between two layers for batches that say so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, target, break_after=None, offset=0.0):
        for name in NAMES:
            x = torch.tanh(getattr(self, name)(x))
            if name == break_after:
                x.register_hook(lambda gradient: gradient * torch.nan)
        target = target.view(-1, *[1] * (x.ndim - 1))
        return {"loss": (x - target).square().flatten(1).sum(1).mean() + offset}


def three_batches():
    return batches_of(floats(5, WIDTH), count=3)


def layers_of(model, names):
    return {name: target_layer(name, model.get_submodule(name)) for name in names}


def measured(model, batches, names=("layer",), **options):
    layers = layers_of(model, names)
    sums = DiagonalSums(layers)
    counts = calibrate(
        model=model,
        layers=layers,
        statistic=sums,
        dataloader=batches,
        num_batches=len(batches),
        show_progress_bar=False,
        **options,
    )
    return sums.mean(counts, layers)


def truth_of(model, batches, names=("layer",)):
    examples = [example for batch in batches for example in by_row(batch)]
    return diagonals_of_examples(model, examples, names)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_elements_equal_autograd(layer, calls):
    torch.manual_seed(0)
    model = Net(layer(), calls=calls)
    batches = batches_for(model.layer)
    found = measured(model, batches)
    assert found["layer"].shape == model.layer.weight.shape
    assert found["layer"].dtype == torch.float32
    assert_diagonals(found, truth_of(model, batches))
    assert (found.num_batches, found.num_examples, found.num_skipped_batches) == (2, 6, 0)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_elements_in_float64(layer):
    torch.manual_seed(0)
    model = Net(layer())
    batches = [
        {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        for batch in batches_for(model.layer)
    ]
    found = measured(model.double(), batches)
    assert found["layer"].dtype == torch.float64
    assert_diagonals(found, truth_of(model, batches), rtol=1e-10, atol=1e-13)


def test_batches_of_different_sizes():
    batches = [batch for size in (1, 5, 2) for batch in batches_of(floats(4, WIDTH), batch_size=size, count=1)]
    found = measured(ThreeLayers(), batches, NAMES)
    assert_diagonals(found, truth_of(ThreeLayers(), batches, NAMES))
    assert found.num_examples == 8


def test_examples_of_one_position_each():
    batches = batches_of(floats(WIDTH), batch_size=7)
    assert_diagonals(measured(ThreeLayers(), batches, NAMES), truth_of(ThreeLayers(), batches, NAMES))


def test_a_loop_of_ones_own():
    model, batches = ThreeLayers(), three_batches()
    layers = layers_of(model, NAMES)
    sums = DiagonalSums(layers)
    recorder = Recorder(layers, sums)
    recorder.start(model)
    for batch in batches:
        model(**batch)["loss"].backward()
    recorder.stop()
    assert_diagonals(sums.mean(recorder.result(), layers), truth_of(model, batches, NAMES))


def test_the_only_tensors_of_the_size_of_the_model_are_the_sums():
    width, depth = 256, 20
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    names = [str(index) for index in range(depth)]
    batches = [torch.randn(1, 2, width) for _ in range(3)]
    with LiveBytes() as memory:
        measured(model, batches, names, forward_fn=lambda model, x: model(x).square().mean())
    weight = width * width * 4
    assert depth * weight <= memory.peak <= (depth + 3) * weight  # the sums, and the gradient of one example and layer


def test_rows_of_no_example_count_as_one_example():
    """Positions that all examples share."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Embedding(5, WIDTH)

        def forward(self, x, target):
            y = x + self.layer(torch.arange(5)[None])
            return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}

    model, batches = Positions(), batches_of(floats(5, WIDTH))
    with pytest.warns(UserWarning, match=r"could not be attributed.*approximate: \['layer'\]"):
        found = measured(model, batches)
    double = copy.deepcopy(model).double()
    gradients = []
    for batch in batches:
        loss = double(batch["x"].double(), batch["target"].double())["loss"]
        gradients.append(torch.autograd.grad(loss, double.layer.weight)[0])
    # (Σ_t G_t)² / B, where Σ_t G_t is B times the gradient, averaged over two batches of three examples
    assert_diagonals(found, {"layer": torch.stack(gradients).square().mean(0) * 3})
    single = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in range(3)]
    assert_diagonals(measured(model, single), truth_of(model, single))


@pytest.mark.parametrize("problem", [{"offset": torch.inf}, {"offset": torch.nan}, {"break_after": "third"}])
def test_a_batch_without_finite_values_is_left_out(problem):
    """Also if the loss is infinite while all gradients are finite."""
    first, second, third = three_batches()
    model = ThreeLayers()
    layers = layers_of(model, NAMES)
    sums = DiagonalSums(layers)
    batches = [first, second | problem, third]
    with pytest.warns(UserWarning, match="1 of 3 calibration batches .* left out in all layers"):
        counts = calibrate(model, layers, sums, batches, 3, show_progress_bar=False)
    found = sums.mean(counts, layers)
    assert_diagonals(found, truth_of(model, [first, third], NAMES))
    assert (found.num_batches, found.num_skipped_batches, found.num_examples) == (3, 1, 6)


def test_layers_before_the_first_gradient_that_is_not_finite_keep_the_batch():
    first, second, third = three_batches()
    model = ThreeLayers()
    with pytest.warns(UserWarning, match="1 of 3 calibration batches .* left out in 1 layers"):
        found = measured(model, [first, second | {"break_after": "first"}, third], NAMES)
    whole, without = truth_of(model, [first, second, third], NAMES), truth_of(model, [first, third], NAMES)
    assert_diagonals(found, whole | {"first": without["first"]})
    assert (found.num_skipped_batches, found.num_examples) == (1, 9)


def test_no_usable_batch():
    batches = [batch | {"break_after": "first"} for batch in three_batches()]
    with pytest.raises(RuntimeError, match=r"All 3 calibration batches.*in 1 of 3 layers, for example 'first'"):
        measured(ThreeLayers(), batches, NAMES)


def test_layers_without_a_gradient_are_zero_with_a_warning():
    model, batches = ThreeLayers(), three_batches()
    model.unused = nn.Conv2d(4, 6, (2, 3), groups=2)
    with pytest.warns(UserWarning, match=r"1 layers took no part in the loss.*\['unused'\]"):
        found = measured(model, batches, ("first", "unused"))
    assert found["unused"].shape == model.unused.weight.shape
    assert not found["unused"].any()
    assert_diagonals({"first": found["first"]}, truth_of(model, batches, ["first"]))


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (0, "eFIM of every layer is exactly zero"),
        (1e25, "eFIM of layer 'first' is larger than torch.float32 can hold"),
    ],
)
def test_losses_that_are_too_small_or_too_large(factor, message):
    def forward_fn(model, batch):
        return model(**batch)["loss"] * factor

    with pytest.raises(RuntimeError, match=message):
        measured(ThreeLayers(), three_batches(), NAMES, forward_fn=forward_fn)


def test_merged_counts_are_those_of_one_process():
    first = DiagonalCounts({"a": 3, "b": 4}, 2, 1, {"a"}, {"b"}, set())
    second = DiagonalCounts({"a": 1, "b": 0}, 1, 0, {"b"}, set(), {"b"})
    assert DiagonalCounts.merged([first, second]) == DiagonalCounts({"a": 4, "b": 4}, 3, 1, {"a", "b"}, {"b"}, {"b"})
    with pytest.raises(RuntimeError, match="Process 1 measures other layers than process 0, for example 'b'"):
        DiagonalCounts.merged([first, DiagonalCounts({"a": 1})])


def test_processes_do_not_exchange_the_sums_to_merge():
    model = ThreeLayers()
    layers = layers_of(model, NAMES)
    sums = DiagonalSums(layers)
    calibrate(model, layers, sums, three_batches(), 3, show_progress_bar=False)
    assert set(sums.sums) == set(NAMES)
    received = pickle.loads(pickle.dumps(sums))
    assert received.sums == {}
    assert received.counts == sums.counts
